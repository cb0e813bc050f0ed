"""The client's side of the handshake, without I/O (NBD "Fixed newstyle negotiation").

Theory. A negotiation is a straight line with few branches, so it is written as one: a generator
that yields the number of bytes it needs next and appends what it wants to say to an output
buffer. `Handshake` feeds it: bytes come in with `receive`, go out with `data_to_send`, and
`state` says what the owner has to do:

    TALKING ──▶ WANTS_TLS ──tls_started()──▶ TALKING ──▶ DONE
       └───────────────any error──▶ FAILED (the connection cannot be used again)

One option is outstanding at a time; its replies are collected until the final one. Order: client
flags, STARTTLS, EXTENDED_HEADERS (STRUCTURED_REPLY only if that was refused), SET_META_CONTEXT,
GO with a fall-back to EXPORT_NAME. Nothing of what was negotiated in clear outlives STARTTLS,
and bytes that arrived in clear after its ACK end the connection: an attacker put them there.

Every length that the server names is checked before anything of that length is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from enum import Enum
from struct import Struct

from bridge.errors import BridgeError, ConfigError, ConnectionLost, ProtocolError
from bridge.server.export import Export
from bridge.server.handshake_options import ExportListEntry, Goal, HandshakeOptions
from bridge.server.infos import Infos
from bridge.server.refusals import explained, not_nbd, reason_of, refusal_of, shown_name
from bridge.server.untrusted import bounded, clean, printable
from bridge.server.untrusted import text as text_of
from bridge.spec import nbd as p

_REPLIES_MAX = 256
"""Replies to one option that are believed to be meant seriously (INFO, META_CONTEXT)."""
_EXPORTS_MAX = 10_000
"""Exports that LIST may name."""
_EXPORT_ANSWERS = tuple(f"the answer to {p.OPTION_NAMES[each]}" for each in (p.OPT_GO, p.OPT_INFO))
_Steps = Generator[int, bytes, None]
_WANT_TLS = -1


class State(Enum):
    """See the module's text."""

    TALKING = "talking"
    WANTS_TLS = "wants TLS"
    DONE = "done"
    FAILED = "failed"


