"""The metrics of several bridges as one text for Prometheus.

The text format wants all samples of a metric below its one header, so the texts cannot simply be
joined. Every sample of a bridge has the label `disk`; should two bridges call themselves alike, the
first one counts, since Prometheus refuses a text that has a sample twice.
"""

from __future__ import annotations

from collections.abc import Iterable


def merged(texts: Iterable[str]) -> str:
    """Texts in the format 0.0.4 as one. Of each metric, the header of the first text counts."""
    headers: dict[str, list[str]] = {}
    samples: dict[str, dict[str, str]] = {}
    """Metric → name and labels → the whole line."""
    for text in texts:
        name = ""
        own: dict[str, list[str]] = {}
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                own.setdefault(name, []).append(line)
                samples.setdefault(name, {})
            elif line and name:
                samples[name].setdefault(line.rpartition(" ")[0], line)
        for name, lines in own.items():
            headers.setdefault(name, lines)
    return "".join(
        f"{line}\n" for name in headers for line in (*headers[name], *samples[name].values())
    )
