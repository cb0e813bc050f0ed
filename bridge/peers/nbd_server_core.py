"""The server's side of one NBD connection, without I/O: options, commands, replies.

Theory. `receive` takes bytes and returns the commands that they complete; the owner executes each
and calls `reply`. Option haggling happens inside. `data_to_send` gives what is to be sent, in
order. `state` says what the owner has to do: go on, start TLS, or close.

Every capability is switchable (`ServerSettings`), so that a client can be shown every kind of
server; the rules that this side checks are those of the specification's "server" sentences.

Source: NBD "Option haggling", "Request message", "Structured reply chunk message".
"""

from __future__ import annotations

import errno
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from bridge.errors import ProtocolError
from bridge.peers.nbd_server_disk import ServerDisk
from bridge.spec import nbd as p
from bridge.spec.nbd import TransmissionFlags

_OPTIONS_MAX = 64
_OPTION_DATA_MAX_BYTES = 16 << 10
_WANT_TLS = -1
_CONTEXT_ID = 0x17

DEFAULT_FLAGS = (
    TransmissionFlags.HAS_FLAGS
    | TransmissionFlags.SEND_FLUSH
    | TransmissionFlags.SEND_FUA
    | TransmissionFlags.SEND_TRIM
    | TransmissionFlags.SEND_WRITE_ZEROES
    | TransmissionFlags.SEND_DF
    | TransmissionFlags.CAN_MULTI_CONN
    | TransmissionFlags.SEND_CACHE
    | TransmissionFlags.SEND_FAST_ZERO
)


@dataclass(slots=True)
class ServerSettings:
    """What the server offers and how it answers."""

    flags: TransmissionFlags = DEFAULT_FLAGS
    description: str = ""
    fixed_newstyle: bool = True
    no_zeroes: bool = True
    oldstyle: bool = False
    go: bool = True
    info: bool = True
    list_exports: bool = True
    structured: bool = True
    extended: bool = True
    block_status: bool = True
    tls: bool = False
    tls_required: bool = False
    block_sizes: tuple[int, int, int] | None = None
    """Minimum, preferred, maximum payload."""
    enforce_block_sizes: bool = True
    effect_max_bytes: int = p.LENGTH_32_MAX
    """Longest TRIM, WRITE_ZEROES, CACHE that is not refused with EINVAL."""
    read_chunk_bytes: int = 0
    """Answer structured reads in chunks of this size, last one first; 0 = in one piece."""
    holes: bool = False
    """Answer zeroes in a structured read with hole chunks."""
    refuse: dict[int, int] = field(default_factory=dict)
    """Option → error reply type: refuse these options."""


class ServerState(Enum):
    """See the module's text."""

    OPTIONS = "options"
    WANTS_TLS = "wants TLS"
    TRANSMISSION = "transmission"
    CLOSED = "closed"


class Command:
    """One command of the client. `payload` is what a WRITE brought."""

    __slots__ = ("cookie", "error", "flags", "kind", "length", "offset", "payload")

    def __init__(self, kind: int, flags: int, cookie: int, offset: int, length: int) -> None:
        self.kind = kind
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.payload = b""
        self.error = 0