class Handshake:
    """One negotiation. `export` (GO, INFO) or `exports` (LIST) hold the result when DONE."""

    def __init__(self, wishes: HandshakeOptions) -> None:
        self.state = State.TALKING
        self.export: Export | None = None
        self.exports: list[ExportListEntry] = []
        self.in_transmission = False
        """The server has gone to the transmission phase: leave with DISC, not with ABORT."""
        self.refused: ConfigError | None = None
        """The server said no to the export, and was asked which it has; it need not answer that."""
        self.silent_over_tls = False
        """TLS is up, and the server has said nothing over it yet."""
        self._wishes = wishes
        self._buffer = bytearray()
        self._output = bytearray()
        self._over_tls = False
        self._no_zeroes = False
        self._structured = False
        self._extended = False
        self._contexts: dict[str, int] = {}
        self._waits_for = "the greeting"
        self._steps = self._negotiate()
        self._needs_bytes = next(self._steps)

    def data_to_send(self) -> bytes:
        """Take the bytes to send."""
        data = bytes(self._output)
        self._output.clear()
        return data

    def receive(self, data: bytes | memoryview) -> None:
        """Take bytes from the server; whatever follows the end of the handshake stays buffered.

        Raises ProtocolError (the server broke a rule), ConfigError (it does not have, or will not
        give, what was asked for), ConnectionLost (it is going down). The output may then hold a
        farewell.
        """
        self._buffer += data
        self.silent_over_tls = False
        self._advance()

    def receive_eof(self) -> BridgeError:
        """The server closed the connection: the error that this is."""
        self.state = State.FAILED
        if self.refused is not None:
            return self.refused
        heard = bytes(self._buffer[:16])
        if self._waits_for == "the greeting" and heard:
            return not_nbd(heard)
        if self._waits_for == "EXPORT_NAME":
            # The only way this option has to say no.
            return ConfigError(f"the server refused {shown_name(self._wishes)} by hanging up")
        return ConnectionLost(f"the server hung up while we waited for {self._waits_for}")

    def tls_started(self) -> None:
        """The TLS handshake is done; go on over it. Only in WANTS_TLS."""
        assert self.state is State.WANTS_TLS
        self._over_tls = self.silent_over_tls = True
        self.state = State.TALKING
        self._needs_bytes = self._steps.send(b"")

    @property
    def waits_for_export(self) -> bool:
        """All but the export itself is agreed on."""
        return self._waits_for in _EXPORT_ANSWERS

    @property
    def waits_for(self) -> str:
        """What the server owes us, for messages about its silence."""
        return self._waits_for

    def trailing_data(self) -> bytes:
        """Bytes that came after the end of the handshake."""
        return bytes(self._buffer)

    def _advance(self) -> None:
        try:
            while self.state is State.TALKING and len(self._buffer) >= self._needs_bytes:
                data = bytes(self._buffer[: self._needs_bytes])
                del self._buffer[: self._needs_bytes]
                self._needs_bytes = self._steps.send(data)
                if self._needs_bytes == _WANT_TLS:
                    if self._buffer:
                        raise ProtocolError(
                            f"{len(self._buffer)} bytes in clear after the server agreed to TLS: "
                            "a third party on the way put them there"
                        )
                    self.state = State.WANTS_TLS
        except StopIteration:
            self.state = State.DONE
        except BridgeError:
            self.state = State.FAILED
            raise

    # The negotiation itself, top to bottom.

    def _negotiate(self) -> _Steps:
        greeting = yield 16
        magic, style = p.GREETING.unpack(greeting)
        if magic != p.NBDMAGIC:
            raise not_nbd(greeting)
        if style == p.OLDSTYLE_MAGIC:
            yield from self._oldstyle()
            return
        if style != p.IHAVEOPT:
            raise ProtocolError(f"unknown kind of NBD handshake: magic {style:#x}")
        (flags,) = p.U16.unpack((yield 2))
        fixed = flags & p.FLAG_FIXED_NEWSTYLE
        self._no_zeroes = bool(flags & p.FLAG_NO_ZEROES)
        self._output += p.U32.pack(flags & (p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES))
        if not fixed:
            yield from self._not_fixed()
            return
        if self._wishes.tls:
            yield from self._starttls()
        if self._wishes.goal is Goal.LIST:
            yield from self._list()
            return
        yield from self._headers()
        yield from self._set_meta_context()
        yield from self._go()

    def _oldstyle(self) -> _Steps:
        self._waits_for = "the export's size"
        size_bytes, flags32 = _OLDSTYLE_REST.unpack((yield _OLDSTYLE_REST.size))
        flags = flags32 & 0xFFFF
        self._refuse_without_options("oldstyle")
        yield p.EXPORT_NAME_PADDING_BYTES
        if self._wishes.export_name:
            raise ConfigError(
                "the server is an oldstyle one and has a single export without a name, not "
                f"{self._wishes.export_name!r}"
            )
        self.in_transmission = True
        self.export = self._checked_export(size_bytes, flags)

    def _not_fixed(self) -> _Steps:
        self._refuse_without_options("not a fixed newstyle one")
        yield from self._export_name()

    def _refuse_without_options(self, style: str) -> None:
        if self._wishes.tls:
            raise ConfigError(f"TLS is required, but the server is {style} and has none")
        if self._wishes.goal is Goal.LIST:
            raise ConfigError(f"the server is {style}: it cannot list its exports")

    def _starttls(self) -> _Steps:
        final, text = yield from self._option(p.OPT_STARTTLS, b"")
        if final != p.REP_ACK:
            self._abort()
            raise ConfigError(
                f"TLS is required, but the server does not do it ({reason_of(final, text)}): use "
                "nbd:// or nbd+unix:// if that is acceptable"
            )
        self._waits_for = "the TLS handshake"
        yield _WANT_TLS

    def _headers(self) -> _Steps:
        """Extended headers first: once they are on, structured replies are refused."""
        if self._wishes.extended:
            final, _ = yield from self._option(p.OPT_EXTENDED_HEADERS, b"")
            self._extended = self._structured = final == p.REP_ACK
            self._check_tls_required(final)
        if self._wishes.structured and not self._extended:
            final, _ = yield from self._option(p.OPT_STRUCTURED_REPLY, b"")
            self._structured = final == p.REP_ACK
            self._check_tls_required(final)

    def _set_meta_context(self) -> _Steps:
        if not (self._structured and self._wishes.block_status):
            return
        name = self._wishes.export_name.encode()
        query = p.BASE_ALLOCATION.encode()
        data = b"".join((p.U32.pack(len(name)), name, p.U32.pack(1), p.U32.pack(len(query)), query))
        contexts: dict[str, int] = {}

        def reply(kind: int, payload: bytes) -> None:
            if kind != p.REP_META_CONTEXT:
                raise ProtocolError(f"server answered SET_META_CONTEXT with reply type {kind}")
            if len(payload) < 4:
                raise ProtocolError(f"metadata context of {len(payload)} bytes: 4 at least")
            contexts[text_of(payload[4:], "metadata context")] = p.U32.unpack_from(payload)[0]

        final, _ = yield from self._option(p.OPT_SET_META_CONTEXT, data, reply)
        self._check_tls_required(final)
        if final == p.REP_ACK:
            # A server may select others than we asked for; we have no use for them.
            self._contexts = {k: v for k, v in contexts.items() if k == p.BASE_ALLOCATION}

    def _go(self) -> _Steps:
        wishes = self._wishes
        option = p.OPT_INFO if wishes.goal is Goal.INFO else p.OPT_GO
        name = wishes.export_name.encode()
        wanted = (p.INFO_NAME, p.INFO_DESCRIPTION, p.INFO_BLOCK_SIZE)
        data = b"".join(
            (p.U32.pack(len(name)), name, p.U16.pack(len(wanted)), *map(p.U16.pack, wanted))
        )
        infos = Infos()
        final, text = yield from self._option(option, data, infos.take)
        if final == p.REP_ACK:
            if infos.export is None:
                raise ProtocolError(f"server acknowledged {p.OPTION_NAMES[option]} without a size")
            self.in_transmission = wishes.goal is Goal.GO
            size_bytes, flags = infos.export
            self.export = self._checked_export(size_bytes, flags, infos)
            if wishes.goal is Goal.INFO:
                self._abort()
            return
        if final == p.REP_ERR_UNSUP and not self._extended:
            yield from self._export_name()
            return
        refusal = refusal_of(self._wishes, final, text)
        if (
            self._wishes.list_if_refused
            and isinstance(refusal, ConfigError)
            and final != p.REP_ERR_TLS_REQD
        ):
            self.refused = refusal
            refusal = yield from self._explained(refusal)
        self._abort()
        raise refusal

    def _explained(self, plain: ConfigError) -> Generator[int, bytes, ConfigError]:
        """A refusal of the export, with what the server's list adds to it."""
        try:
            listed, _ = yield from self._option(
                p.OPT_LIST, b"", self._list_reply, replies_max=_EXPORTS_MAX
            )
        except ProtocolError:
            return plain
        return explained(plain, self._wishes, self.exports if listed == p.REP_ACK else [])

    def _export_name(self) -> _Steps:
        """The old way to choose an export; a refusal is a closed connection."""
        self._send_option(p.OPT_EXPORT_NAME, self._wishes.export_name.encode())
        self._waits_for = "EXPORT_NAME"
        size_bytes, flags = p.EXPORT_INFO.unpack((yield p.EXPORT_INFO.size))
        if not self._no_zeroes:
            yield p.EXPORT_NAME_PADDING_BYTES
        self.in_transmission = True
        self.export = self._checked_export(size_bytes, flags)

    def _list(self) -> _Steps:
        final, text = yield from self._option(
            p.OPT_LIST, b"", self._list_reply, replies_max=_EXPORTS_MAX
        )
        self._abort()
        if final != p.REP_ACK:
            raise refusal_of(self._wishes, final, text)

    def _list_reply(self, kind: int, payload: bytes) -> None:
        if kind != p.REP_SERVER or len(payload) < 4:
            raise ProtocolError(f"server answered LIST with reply type {kind}")
        length = p.U32.unpack_from(payload)[0]
        if length > len(payload) - 4:
            raise ProtocolError(f"name of {length} bytes in a list entry of {len(payload)} bytes")
        name = text_of(payload[4 : 4 + length], "export name")
        description = text_of(payload[4 + length :], "description")
        self.exports.append(ExportListEntry(name, clean(description)))

    # Options.

    def _send_option(self, option: int, data: bytes) -> None:
        self._output += p.OPTION.pack(p.IHAVEOPT, option, len(data)) + data

    def _abort(self) -> None:
        self._send_option(p.OPT_ABORT, b"")

    def _option(
        self,
        option: int,
        data: bytes,
        reply: Callable[[int, bytes], None] | None = None,
        *,
        replies_max: int = _REPLIES_MAX,
    ) -> Generator[int, bytes, tuple[int, str]]:
        """Send an option and collect its replies: the final type and, of an error, its text."""
        self._send_option(option, data)
        name = p.OPTION_NAMES[option]
        self._waits_for = f"the answer to {name}"
        for _ in range(replies_max):
            header = yield p.OPTION_REPLY.size
            magic, echoed, kind, length = p.OPTION_REPLY.unpack(header)
            if magic != p.OPTION_REPLY_MAGIC:
                raise ProtocolError(f"bad magic {magic:#x} in the answer to {name}")
            if echoed != option:
                raise ProtocolError(
                    f"server answered option {echoed}, we had sent {option} ({name})"
                )
            bounded(f"length of the answer to {name}", length, most=p.OPTION_REPLY_MAX_BYTES)
            payload = (yield length) if length else b""
            if kind & p.REP_ERROR_BIT:
                return kind, printable(payload)
            if kind == p.REP_ACK:
                if payload:
                    raise ProtocolError(f"acknowledgement of {name} with {length} bytes in it")
                return kind, ""
            if reply is None:
                raise ProtocolError(f"server answered {name} with reply type {kind}")
            reply(kind, payload)
        raise ProtocolError(f"more than {replies_max} answers to {name}")

    # Checks.

    def _check_tls_required(self, final: int) -> None:
        if final == p.REP_ERR_TLS_REQD:
            self._abort()
            raise refusal_of(self._wishes, final, "")

    def _checked_export(self, size_bytes: int, flags: int, infos: Infos | None = None) -> Export:
        bounded("export's size in bytes", size_bytes, most=p.SIZE_MAX_BYTES)
        if not flags & p.TransmissionFlags.HAS_FLAGS:
            flags = 0
        known = p.TransmissionFlags(flags & 0x1FFF)
        infos = infos or Infos()
        minimum, preferred, maximum = infos.block_sizes or (1, 4096, p.PAYLOAD_DEFAULT_MAX_BYTES)
        export = Export(
            name=self._wishes.export_name,
            size_bytes=size_bytes,
            flags=known,
            description=infos.description,
            canonical_name=infos.name,
            min_block_bytes=minimum,
            preferred_block_bytes=preferred,
            max_payload_bytes=maximum,
            has_block_sizes=infos.block_sizes is not None,
            structured=self._structured,
            extended=self._extended,
            tls=self._over_tls,
            contexts=self._contexts,
        )
        export.check_untrusted()
        return export


_OLDSTYLE_REST = Struct(">QI")
