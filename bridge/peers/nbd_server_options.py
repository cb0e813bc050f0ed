"""What a client puts into an option, taken apart (NBD "Option haggling")."""

from __future__ import annotations

from bridge.spec import nbd as p


def go_of(data: bytes) -> tuple[str, list[int]] | None:
    """Of INFO and GO: the export, and which information is wanted; None: not well formed."""
    name, rest = _take_string(data)
    if name is None or len(rest) < 2:
        return None
    (n_wanted,) = p.U16.unpack_from(rest)
    if len(rest) != 2 + 2 * n_wanted:
        return None
    return name, [wanted for (wanted,) in p.U16.iter_unpack(rest[2:])]


def meta_context_query_of(data: bytes) -> tuple[str, list[str]] | None:
    """Of SET_META_CONTEXT: the export, and at most 64 queries; None: not well formed."""
    name, rest = _take_string(data)
    if name is None or len(rest) < 4:
        return None
    (n_queries,) = p.U32.unpack_from(rest)
    rest = rest[4:]
    queries: list[str] = []
    for _ in range(min(n_queries, 64)):
        query, rest = _take_string(rest)
        if query is None:
            return None
        queries.append(query)
    return name, queries


def _take_string(data: bytes) -> tuple[str | None, bytes]:
    if len(data) < 4:
        return None, b""
    (length,) = p.U32.unpack_from(data)
    if length > len(data) - 4:
        return None, b""
    return data[4 : 4 + length].decode("utf-8", "replace"), data[4 + length :]
