"""Logging: one line per event on standard error, as text or JSON.

Logging must never delay a disk or end the process, even if standard error is on a full file system,
a pipe whose reader has exited, or a terminal or pipe that is not read. So a thread writes the
lines, from a bounded queue. Lines that do not fit, or cannot be written, are dropped and counted;
the count is logged in their place as soon as writing works again. (A non-blocking descriptor is no
way out: every process that shares the terminal or pipe would get it, too.)
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import select
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import TextIO, cast

import structlog

from bridge.errors import BridgeError, Remedy

_STDERR = 2
_QUEUE_MAX_BYTES = 1 << 20
"""Some thousand lines: enough for the messages of an outage on a slow terminal."""
_JOURNAL_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""sd-daemon(3): syslog's numbers, which journald takes from the beginning of each line."""
_LAST_WORDS_S = 1.0
"""How long the process waits at its end until its last lines are written."""


class _State:
    """What may change while the process runs."""

    threshold = logging.INFO
    disk = ""
    stream: DroppingStream | None = None


def set_level(level: str) -> None:
    """Log what is of `level` (as in LogSettings) or above from here on."""
    _State.threshold = getattr(logging, level.upper())


def level() -> str:
    """The present one."""
    return logging.getLevelName(_State.threshold).lower()


def set_disk(name: str) -> None:
    """Every line names this disk from here on; several may log to one place."""
    _State.disk = name


def dropped_lines() -> int:
    """How many lines could not be written so far."""
    return _State.stream.dropped_total if _State.stream is not None else 0


def drain() -> None:
    """Wait until all lines are written or dropped, for a moment at most: the program ends without
    its exit functions."""
    if _State.stream is not None:
        _State.stream.drain(_LAST_WORDS_S)


def configure(
    *, level: str, format_: str, explain: Callable[[BridgeError | Remedy], str] = str
) -> None:
    """Set up structlog for the whole process: `level` and `format_` as in LogSettings.

    `explain` turns an error, or a remedy that is logged without one, into text for the operator.

    Under journald, text has no time of its own, and each line begins with its priority.
    From here on `sys.stderr` is the stream of the log, so that other output (a progress bar, the
    traceback of an uncaught exception) cannot block or raise, either.
    """
    renderer, stamp = _format(format_)

    def note(dropped: int) -> str:
        event = {"event": "log lines were dropped", "level": "warning", "lines": dropped}
        stamp(None, "warning", event)  # in place
        return str(renderer(None, "warning", event)) + "\n"

    dropping = _State.stream = DroppingStream(_STDERR, note)
    atexit.register(dropping.drain, _LAST_WORDS_S)
    stream = sys.stderr = cast("TextIO", dropping)
    set_level(level)
    structlog.configure(
        processors=[
            _above_threshold,
            structlog.processors.add_log_level,
            stamp,
            explained(explain),
            _or_plain(renderer),
        ],
        # The threshold may change later, and loggers are cached: a processor looks at it.
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )


def _format(name: str) -> tuple[structlog.typing.Processor, structlog.typing.Processor]:
    """How a line is written, and what gives it its time."""
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    if name == "json":
        return structlog.processors.JSONRenderer(), stamp
    colors = os.isatty(_STDERR) and not os.environ.get("NO_COLOR")
    console = structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0)
    if _is_journal(_STDERR):
        return _with_priority(console), _as_it_is
    return console, stamp