class ServerCore:
    """One connection. See the module's text."""

    def __init__(self, exports: Mapping[str, ServerDisk], settings: ServerSettings) -> None:
        self.state = ServerState.OPTIONS
        self.disk: ServerDisk | None = None
        self.commands_total = 0
        self._exports = exports
        self._settings = settings
        self._buffer = bytearray()
        self._output: list[bytes] = []
        self._over_tls = False
        self._no_zeroes = False
        self._structured = False
        self._extended = False
        self._context: str | None = None
        self._context_export = ""
        self._commands: list[Command] = []
        self._steps = self._talk()
        self._needs_bytes = next(self._steps)

    def data_to_send(self) -> bytes:
        """Take what is to be sent."""
        data = b"".join(self._output)
        self._output.clear()
        return data

    def receive(self, data: bytes | memoryview) -> list[Command]:
        """Bytes from the client: the commands that they complete, to be answered by `reply`.

        Raises ProtocolError when the client broke a rule that leaves no way to go on.
        """
        self._buffer += data
        self._advance()
        commands, self._commands = self._commands, []
        return commands

    def tls_started(self) -> None:
        """The TLS handshake is done; what was agreed on in clear is void."""
        assert self.state is ServerState.WANTS_TLS
        self._over_tls = True
        self._structured = self._extended = False
        self._context = None
        self.state = ServerState.OPTIONS
        self._needs_bytes = self._steps.send(b"")

    def _advance(self) -> None:
        position = 0
        buffer = self._buffer
        try:
            while self.state in (ServerState.OPTIONS, ServerState.TRANSMISSION):
                stop = position + self._needs_bytes
                if stop > len(buffer):
                    break
                data = bytes(buffer[position:stop])
                position = stop
                self._needs_bytes = self._steps.send(data)
                if self._needs_bytes == _WANT_TLS:
                    if len(buffer) > position:
                        raise ProtocolError("client sent bytes in clear after STARTTLS")
                    self.state = ServerState.WANTS_TLS
        except StopIteration:
            self.state = ServerState.CLOSED
        except ProtocolError:
            self.state = ServerState.CLOSED
            raise
        del buffer[:position]

    # The talk itself, top to bottom.

    def _talk(self) -> Generator[int, bytes, None]:
        settings = self._settings
        if settings.oldstyle:
            self._open("")
            assert self.disk is not None
            self._output.append(
                p.GREETING.pack(p.NBDMAGIC, p.OLDSTYLE_MAGIC)
                + p.U64.pack(self.disk.size_bytes)
                + p.U32.pack(settings.flags)
                + bytes(p.EXPORT_NAME_PADDING_BYTES)
            )
        else:
            flags = p.FLAG_FIXED_NEWSTYLE if settings.fixed_newstyle else 0
            flags |= p.FLAG_NO_ZEROES if settings.no_zeroes else 0
            self._output.append(p.GREETING.pack(p.NBDMAGIC, p.IHAVEOPT) + p.U16.pack(flags))
            (client_flags,) = p.U32.unpack((yield 4))
            if client_flags & ~flags:
                raise ProtocolError(f"client flags {client_flags:#x}, we offered {flags:#x}")
            self._no_zeroes = bool(client_flags & p.FLAG_NO_ZEROES)
            if not (yield from self._options()):
                return
        self.state = ServerState.TRANSMISSION
        yield from self._transmission()

    def _options(self) -> Generator[int, bytes, bool]:
        """Haggle until an export is chosen; False if the client leaves."""
        for _ in range(_OPTIONS_MAX):
            magic, option, length = p.OPTION.unpack((yield p.OPTION.size))
            if magic != p.IHAVEOPT or length > _OPTION_DATA_MAX_BYTES:
                raise ProtocolError(f"bad option: magic {magic:#x}, {length} bytes")
            data = (yield length) if length else b""
            if option == p.OPT_ABORT:
                self._answer(option, p.REP_ACK)
                return False
            if option == p.OPT_EXPORT_NAME:
                return self._export_name(data)
            if option == p.OPT_STARTTLS and self._settings.tls and not self._over_tls:
                self._answer(option, p.REP_ACK)
                yield _WANT_TLS
            elif self._option(option, data):
                return True
        raise ProtocolError(f"more than {_OPTIONS_MAX} options")

    def _option(self, option: int, data: bytes) -> bool:
        """Answer one option; True if it starts the transmission."""
        settings = self._settings
        refusal = settings.refuse.get(option)
        if refusal is not None:
            self._answer(option, refusal, b"refused by settings")
        elif settings.tls_required and not self._over_tls:
            self._answer(option, p.REP_ERR_TLS_REQD)
        elif option == p.OPT_STRUCTURED_REPLY and settings.structured and not self._extended:
            self._structured = True
            self._answer(option, p.REP_ACK)
        elif option == p.OPT_STRUCTURED_REPLY and self._extended:
            self._answer(option, p.REP_ERR_EXT_HEADER_REQD)
        elif option == p.OPT_EXTENDED_HEADERS and settings.extended:
            self._structured = self._extended = True
            self._answer(option, p.REP_ACK)
        elif option == p.OPT_LIST and settings.list_exports:
            self._list()
        elif option == p.OPT_SET_META_CONTEXT and settings.block_status and self._structured:
            self._set_meta_context(data)
        elif (option == p.OPT_GO and settings.go) or (option == p.OPT_INFO and settings.info):
            return self._go(option, data)
        else:
            self._answer(option, p.REP_ERR_UNSUP)
        return False

    def _answer(self, option: int, kind: int, data: bytes = b"") -> None:
        self._output.append(p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, option, kind, len(data)))
        self._output.append(data)

    def _open(self, name: str) -> ServerDisk | None:
        self.disk = self._exports.get(name)
        return self.disk

    def _export_name(self, data: bytes) -> bool:
        disk = self._open(data.decode("utf-8", "replace"))
        if disk is None or (self._settings.tls_required and not self._over_tls) or self._extended:
            return False
        self._output.append(p.EXPORT_INFO.pack(disk.size_bytes, self._settings.flags))
        if not self._no_zeroes:
            self._output.append(bytes(p.EXPORT_NAME_PADDING_BYTES))
        return True

    def _list(self) -> None:
        for name in self._exports:
            encoded = name.encode()
            self._answer(
                p.OPT_LIST,
                p.REP_SERVER,
                p.U32.pack(len(encoded)) + encoded + self._settings.description.encode(),
            )
        self._answer(p.OPT_LIST, p.REP_ACK)

    def _set_meta_context(self, data: bytes) -> None:
        option = p.OPT_SET_META_CONTEXT
        self._context = None
        parsed = _parse_meta_context(data)
        if parsed is None:
            self._answer(option, p.REP_ERR_INVALID)
            return
        name, queries = parsed
        if name not in self._exports:
            self._answer(option, p.REP_ERR_UNKNOWN)
            return
        if p.BASE_ALLOCATION in queries:
            self._context, self._context_export = p.BASE_ALLOCATION, name
            self._answer(
                option, p.REP_META_CONTEXT, p.U32.pack(_CONTEXT_ID) + p.BASE_ALLOCATION.encode()
            )
        self._answer(option, p.REP_ACK)

    def _go(self, option: int, data: bytes) -> bool:
        settings = self._settings
        parsed = _parse_go(data)
        if parsed is None:
            self._answer(option, p.REP_ERR_INVALID)
            return False
        name, wanted = parsed
        disk = self._exports.get(name)
        if disk is None:
            self._answer(option, p.REP_ERR_UNKNOWN, f"no export named {name!r}".encode())
            return False
        infos = [p.U16.pack(p.INFO_EXPORT) + p.EXPORT_INFO.pack(disk.size_bytes, settings.flags)]
        if p.INFO_NAME in wanted:
            infos.append(p.U16.pack(p.INFO_NAME) + name.encode())
        if p.INFO_DESCRIPTION in wanted and settings.description:
            infos.append(p.U16.pack(p.INFO_DESCRIPTION) + settings.description.encode())
        if p.INFO_BLOCK_SIZE in wanted and settings.block_sizes:
            infos.append(
                p.U16.pack(p.INFO_BLOCK_SIZE) + p.BLOCK_SIZE_INFO.pack(*settings.block_sizes)
            )
        for info in infos:
            self._answer(option, p.REP_INFO, info)
        self._answer(option, p.REP_ACK)
        if option == p.OPT_INFO:
            return False
        if self._context_export != name:
            self._context = None
        self._open(name)
        return True

    # Commands.

    def _transmission(self) -> Generator[int, bytes, None]:
        layout = p.EXTENDED_REQUEST if self._extended else p.REQUEST
        wanted = p.EXTENDED_REQUEST_MAGIC if self._extended else p.REQUEST_MAGIC
        payload_max = self._payload_max_bytes
        while True:
            magic, flags, kind, cookie, offset, length = layout.unpack((yield layout.size))
            if magic != wanted:
                raise ProtocolError(f"bad magic {magic:#x} in a request")
            if kind == p.CMD_DISC:
                return
            command = Command(kind, flags, cookie, offset, length)
            self.commands_total += 1
            if kind == p.CMD_WRITE:
                if length > payload_max:
                    raise ProtocolError(f"write of {length} bytes: at most {payload_max}")
                command.payload = (yield length) if length else b""
            command.error = self._refusal(command)
            self._commands.append(command)

    @property
    def _payload_max_bytes(self) -> int:
        sizes = self._settings.block_sizes
        return min(sizes[2], 64 << 20) if sizes else p.PAYLOAD_DEFAULT_MAX_BYTES

    def _refusal(self, command: Command) -> int:
        """The errno of a command that breaks a rule, 0 for a good one."""
        settings = self._settings
        flags = settings.flags
        kind = command.kind
        assert self.disk is not None
        needed = _NEEDS.get(kind)
        if needed is None or (needed and not flags & needed):
            return errno.EINVAL
        if kind in _WRITES and flags & TransmissionFlags.READ_ONLY:
            return errno.EPERM
        if command.flags & p.CMD_FLAG_FUA and not flags & TransmissionFlags.SEND_FUA:
            return errno.EINVAL
        if command.flags & ~_FLAGS_ALLOWED[kind]:
            return errno.EINVAL
        if kind == p.CMD_FLUSH:
            return errno.EINVAL if command.offset or command.length else 0
        if not command.length:
            return errno.EINVAL
        if command.offset + command.length > self.disk.size_bytes:
            return errno.ENOSPC if kind in (p.CMD_WRITE, p.CMD_WRITE_ZEROES) else errno.EINVAL
        if kind == p.CMD_READ and command.length > self._payload_max_bytes:
            return errno.EOVERFLOW
        if kind in _EFFECTS and command.length > settings.effect_max_bytes:
            return errno.EINVAL
        if kind == p.CMD_BLOCK_STATUS and self._context is None:
            return errno.EINVAL
        if settings.block_sizes and settings.enforce_block_sizes:
            return (
                errno.EINVAL if (command.offset | command.length) % settings.block_sizes[0] else 0
            )
        return 0

    def reply(self, command: Command, error: int, data: bytes | memoryview = b"") -> None:
        """Answer `command`: with an errno, or with the data of a READ."""
        if command.kind == p.CMD_READ and not error:
            self._reply_data(command, data)
        elif self._extended or (self._structured and (error or command.kind == p.CMD_READ)):
            wire = p.ERROR_OF_ERRNO.get(error, 5)
            if error:
                text = b"refused"
                payload = p.U32.pack(wire) + p.U16.pack(len(text)) + text
                self._chunk(command, p.REPLY_FLAG_DONE, p.REPLY_TYPE_ERROR, payload)
            else:
                self._chunk(command, p.REPLY_FLAG_DONE, p.REPLY_TYPE_NONE, b"")
        else:
            wire = p.ERROR_OF_ERRNO.get(error, 5) if error else 0
            self._output.append(p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, wire, command.cookie))

    def reply_extents(self, command: Command, extents: list[tuple[int, int]]) -> None:
        """Answer a BLOCK_STATUS."""
        if command.flags & p.CMD_FLAG_REQ_ONE:
            extents = extents[:1]
        if self._extended:
            payload = p.U32.pack(_CONTEXT_ID) + p.U32.pack(len(extents))
            payload += b"".join(p.U64.pack(length) + p.U64.pack(f) for length, f in extents)
            kind = p.REPLY_TYPE_BLOCK_STATUS_EXT
        else:
            payload = p.U32.pack(_CONTEXT_ID)
            payload += b"".join(p.U32.pack(length) + p.U32.pack(f) for length, f in extents)
            kind = p.REPLY_TYPE_BLOCK_STATUS
        self._chunk(command, p.REPLY_FLAG_DONE, kind, payload)

    def _reply_data(self, command: Command, data: bytes | memoryview) -> None:
        if not self._structured:
            self._output.append(p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, command.cookie))
            self._output.append(bytes(data))
            return
        size = self._settings.read_chunk_bytes
        if command.flags & p.CMD_FLAG_DF or not size:
            size = len(data)
        starts = list(range(0, len(data), size))
        for start in reversed(starts):
            piece = bytes(data[start : start + size])
            done = p.REPLY_FLAG_DONE if start == starts[0] else 0
            offset = command.offset + start
            if self._settings.holes and not any(piece):
                payload = p.U64.pack(offset) + p.U32.pack(len(piece))
                self._chunk(command, done, p.REPLY_TYPE_OFFSET_HOLE, payload)
            else:
                payload = p.U64.pack(offset) + piece
                self._chunk(command, done, p.REPLY_TYPE_OFFSET_DATA, payload)

    def _chunk(self, command: Command, flags: int, kind: int, payload: bytes) -> None:
        if self._extended:
            header = p.EXTENDED_CHUNK.pack(
                p.EXTENDED_REPLY_MAGIC, flags, kind, command.cookie, command.offset, len(payload)
            )
        else:
            header = p.CHUNK.pack(
                p.STRUCTURED_REPLY_MAGIC, flags, kind, command.cookie, len(payload)
            )
        self._output += (header, payload)


