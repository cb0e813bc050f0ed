"""`nbd-bridge demo`."""

from __future__ import annotations

import sys
from functools import partial

from bridge.app import logs
from bridge.app.command_settings import DemoSettings
from bridge.app.signals import run_until_signal
from bridge.cli import common
from bridge.cli.wording import explain
from bridge.demo.demo import DemoConfig, run_demo


@common.command("demo", DemoSettings, example="nbd-bridge demo --no-guest")
def command(settings: DemoSettings) -> None:
    """Boot a small Linux guest on a disk of the bridge, check the image."""
    logs.configure(level="warning", format_="text", explain=explain)
    config = DemoConfig(guest=not settings.demo.no_guest)
    result = run_until_signal(partial(run_demo, config, say=common.print_result))
    if not result.passed:
        sys.exit(1)
