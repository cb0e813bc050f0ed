"""`./run bench [NAME] [OPTIONS]`: one of the benchmarks in this folder, `peer` by default."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import tests.bench


def main() -> None:
    """Run the benchmark that the first argument names."""
    names = sorted(each.name for each in pkgutil.iter_modules(tests.bench.__path__))
    names = [name for name in names if name not in ("__main__", "far_plugin")]
    chosen = "peer"
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        chosen = sys.argv.pop(1)
    if chosen not in names:
        raise SystemExit(f"no benchmark {chosen!r}; there are {', '.join(names)}")
    importlib.import_module(f"tests.bench.{chosen}").main()


main()
