"""The options of `serve` that are about its control socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec

from bridge.api.settings import AUTO, ApiSettings
from bridge.cli.parameters import FilePath, Finite, Utf8, option

P = ParamSpec("P")

_OPTIONS = (
    option(
        "--name",
        type=Utf8(),
        default="",
        help="What the bridge is called: by `nbd-bridge status NAME`, in metrics and log lines. "
        "Default: like its socket.",
    ),
    option(
        "--api",
        type=FilePath(),
        default=AUTO,
        show_default=True,
        metavar="auto|off|PATH",
        help="Control socket; auto: /run/nbd-bridge/NAME.api, or in $XDG_RUNTIME_DIR/nbd-bridge.",
    ),
    option(
        "--slow-ms",
        type=Finite(0),
        default=1000.0,
        show_default=True,
        help="Log requests that take longer than so many milliseconds; 0: none.",
    ),
)


def add(command: Callable[P, None]) -> Callable[P, None]:
    """`command` with these options."""
    for each in reversed(_OPTIONS):
        command = each(command)
    return command


def take(options: dict[str, Any]) -> ApiSettings:
    """Those of `options`, which are taken out. Raises ConfigError."""
    from bridge.api.places import check_name

    name = options.pop("name")
    if name:
        check_name(name)
    return ApiSettings(name, options.pop("api"), options.pop("slow_ms") / 1000)
