"""What the benchmarks report, from figures that are given."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from tests.bench import report
from tests.bench.rows import ROWS
from tests.bench.samples import Result, Sample, Side, result_of

ROW = ROWS[0]


def side(*rates: float, cpu_us: float = 10.0) -> Side:
    return Side([Sample(rate, cpu_us, 0.0) for rate in rates])


def test_rows_can_be_told_apart() -> None:
    assert len({(row.group, row.name) for row in ROWS}) == len(ROWS)


def test_row_is_the_medians_of_both_sides() -> None:
    ours = side(50, 300, 100)
    ours.samples[0] = replace(ours.samples[0], general=3.0)
    ours.samples[1] = replace(ours.samples[1], general=1.5)
    result = result_of(ROW, ours, side(60, 40, 50, cpu_us=20.0))
    assert result.general == 1.5
    assert (result.ours, result.theirs, result.ratio, result.cpu_ratio) == (100, 50, 2.0, 0.5)
    assert (result.ours_spread, result.theirs_spread) == (2.5, 0.4)


def test_table_says_which_rows_are_below_what_is_required_and_which_failed() -> None:
    table = report.markdown(
        [
            Result("a", "good", 1.0, 200, 100, ours_cpu_us=1, theirs_cpu_us=2, general=0.4),
            Result("a", "slow", 1.5, 100, 100, ours_cpu_us=1, theirs_cpu_us=2),
            Result("b", "broken", 1.0, failure="exit status 1"),
        ]
    )
    good, slow, broken = (
        line for line in table.splitlines() if line.startswith(("| g", "| s", "| b"))
    )
    assert "| 2.00 |" in good
    assert good.endswith("| 0.4 % |")
    assert "| 1.00 (below) |" in slow
    assert "failed: exit status 1" in broken
    assert table.count("**") == 4


def test_report_of_several_runs_has_the_worst_of_each_row(tmp_path: Path) -> None:
    runs = []
    for number, (ours, failure) in enumerate(((100.0, ""), (50.0, ""), (200.0, ""))):
        results = [
            Result("a", "one", 1.0, ours, 100.0, failure=failure),
            Result("a", "two", 1.0, failure="exit status 1")
            if number == 2
            else Result("a", "two", 1.0, 9.0, 3.0),
        ]
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps([each.as_json() for each in results]))
        runs.append(report.load(path))
    one, two = report.worst(runs)
    assert (one.ours, one.ratio) == (50.0, 0.5)
    assert two.failure


def test_picture_has_a_bar_for_each_row_that_did_not_fail(tmp_path: Path) -> None:
    path = tmp_path / "ratios.svg"
    finders = list(sys.meta_path)
    report.picture(
        [Result("a", "good", 1.0, 200, 100), Result("a", "broken", 1.0, failure="no")], path
    )
    text = path.read_text()
    assert text.startswith("<?xml")
    assert 'href="http' not in text, "something is loaded from elsewhere"
    assert ("good" in text, "broken" in text) == (True, False)
    assert sys.meta_path == finders, "pygal's finder makes every failing import after it warn"
