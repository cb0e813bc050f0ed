"""The command line: `python3 -m nbd_plugin create|list|resize|remove|snapshot …`

It takes the same `key=value` parameters as the plugin, to find the same store:

    python3 -m nbd_plugin create   dir=/srv/volumes vm1 10G [--read-only]
    python3 -m nbd_plugin list     dir=/srv/volumes [--json]
    python3 -m nbd_plugin resize   dir=/srv/volumes vm1 20G [--shrink]
    python3 -m nbd_plugin snapshot dir=/srv/volumes vm1 before-upgrade
    python3 -m nbd_plugin remove   dir=/srv/volumes vm1@before-upgrade
    python3 -m nbd_plugin list     store=rbd pool=rbd

A volume that is open for writing is busy: resize, remove and snapshot refuse it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from nbd_plugin.errors import PluginError, one_line
from nbd_plugin.names import check_volume_name
from nbd_plugin.service import make_store
from nbd_plugin.settings import Settings
from nbd_plugin.sizes import format_size, parse_size
from nbd_plugin.store import Store

_WORDS = {
    "create": ("VOLUME", "SIZE"),
    "list": (),
    "resize": ("VOLUME", "SIZE"),
    "remove": ("VOLUME",),
    "snapshot": ("VOLUME", "SNAPSHOT"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit status 0; 1 for a refusal, told in one line; 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    settings = Settings()
    words = []
    try:
        for item in options.items:
            key, equals, value = item.partition("=")
            if equals:
                settings.set(key, value)
            else:
                words.append(item)
        expected = _WORDS[options.command]
        if len(words) != len(expected):
            needed = " ".join(expected) or "no further word"
            print(f"nbd_plugin: {options.command} needs {needed}", file=sys.stderr)
            return 2
        settings.check()
        if settings.store == "memory":
            raise PluginError("the memory store lives in nbdkit only")
        store = make_store(settings)
        store.start()
        try:
            _run(store, options, words)
        finally:
            store.stop()
    except Exception as error:
        print(f"nbd_plugin: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _run(store: Store, options: argparse.Namespace, words: list[str]) -> None:
    if options.command == "list":
        _list(store, as_json=options.json)
        return
    name = check_volume_name(words[0], snapshots=options.command == "remove")
    if options.command == "create":
        store.create(name, parse_size(words[1]), read_only=options.read_only)
    elif options.command == "resize":
        store.resize(name, parse_size(words[1]), shrink=options.shrink)
    elif options.command == "remove":
        store.remove(name)
    else:
        check_volume_name(f"{name}@{words[1]}")
        store.snapshot(name, words[1])


def _list(store: Store, *, as_json: bool) -> None:
    volumes = store.list_volumes()
    if as_json:
        print(json.dumps([asdict(volume) for volume in volumes], indent=2))
        return
    for volume in volumes:
        used = "-" if volume.allocated_bytes is None else str(volume.allocated_bytes)
        mode = "read-only" if volume.read_only else "writable"
        print(f"{volume.name:<32} {format_size(volume.size_bytes):>12} {used:>16} {mode}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m nbd_plugin",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_WORDS)
    parser.add_argument("items", nargs="*", metavar="KEY=VALUE|VOLUME|SIZE|SNAPSHOT")
    parser.add_argument("--read-only", action="store_true", help="create: never writable")
    parser.add_argument("--shrink", action="store_true", help="resize: allow a smaller size")
    parser.add_argument("--json", action="store_true", help="list: for programs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
