"""`nbd-bridge check`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from functools import partial

import click

from bridge.app.command_settings import CheckSettings
from bridge.app.signals import run_until_signal
from bridge.cli import common
from bridge.errors import ConfigError
from bridge.probe.check import RULES, Finding, check
from bridge.probe.rules import Verdict

_COLOURS = {Verdict.OK: "green", Verdict.FAILED: "red", Verdict.SKIPPED: "yellow"}
_WIDTH = max(len(each.name) for each in RULES)


@common.command("check", CheckSettings, example="nbd-bridge check /run/vm0.sock")
@click.argument("socket")
def command(settings: CheckSettings, socket: str) -> None:
    """Check whether the vhost-user-blk device at SOCKET keeps its promises.

    This process plays the guest, so no other guest may be connected. It works with any back-end.
    Without --destructive the disk is only read; the rules that write are skipped. The exit status
    is 1 if a rule failed.
    """
    chosen = settings.device
    if not any(chosen.only in each.name for each in RULES):
        names = ", ".join(each.name for each in RULES)
        raise ConfigError(f"--only {chosen.only}: the rules are {names}")
    findings = run_until_signal(
        partial(
            check,
            socket,
            destructive=chosen.destructive,
            only=chosen.only,
            limit_s=chosen.timeout_s,
            report=(lambda _: None) if chosen.as_json else _print,
        )
    )
    count = Counter(each.verdict for each in findings)
    if chosen.as_json:
        rules = [asdict(each) for each in findings]
        found = {"passed": not count[Verdict.FAILED], "rules": rules}
        common.print_result(json.dumps(found, indent=2))
    else:
        common.print_result(", ".join(f"{count[each]} {each}" for each in Verdict))
    if count[Verdict.FAILED]:
        sys.exit(1)


def _print(finding: Finding) -> None:
    verdict = common.coloured(f"{finding.verdict:7}", _COLOURS[finding.verdict])
    detail = f": {finding.detail}" if finding.detail else ""
    common.print_result(f"{verdict}  {finding.rule:{_WIDTH}}  {finding.text}{detail}")