_NEEDS = {
    p.CMD_READ: 0,
    p.CMD_WRITE: 0,
    p.CMD_FLUSH: TransmissionFlags.SEND_FLUSH,
    p.CMD_TRIM: TransmissionFlags.SEND_TRIM,
    p.CMD_CACHE: TransmissionFlags.SEND_CACHE,
    p.CMD_WRITE_ZEROES: TransmissionFlags.SEND_WRITE_ZEROES,
    p.CMD_BLOCK_STATUS: 0,
}
_WRITES = (p.CMD_WRITE, p.CMD_TRIM, p.CMD_WRITE_ZEROES)
_EFFECTS = (p.CMD_TRIM, p.CMD_CACHE, p.CMD_WRITE_ZEROES)
_FLAGS_ALLOWED = {
    p.CMD_READ: p.CMD_FLAG_DF,
    p.CMD_WRITE: p.CMD_FLAG_FUA | p.CMD_FLAG_PAYLOAD_LEN,
    p.CMD_FLUSH: 0,
    p.CMD_TRIM: p.CMD_FLAG_FUA,
    p.CMD_CACHE: 0,
    p.CMD_WRITE_ZEROES: p.CMD_FLAG_FUA | p.CMD_FLAG_NO_HOLE | p.CMD_FLAG_FAST_ZERO,
    p.CMD_BLOCK_STATUS: p.CMD_FLAG_REQ_ONE,
}


def _parse_go(data: bytes) -> tuple[str, list[int]] | None:
    name, rest = _take_string(data)
    if name is None or len(rest) < 2:
        return None
    (n_wanted,) = p.U16.unpack_from(rest)
    if len(rest) != 2 + 2 * n_wanted:
        return None
    return name, [wanted for (wanted,) in p.U16.iter_unpack(rest[2:])]


def _parse_meta_context(data: bytes) -> tuple[str, list[str]] | None:
    name, rest = _take_string(data)
    if name is None or len(rest) < 4:
        return None
    (n_queries,) = p.U32.unpack_from(rest)
    rest = rest[4:]
    queries: list[str] = []
    for _ in range(min(n_queries, 64)):
        query, rest = _take_string(rest)
        if query is None:
            return None
        queries.append(query)
    return name, queries


def _take_string(data: bytes) -> tuple[str | None, bytes]:
    if len(data) < 4:
        return None, b""
    (length,) = p.U32.unpack_from(data)
    if length > len(data) - 4:
        return None, b""
    return data[4 : 4 + length].decode("utf-8", "replace"), data[4 + length :]
