"""`nbd-bridge status`."""

from __future__ import annotations

import json
from typing import Any

from bridge.api.client import ask
from bridge.api.places import control_sockets, socket_of
from bridge.app.command_settings import StatusSettings
from bridge.cli import common
from bridge.cli.control import LOOK_S, optional_name_argument
from bridge.cli.wording import duration, time_text
from bridge.errors import ConfigError
from bridge.units import size_text


@common.command("status", StatusSettings, example="nbd-bridge status vm0")
@optional_name_argument
def command(settings: StatusSettings, name: str | None) -> None:
    """Print how bridge NAME is, and whether this host may be rebooted.

    NAME is what `list` shows, or the path of a control socket. Without one, all are shown.
    """
    paths = [socket_of(name)] if name else control_sockets()
    if not paths:
        raise ConfigError("no bridge is running that this user may ask")
    found = [ask(path, "GET", "/status", timeout_s=LOOK_S) for path in paths]
    if settings.output.as_json:
        common.print_result(json.dumps(found[0] if name else found, indent=2))
    else:
        common.print_result("\n\n".join(map(describe, found)))


def describe(found: dict[str, Any]) -> str:
    """The same as lines of text."""
    bridge, guest, server = found["bridge"], found["guest"], found["server"]
    lines = {
        "disk": f"{bridge['name']} ({bridge['state']} for {duration(bridge['uptime_s'])}, process "
        f"{bridge['pid']}, version {bridge['version']}, {bridge['engine']} engine)",
        "guest": _guest(guest),
        "server": _server(server),
    }
    cache = found["cache"]
    lines["cache"] = "off" if cache is None else _cache(cache)
    if cache is not None:
        lines["dirty"] = _dirty(cache)
    if requests := _requests(found.get("traffic", {})):  # One of an older version says nothing.
        lines["requests"] = requests
    if failed := found.get("errors"):
        lines["failed"] = ", ".join(f"{count} {what}" for what, count in failed.items())
    for kind, latency in found["latency"].items():
        if latency["p50_s"] is not None:
            lines[kind] = f"median below {_time(latency['p50_s'])}, 99 % below " + _time(
                latency["p99_s"]
            )
    if found["slow_requests_total"]:
        lines["slow"] = f"{found['slow_requests_total']} requests (see the log)"
    if found["warming"]:
        warming = found["warming"]
        lines["warming"] = (
            f"{size_text(warming['done_bytes'])} of {size_text(warming['total_bytes'])}"
        )
    return f"{common.table(lines)}\nsafe to reboot this host: {found['safe_to_reboot']['answer']}"


def _guest(guest: dict[str, Any]) -> str:
    size = size_text(guest["size_bytes"]) + (", read-only" if guest["read_only"] else "")
    if guest["state"] == "none":
        return f"none ({size}; it connects to {guest['socket'] or 'an inherited socket'})"
    text = (
        f"{guest['state']}, {size}, {guest['queues']} queue{'s'[: guest['queues'] != 1]}, "
        f"{guest['in_flight']} requests in flight, {guest['requests_total']} so far"
    )
    if general := sum(guest["general_total"].values()):
        text += f", {general / guest['requests_total']:.1%} the general way"
    faults = sum(guest["faults"].values())
    return text + (f", {faults} bad ones" if faults else "")


def _requests(traffic: dict[str, Any]) -> str:
    """What there was of each operation."""
    parts = []
    for op, each in traffic.items():
        size = f" ({size_text(each['bytes_total'])})" if each["bytes_total"] else ""
        if each["requests_total"]:
            parts.append(f"{op.replace('_', ' ')} {each['requests_total']}{size}")
    return ", ".join(parts)


def _server(server: dict[str, Any]) -> str:
    text = f"{server['uri']} {server['state']}"
    if server["down_s"]:
        text += f" for {duration(server['down_s'])}"
    if server["reason"]:
        text += f": {server['reason']}"
    if server["merged_total"]:
        text += f", {server['merged_total']} requests merged with the ones before"
    if server["outages_total"]:
        text += f" ({server['outages_total']} outages, {duration(server['down_total_s'])} in all)"
    return text


def _cache(cache: dict[str, Any]) -> str:
    hits = "" if cache["hit_ratio"] is None else f", {cache['hit_ratio']:.1%} hits"
    return (
        f"{cache['mode']}, {size_text(cache['used_bytes'])} of {size_text(cache['size_bytes'])} "
        f"used{hits}"
    )


def _dirty(cache: dict[str, Any]) -> str:
    if not cache["dirty_bytes"]:
        return "nothing"
    text = f"{size_text(cache['dirty_bytes'])} for {duration(cache['dirty_for_s'])}"
    if cache["write_out_bytes_per_s"]:
        text += f", {size_text(round(cache['write_out_bytes_per_s']))}/s are written out"
    if cache["clean_in_s"] is not None:
        text += f", clean in {duration(cache['clean_in_s'])}"
    return text


def _time(seconds: float | None) -> str:
    return "(more than 10 s)" if seconds is None else time_text(seconds)
