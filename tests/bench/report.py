"""Tables and pictures of `./run bench full`.

"general" are the requests that the bridge's engine did not serve by itself.

`./run bench report FILE…`: what `--json` wrote, as one table. Of several runs it is the worst of
each row, by its ratio: what a reader may rely on.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.bench.samples import Result

_HEAD = (
    "| | nbd-bridge | qemu-storage-daemon | ratio | required | CPU µs | of the peer | general |\n"
    "|---|---|---|---|---|---|---|---|"
)


_MARKS = [1, 2, 5, 10, 20, 50, 100, 200, 500]


def markdown(results: list[Result]) -> str:
    """A table for each group."""
    parts = []
    for group, rows in groupby(results, key=lambda each: each.group):
        lines = [f"**{group}**", "", _HEAD, *map(_line, rows), ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def _line(each: Result) -> str:
    if each.failure:
        return f"| {each.name} | failed: {each.failure} | | | {each.required:g} | | | |"
    mark = "" if each.ratio >= each.required else " (below)"
    return (
        f"| {each.name} | {each.ours:,.0f} ± {each.ours_spread / 2:.0%} "
        f"| {each.theirs:,.0f} ± {each.theirs_spread / 2:.0%} "
        f"| {each.ratio:.2f}{mark} | {each.required:g} "
        f"| {each.ours_cpu_us:.1f} | {each.theirs_cpu_us:.1f} ({each.cpu_ratio:.2f}) "
        f"| {each.general:.1f} % |"
    )


def _pygal() -> Any:
    """The library, without the finder of old interface that it leaves in `sys.meta_path`: with it
    every later import of a module that is not there warns.
    """
    finders = list(sys.meta_path)
    import pygal

    sys.meta_path[:] = finders
    return pygal


def picture(results: list[Result], path: Path) -> None:
    """The ratios as bars, in SVG. 1 is the peer."""
    pygal = _pygal()
    chart = pygal.HorizontalBar(
        logarithmic=True,
        show_legend=False,
        print_values=True,
        height=24 * len(results) + 80,
        style=pygal.style.Style(value_font_size=10),
        js=[],  # Nothing is loaded from elsewhere.
    )
    chart.title = "Requests per second, as a multiple of qemu-storage-daemon's"
    shown = [each for each in reversed(results) if not each.failure]
    chart.x_labels = [f"{each.group}: {each.name}" for each in shown]
    chart.y_labels = _MARKS
    chart.value_formatter = lambda value: f"{value:.2f}"
    chart.add("ratio", [each.ratio for each in shown])
    chart.render_to_file(str(path))


def worst(runs: list[list[Result]]) -> list[Result]:
    """Of each row the run with the lowest ratio; a failure is the lowest."""
    found: dict[tuple[str, str], Result] = {}
    for results in runs:
        for each in results:
            key = each.group, each.name
            if key not in found or each.ratio < found[key].ratio:
                found[key] = each
    return list(found.values())


def load(path: Path) -> list[Result]:
    """What `--json` wrote."""
    return [Result(**each) for each in json.loads(path.read_text())]


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="./run bench report", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="what `./run bench full --json` wrote")
    parser.add_argument("--svg", type=Path, help="a picture of the ratios")
    arguments = parser.parse_args()
    results = worst([load(path) for path in arguments.files])
    print(markdown(results))
    if arguments.svg:
        picture(results, arguments.svg)


if __name__ == "__main__":
    main()
