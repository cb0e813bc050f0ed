"""One target under atheris: `python -m tests.fuzz.guided NAME PLANT LIBFUZZER-ARGUMENT…`.

A process of its own, because libFuzzer ends it. `PLANT`: "-", or the name of a target whose planted
bug is put in.
"""

from __future__ import annotations

import importlib
import sys

_PACKAGES = ["bridge", "nbd_plugin", "tomllib", "h11"]


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    import atheris

    name, plant, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=_PACKAGES):
        for module in ("tomllib", "tests.fuzz.targets", "tests.fuzz.planted"):
            importlib.import_module(module)
    from tests.fuzz.planted import PLANTED
    from tests.fuzz.targets import TARGETS, quiet

    quiet()
    target = TARGETS[name]
    if plant != "-":
        PLANTED[plant].__enter__()

    def one_input(data: bytes) -> None:
        target.run(data)

    atheris.Setup(["fuzz", *arguments], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
