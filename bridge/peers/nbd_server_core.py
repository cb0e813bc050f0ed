"""The server's side of one NBD connection, without I/O: options, commands, replies.

Theory. `receive` takes bytes and returns the commands that they complete; the owner executes each
and calls `reply`. Option haggling happens inside. `data_to_send` gives the bytes to send, in
order. `state` says what the owner has to do: go on, start TLS, or close.

`nbd_server_settings` says what is offered, `nbd_server_rules` which commands are refused: the rules
that this side checks are those of the specification's "server" sentences.

Source: NBD "Option haggling", "Request message", "Structured reply chunk message".
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from enum import Enum

from bridge.errors import ProtocolError
from bridge.peers.nbd_server_disk import ServerDisk
from bridge.peers.nbd_server_options import go_of, meta_context_query_of
from bridge.peers.nbd_server_rules import Command, refusal_of
from bridge.peers.nbd_server_settings import ServerSettings
from bridge.spec import nbd as p

_OPTIONS_MAX = 64
_OPTION_DATA_MAX_BYTES = 16 << 10
_WANT_TLS = -1
_CONTEXT_ID = 0x17


class ServerState(Enum):
    """See the module's text."""

    OPTIONS = "options"
    WANTS_TLS = "wants TLS"
    TRANSMISSION = "transmission"
    CLOSED = "closed"


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
        """Take the bytes to send."""
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
        parsed = meta_context_query_of(data)
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
        parsed = go_of(data)
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
        assert self.disk is not None
        payload_max = self._settings.payload_max_bytes
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
            command.error = refusal_of(
                command, self._settings, self.disk.size_bytes, has_context=self._context is not None
            )
            self._commands.append(command)

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