def _above_threshold(
    logger: object, name: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Drop what is below the level, and name the disk."""
    if getattr(logging, name.upper(), logging.ERROR) < _State.threshold:
        raise structlog.DropEvent
    if _State.disk:
        event.setdefault("disk", _State.disk)
    return event


def _is_journal(fd: int) -> bool:
    """`fd` is connected to journald (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _as_it_is(
    logger: object, name: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Nothing is added."""
    return event


def _with_priority(console: structlog.dev.ConsoleRenderer) -> structlog.typing.Processor:
    """`console` for journald: a traceback's lines have the priority of their event."""

    def render(logger: object, name: str, event: structlog.typing.EventDict) -> str:
        prefix = f"<{_JOURNAL_PRIORITIES.get(str(event.get('level', name)), 3)}>"
        lines = str(console(logger, name, event)).split("\n")
        return "\n".join(prefix + line for line in lines)

    return render


def explained(explain: Callable[[BridgeError | Remedy], str]) -> structlog.typing.Processor:
    """A processor that turns our errors into text. Those of the keys `problem` and `remedy` become
    part of the event's own sentence."""

    def process(
        logger: object, name: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        for key, value in event.items():
            if isinstance(value, BridgeError | Remedy):
                event[key] = explain(value)
        if problem := event.pop("problem", ""):
            event["event"] = f"{event['event']}: {problem}"
        if remedy := event.pop("remedy", ""):
            event["event"] = f"{event['event']}{remedy}"
        return event

    return process


def _or_plain(renderer: structlog.typing.Processor) -> structlog.typing.Processor:
    """`renderer`, or the event alone when something in it cannot be rendered."""

    def render(
        logger: object, name: str, event: structlog.typing.EventDict
    ) -> structlog.typing.ProcessorReturnValue:
        text = str(event.get("event"))
        try:
            return renderer(logger, name, event)
        except Exception as error:
            return f"{text} (cannot be logged in full: {type(error).__name__})"

    return render


class DroppingStream(io.TextIOBase):
    """A text stream over the descriptor `fd`. `write` returns at once and never raises.

    `note(count)` is written in the place of `count` writes that were dropped.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, fd: int, note: Callable[[int], str]) -> None:
        self._fd = fd
        self._note = note
        self._changed = threading.Condition()
        self._queue: deque[bytes | int] = deque()
        """Lines to write; a number stands for that many dropped lines."""
        self._queued_bytes = 0
        self._writing = False
        self._thread: threading.Thread | None = None
        self._torn = False
        """The last line was written in part."""
        self.dropped_total = 0

    def write(self, text: str) -> int:
        data = text.encode("utf-8", "backslashreplace")
        with self._changed:
            if self._queued_bytes + len(data) > _QUEUE_MAX_BYTES:
                self._count_dropped()
            else:
                self._queue.append(data)
                self._queued_bytes += len(data)
            self._start()
            self._changed.notify_all()
        return len(text)

    def _count_dropped(self) -> None:
        self.dropped_total += 1
        last = self._queue[-1] if self._queue else None
        if isinstance(last, int):
            self._queue[-1] = last + 1
        else:
            self._queue.append(1)

    def _start(self) -> None:
        if self._thread is not None:
            return
        thread = threading.Thread(target=self._run, name="log", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return  # The system has no thread now: the next line tries again.
        self._thread = thread

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def fileno(self) -> int:
        return self._fd

    def drain(self, limit_s: float) -> None:
        """Wait until all lines are written or dropped, for `limit_s` at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._writing, limit_s)

    # The thread.

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        dropped = 0
        while True:
            item = self._next()
            if isinstance(item, int):
                dropped += item
            if dropped and self._put_out(self._note(dropped).encode("utf-8", "backslashreplace")):
                dropped = 0
            if isinstance(item, bytes) and not self._put_out(item):
                dropped += 1
                self.dropped_total += 1

    def _next(self) -> bytes | int:
        with self._changed:
            self._writing = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: bool(self._queue))
            self._writing = True
            item = self._queue.popleft()
            if isinstance(item, bytes):
                self._queued_bytes -= len(item)
            return item

    def _put_out(self, data: bytes) -> bool:
        """Write `data`, however long that takes; False if it cannot be written."""
        rest = b"\n" + data if self._torn else data
        length = len(rest)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._fd, rest) :]
                except BlockingIOError:  # Another process that shares it made it non-blocking.
                    poll = select.poll()
                    poll.register(self._fd, select.POLLOUT)
                    poll.poll()
        except OSError:
            self._torn = self._torn if len(rest) == length else True
            return False
        self._torn = False
        return True
