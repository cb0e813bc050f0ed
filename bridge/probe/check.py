"""Does a vhost-user-blk device keep its promises? Tries one rule after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import trio

from bridge.errors import BridgeError
from bridge.probe import data_rules, feature_rules, request_rules, ring_rules, session_rules
from bridge.probe.data_rules import fill
from bridge.probe.rules import Broken, Device, NotOffered, Rule, Verdict, learn

RULES: Final[Sequence[Rule]] = (
    *feature_rules.RULES,
    *request_rules.RULES,
    *ring_rules.RULES,
    *session_rules.RULES,
    *data_rules.RULES,
)
"""In the order in which they are tried."""


@dataclass(frozen=True)
class Finding:
    """What came of one rule."""

    rule: str
    text: str
    verdict: Verdict
    detail: str = ""
    """What the device did instead, or why the rule was not tried."""


async def check(
    path: str,
    *,
    destructive: bool = False,
    only: str = "",
    limit_s: float = 60.0,
    report: Callable[[Finding], None] = lambda _: None,
) -> list[Finding]:
    """Try the rules whose name has `only` in it on the device at `path`; `report` hears of each
    finding at once.

    Those that write are skipped unless `destructive`. A rule that takes longer than `limit_s`
    has failed: the device did not answer. Raises ConnectionLost, ProtocolError or Refused if there
    is no device that can be talked to.
    """
    device = await learn(path)
    if destructive:
        # If it fails, a rule says so.
        with suppress(NotOffered, BridgeError), trio.move_on_after(limit_s):
            await fill(device)
    findings = []
    for rule in RULES:
        if only not in rule.name:
            continue
        if rule.destructive and not destructive:
            verdict, detail = Verdict.SKIPPED, "it writes"
        else:
            verdict, detail = await _tried(rule, device, limit_s)
        finding = Finding(rule.name, rule.text, verdict, detail)
        findings.append(finding)
        report(finding)
    return findings


async def _tried(rule: Rule, device: Device, limit_s: float) -> tuple[Verdict, str]:
    try:
        with trio.fail_after(limit_s):
            await rule.run(device)
    except trio.TooSlowError:
        return Verdict.FAILED, f"no answer within {limit_s:g} s"
    except NotOffered as error:
        return Verdict.SKIPPED, str(error)
    # A device can make the driver stumble, too: with a head that it was not given (ValueError).
    except (Broken, BridgeError, ValueError) as error:
        return Verdict.FAILED, str(error)
    except BaseExceptionGroup as group:
        ours, others = group.split((Broken, BridgeError, ValueError))
        if others is not None or ours is None:
            raise
        return Verdict.FAILED, _first_text(ours)
    return Verdict.OK, ""


def _first_text(group: BaseExceptionGroup[BaseException]) -> str:
    first = group.exceptions[0]
    return _first_text(first) if isinstance(first, BaseExceptionGroup) else str(first)
