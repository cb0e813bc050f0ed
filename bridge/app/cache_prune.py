"""Removes cache files of disks that are gone, or that were not used for long.

A file is removed under its lock, and looked at once more under it: a bridge that begins meanwhile
finds it, or makes it anew, and what only the file has is not removed unless that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bridge.app.cache_files import CacheEntry, DiskState, State
from bridge.app.cache_names import notes_directory
from bridge.cache.file.inspect import drop
from bridge.cache.file.location import forget
from bridge.errors import ConfigError


@dataclass(frozen=True)
class Pruned:
    """A file that was to go, and what became of it."""

    entry: CacheEntry
    reason: str
    """Why it was to go."""
    kept: str = ""
    """Why it is still there; "": it was removed, or would be."""


@dataclass(frozen=True, kw_only=True)
class PruneRules:
    """Which files are to go: those that one of the first two applies to."""

    gone: bool = False
    """Those of disks that their server does not have any more."""
    unused_s: float | None = None
    """Those that were not used for that long."""
    discard_dirty: bool = False
    """Even with data that the server lacks."""


def prune(
    entries: Iterable[CacheEntry], rules: PruneRules, *, now_s: float, dry_run: bool = False
) -> list[Pruned]:
    """Remove the files of `entries` that `rules` name, with `dry_run` none; what became of each.

    For `rules.gone` the entries need what `ask_servers` adds.
    """
    results = []
    for entry in entries:
        if not (reason := _reason(entry, rules, now_s)):
            continue
        kept = _obstacle(entry, rules)
        if not kept and not dry_run:
            kept = _remove(entry, rules)
        results.append(Pruned(entry, reason, kept))
    return results


def _reason(entry: CacheEntry, rules: PruneRules, now_s: float) -> str:
    """Why this file is to go; "": it is not."""
    if rules.gone and entry.disk is DiskState.GONE:
        return entry.disk_reason
    if rules.unused_s is not None and entry.age_s(now_s) >= rules.unused_s:
        return f"not used for {entry.age_s(now_s) / 86400:.1f} days"
    return ""


def _obstacle(entry: CacheEntry, rules: PruneRules) -> str:
    """Why it must stay all the same, as far as was seen; "": nothing."""
    if entry.state is State.IN_USE:
        return "in use" if entry.owner_pid is None else f"in use by process {entry.owner_pid}"
    if rules.discard_dirty:
        return ""
    if entry.state is State.DIRTY:
        return f"holds {entry.dirty_bytes} bytes that the server lacks"
    if entry.state is State.DAMAGED:
        return f"may hold data that the server lacks: {entry.problem}"
    return ""


def _remove(entry: CacheEntry, rules: PruneRules) -> str:
    """Remove it if it is as it was when it was seen; why not, or ""."""
    try:
        drop(entry.path, discard_dirty=rules.discard_dirty, used_ns=entry.used_ns)
    except ConfigError as error:
        return str(error)
    if (notes := notes_directory()) is not None:
        forget(entry.path, notes)
    return ""
