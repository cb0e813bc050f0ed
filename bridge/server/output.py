"""What is still to be sent on a connection, as a list of pieces: cut where the socket stopped."""

from __future__ import annotations


def rest_after(output: list[bytes | memoryview], sent: int) -> list[bytes | memoryview]:
    """The rest of `output` after `sent` bytes."""
    for index, piece in enumerate(output):
        size = len(piece)
        if sent < size:
            rest = output[index:]
            if sent:
                rest[0] = memoryview(piece)[sent:]
            return rest
        sent -= size
    return []


def first_bytes(output: list[bytes | memoryview], limit_bytes: int) -> bytes:
    """The first bytes of `output` in one piece, about `limit_bytes` of them."""
    pieces: list[bytes | memoryview] = []
    total = 0
    for piece in output:
        room = limit_bytes - total
        if len(piece) > room:
            pieces.append(memoryview(piece)[:room])
            break
        pieces.append(piece)
        total += len(piece)
        if total >= limit_bytes:
            break
    return b"".join(pieces)
