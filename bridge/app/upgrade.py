"""A new program for a running disk: the process replaces itself, and the guest only waits.

The process lets the guest's rings run dry, hangs up at the server, and executes the program anew
(execve: the same process for a service manager). What the next program needs stays open: the
listening socket, the front-end's connection, and what came over it (see `handover`). The cache
file is left as a killed process leaves it, which loses nothing, and is locked again at the start.

Before that the new program is tried: one that cannot read its options must not be found out when
the guest waits. Whatever goes wrong until the rings are closed leaves the disk served as it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

import trio

from bridge.app import logs
from bridge.app.signals import pass_signals_on, send_late_signals
from bridge.errors import BridgeError, ConfigError
from bridge.guest.device import BlkDevice
from bridge.guest.vhost_user.handover import Conversation, Desk, Handover
from bridge.guest.vhost_user.listener import Listener
from bridge.server.uri import NbdUri

_PARCEL: Final = "_NBD_BRIDGE_PARCEL"
"""The variable with the descriptor of what one program leaves to the next."""
_TRIAL: Final = "_NBD_BRIDGE_TRIAL"
_FORMAT: Final = "1"
"""Of the parcel: a program that reads another one does not take over."""
_TRIAL_S: Final = 60.0
QUIESCE_S: Final = 2.0
"""For the requests in flight. Longer would be a pause that a guest notices."""
_AGAIN_S: Final = 0.005
_FROM_MANAGER: Final = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


@dataclass(frozen=True)
class Parcel:
    """What one program leaves to the next."""

    listening: Listener
    front_end: Handover | None
    """None: no front-end is connected."""
    began_s: float
    """When the guest began to wait, on the system's monotonic clock."""
    stale_writes: bool = True
    """Something that was sent to the server may still be executed there."""

    @property
    def waited_s(self) -> float:
        """How long the guest has waited by now."""
        return time.monotonic() - self.began_s

    def keep(self, *, stale_writes: bool) -> int:
        """Let all descriptors outlive the program; the one that describes them."""
        fds = [self.listening.sock.fileno()]
        fds += self.front_end.fds if self.front_end is not None else []
        text = json.dumps(
            {
                "listening": self.listening.as_json(),
                "front_end": None if self.front_end is None else self.front_end.as_json(),
                "began_s": self.began_s,
                "stale_writes": stale_writes,
            }
        )
        fd = os.memfd_create("nbd-bridge parcel")
        os.write(fd, text.encode())
        for each in (*fds, fd):
            os.set_inheritable(each, True)
        return fd


def received() -> Parcel | None:
    """What the program before this one has left in this process; None: there was none."""
    text = os.environ.pop(_PARCEL, "")
    if not text:
        return None
    with open(int(text), "rb") as file:
        file.seek(0)
        value = json.load(file)
    front_end = value["front_end"]
    parcel = Parcel(
        Listener.of_json(value["listening"]),
        None if front_end is None else Handover.of_json(front_end),
        value["began_s"],
        value["stale_writes"],
    )
    for fd in parcel.front_end.fds if parcel.front_end is not None else ():
        os.set_inheritable(fd, False)
    return parcel


def is_trial() -> bool:
    """This process is only to find out whether it could serve."""
    return _TRIAL in os.environ


def check_trial(uri: NbdUri) -> None:
    """Raises ConfigError if this program must not take over from the one that tries it."""
    form, _, served = os.environ[_TRIAL].partition(" ")
    if form != _FORMAT:
        raise ConfigError("this version cannot take over from the running one: restart instead")
    if served != uri.text:
        raise ConfigError(
            f"the uri is another one ({uri.text}), and a guest that runs must keep its disk: "
            "restart instead"
        )


async def try_program(uri: NbdUri) -> None:
    """Raises BridgeError, with what the new program says, if it cannot be run with our options.

    `uri`: that of the disk that is served.
    """
    environment = {**os.environ, _TRIAL: f"{_FORMAT} {uri.text}"}
    environment.pop("NOTIFY_SOCKET", None)
    with trio.move_on_after(_TRIAL_S) as scope:
        try:
            done = await trio.run_process(
                _command(),
                env=environment,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                capture_stderr=True,
            )
        except OSError as error:
            raise BridgeError(f"the new program cannot be run: {error.strerror}") from None
    if scope.cancelled_caught:
        raise BridgeError(f"the new program does not start within {_TRIAL_S:g} s")
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        said = lines[-1].removeprefix("nbd-bridge: ") if lines else f"status {done.returncode}"
        raise BridgeError(f"the new program refuses: {said}")


async def pack(
    device: BlkDevice, desk: Desk, listener: Listener, *, may_go_on: Callable[[], bool]
) -> Parcel:
    """Stop the rings and take everything that the next program needs.

    `may_go_on()` says whether the process is not about to end anyhow. Raises BridgeError, and the
    disk is served as before. When it returns nothing is served any more, and the process must be
    replaced; the same after any other error.
    """
    if listener.is_connected:
        raise BridgeError("the disk is served on a connection that was inherited with --fd")
    began_s = time.monotonic()
    conversation = await _held(desk)
    try:
        if conversation is not None and conversation.session.is_migrating:
            raise BridgeError("the guest is being migrated: try again afterwards")
        if not await device.quiesce(QUIESCE_S):
            raise BridgeError(
                f"requests of the guest are not answered within {QUIESCE_S:g} s: is the server "
                "there?"
            )
        # No await from here on: nothing is heard, popped or accepted in between.
        if desk.present is not conversation or not device.is_quiet:
            raise BridgeError("the front-end came or went at this moment: try again")
        if not may_go_on():
            raise BridgeError("the bridge is stopping")
    except BaseException:
        device.go_on()
        if conversation is not None:
            conversation.transport.release()
        raise
    pass_signals_on()
    bases = device.hand_over_rings()
    front_end = None if conversation is None else Handover.of(conversation, bases)
    return Parcel(listener.handed_over(), front_end, began_s)


async def _held(desk: Desk) -> Conversation | None:
    """The present conversation, of which no further message is received: a stop of the rings that
    the front-end asks for must not cross ours. None: there is no front-end. Raises BridgeError."""
    with trio.move_on_after(QUIESCE_S):
        while (present := desk.present) is not None and not present.transport.hold():  # noqa: ASYNC110
            await trio.sleep(_AGAIN_S)
        return present
    raise BridgeError("the front-end is setting up the disk: try again")


def replace_program(parcel: Parcel, *, stale_writes: bool) -> NoReturn:
    """Execute the program anew, with the same arguments. Raises OSError."""
    send_late_signals()
    logs.drain()
    environment = {key: value for key, value in os.environ.items() if key not in _FROM_MANAGER}
    environment[_PARCEL] = str(parcel.keep(stale_writes=stale_writes))
    command = _command()
    os.execve(command[0], command, environment)


def _command() -> list[str]:
    """The command line of this process, with the program that is there by now."""
    program, *arguments = sys.argv
    if os.access(program, os.X_OK) and os.path.isfile(program):
        return [os.path.abspath(program), *arguments]
    return [sys.executable, "-m", "bridge", *arguments]


def is_passed_a_socket() -> bool:
    """By the program before this one; in a trial, perhaps by a service manager to the process that
    tries."""
    return _PARCEL in os.environ or (is_trial() and "LISTEN_FDS" in os.environ)
