"""The option phase, without sockets, by the rules of docs/rules/nbd.md."""

from __future__ import annotations

import re
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.cli.wording import explain
from bridge.errors import BridgeError, ConfigError, ConnectionLost, ProtocolError
from bridge.peers.nbd_server_core import ServerCore, ServerState
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.peers.nbd_server_settings import ServerSettings
from bridge.server.export import Export
from bridge.server.handshake import Handshake, State
from bridge.server.handshake_options import Goal, HandshakeOptions
from bridge.spec import nbd as p
from bridge.spec.nbd import TransmissionFlags

PLAIN = HandshakeOptions(structured=False, extended=False, block_status=False)


def greeting(flags: int = 3) -> bytes:
    return p.GREETING.pack(p.NBDMAGIC, p.IHAVEOPT) + p.U16.pack(flags)


def reply(option: int, kind: int, data: bytes = b"", *, magic: int = p.OPTION_REPLY_MAGIC) -> bytes:
    return p.OPTION_REPLY.pack(magic, option, kind, len(data)) + data


def info(kind: int, body: bytes, option: int = p.OPT_GO) -> bytes:
    return reply(option, p.REP_INFO, p.U16.pack(kind) + body)


EXPORT = info(p.INFO_EXPORT, p.EXPORT_INFO.pack(1 << 20, TransmissionFlags.HAS_FLAGS))
ACK = reply(p.OPT_GO, p.REP_ACK)


def talk(*pieces: bytes, wishes: HandshakeOptions = PLAIN) -> Handshake:
    """Feed a client what a server says."""
    handshake = Handshake(wishes)
    for piece in pieces:
        handshake.receive(piece)
    return handshake


def options_sent(data: bytes) -> list[int]:
    """The options in what a client sent after its flags."""
    found = []
    position = 4
    while position < len(data):
        magic, option, length = p.OPTION.unpack_from(data, position)
        assert magic == p.IHAVEOPT
        found.append(option)
        position += p.OPTION.size + length
    return found


def negotiate(
    settings: ServerSettings, wishes: HandshakeOptions, names: tuple[str, ...] = ("",)
) -> tuple[Handshake, ServerCore]:
    """A client and our server core, wire to wire."""
    server = ServerCore({name: MemoryDisk(1 << 20) for name in names}, settings)
    client = Handshake(wishes)
    for _ in range(40):
        to_client = server.data_to_send()
        if to_client:
            client.receive(to_client)
        to_server = client.data_to_send()
        if to_server:
            server.receive(to_server)
        if client.state is State.WANTS_TLS and server.state is ServerState.WANTS_TLS:
            client.tls_started()
            server.tls_started()
        elif not to_client and not to_server:
            break
    if client.state is State.TALKING and server.state is ServerState.CLOSED:
        raise client.receive_eof()
    return client, server


def test_go_with_everything_yields_the_export() -> None:
    settings = ServerSettings(description="a disk", block_sizes=(512, 4096, 1 << 20))
    client, server = negotiate(settings, HandshakeOptions())
    assert client.export == Export(
        name="",
        size_bytes=1 << 20,
        flags=settings.flags,
        description="a disk",
        canonical_name="",
        min_block_bytes=512,
        preferred_block_bytes=4096,
        max_payload_bytes=1 << 20,
        has_block_sizes=True,
        structured=True,
        extended=True,
        contexts=client.export.contexts,
    )
    assert list(client.export.contexts) == ["base:allocation"]
    assert server.state is ServerState.TRANSMISSION


@pytest.mark.parametrize("go", [True, False])
@pytest.mark.parametrize("no_zeroes", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("structured", [True, False])
def test_every_downgrade_ends_in_transmission(
    go: bool, no_zeroes: bool, fixed: bool, structured: bool
) -> None:
    settings = ServerSettings(
        go=go,
        info=go,
        no_zeroes=no_zeroes,
        fixed_newstyle=fixed,
        structured=structured,
        extended=False,
    )
    client, server = negotiate(settings, HandshakeOptions())
    assert client.state is State.DONE
    assert server.state is ServerState.TRANSMISSION
    assert client.export is not None
    assert client.export.size_bytes == 1 << 20
    assert client.export.structured == (structured and fixed)


def test_oldstyle_server_is_understood() -> None:
    client, _server = negotiate(ServerSettings(oldstyle=True), HandshakeOptions())
    assert client.export is not None
    assert client.export.size_bytes == 1 << 20
    assert client.export.can_flush
    with pytest.raises(ConfigError, match="oldstyle"):
        negotiate(ServerSettings(oldstyle=True), HandshakeOptions(export_name="x"))


@given(st.data())
def test_handshake_split_anywhere_equals_whole(data: st.DataObject) -> None:
    stream = greeting() + info(p.INFO_DESCRIPTION, b"d") + EXPORT + ACK
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert talk(*pieces).export == talk(stream).export


def test_list_names_every_export() -> None:
    client, _ = negotiate(
        ServerSettings(description="x"), HandshakeOptions(goal=Goal.LIST), ("a", "b c", "ü")
    )
    assert [(each.name, each.description) for each in client.exports] == [
        ("a", "x"),
        ("b c", "x"),
        ("ü", "x"),
    ]


def test_list_refused_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="does not list"):
        negotiate(ServerSettings(list_exports=False), HandshakeOptions(goal=Goal.LIST))


def test_info_leaves_with_abort_and_falls_back_without_it() -> None:
    client, server = negotiate(ServerSettings(), HandshakeOptions(goal=Goal.INFO))
    assert client.export is not None
    assert not client.in_transmission
    assert server.state is ServerState.CLOSED
    client, _ = negotiate(
        ServerSettings(info=False, extended=False), HandshakeOptions(goal=Goal.INFO)
    )
    assert client.export is not None
    assert client.in_transmission  # by EXPORT_NAME: to be left with DISC


# The rules.


def test_option_turns_one_option_at_a_time() -> None:
    client = Handshake(HandshakeOptions())
    client.receive(greeting())
    assert options_sent(client.data_to_send()) == [p.OPT_EXTENDED_HEADERS]
    client.receive(reply(p.OPT_EXTENDED_HEADERS, p.REP_ERR_UNSUP)[:-1])
    assert client.data_to_send() == b""


def test_option_turns_list_waits_for_the_final_reply() -> None:
    client = talk(greeting(), wishes=HandshakeOptions(goal=Goal.LIST))
    client.receive(reply(p.OPT_LIST, p.REP_SERVER, p.U32.pack(1) + b"a"))
    assert client.state is State.TALKING
    client.receive(reply(p.OPT_LIST, p.REP_ACK))
    assert client.state is State.DONE


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (reply(p.OPT_GO, p.REP_ACK, magic=1), "bad magic 0x1"),
        (reply(p.OPT_LIST, p.REP_ACK), "answered option 3, we had sent 7"),
        (ACK, "without a size"),
        (reply(p.OPT_GO, p.REP_SERVER, b"1234"), "reply type 2"),
        (reply(p.OPT_GO, p.REP_INFO, b"1"), "reply type 3, 1 bytes"),
    ],
)
def test_option_replies_wrong_reply_ends_the_handshake(bad: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        talk(greeting(), bad)


def test_option_replies_infos_in_any_order_unknown_and_twice_are_fine() -> None:
    client = talk(
        greeting(),
        info(999, b"?"),
        info(p.INFO_DESCRIPTION, b"x"),
        EXPORT,
        EXPORT,
        info(p.INFO_NAME, b"real"),
        ACK,
    )
    assert client.export is not None
    assert (client.export.description, client.export.canonical_name) == ("x", "real")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (info(p.INFO_EXPORT, bytes(11)), "INFO_EXPORT of 11 bytes"),
        (info(p.INFO_BLOCK_SIZE, bytes(13)), "INFO_BLOCK_SIZE of 13 bytes"),
        (info(p.INFO_DESCRIPTION, b"x" * 4097), "at most 4096"),
        (info(p.INFO_NAME, b"a\0b"), "NUL"),
        (p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, p.OPT_GO, p.REP_INFO, 0xFFFFFFFF), "4294967295"),
        (reply(p.OPT_GO, p.REP_ACK, b"x"), "with 1 bytes in it"),
    ],
)
def test_option_lengths_wrong_length_is_refused_before_anything_is_kept(
    bad: bytes, says: str
) -> None:
    with pytest.raises(ProtocolError, match=says):
        talk(greeting(), bad)


def test_option_lengths_endless_replies_are_refused() -> None:
    client = talk(greeting())
    client.receive(EXPORT * 255)
    with pytest.raises(ProtocolError, match="more than 256"):
        client.receive(EXPORT)


def test_go_unsupported_falls_back_to_export_name() -> None:
    client = talk(
        greeting(), reply(p.OPT_GO, p.REP_ERR_UNSUP), wishes=replace(PLAIN, export_name="x")
    )
    assert options_sent(client.data_to_send()) == [p.OPT_GO, p.OPT_EXPORT_NAME]


def test_go_asks_for_block_sizes_at_once() -> None:
    """So that BLOCK_SIZE_REQD cannot come; if it does, it is a refusal."""
    client = talk(greeting())
    assert struct.pack(">H", p.INFO_BLOCK_SIZE) == client.data_to_send()[-2:]
    with pytest.raises(ConfigError, match="block size"):
        client.receive(reply(p.OPT_GO, p.REP_ERR_BLOCK_SIZE_REQD))


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (p.REP_ERR_TLS_REQD, ConfigError, "requires TLS: use the scheme nbds"),
        (p.REP_ERR_SHUTDOWN, ConnectionLost, "shutting down"),
        (p.REP_ERR_UNKNOWN, ConfigError, "unknown export: nope"),
        (p.REP_ERR_POLICY, ConfigError, "policy"),
        (p.REP_ERROR_BIT | 77, ConfigError, "error 77"),
    ],
)
def test_go_refusal_is_named_and_left_with_abort(
    error: int, kind: type[BridgeError], says: str
) -> None:
    client = talk(greeting())
    with pytest.raises(kind, match=says):
        client.receive(reply(p.OPT_GO, error, b"nope\x1b[31m"))
    assert options_sent(client.data_to_send()) == [p.OPT_GO, p.OPT_ABORT]
    assert client.state is State.FAILED


def test_padding_no_padding_after_go_even_without_no_zeroes() -> None:
    client = talk(greeting(p.FLAG_FIXED_NEWSTYLE), EXPORT, ACK, b"rest")
    assert client.state is State.DONE
    assert client.trailing_data() == b"rest"


@pytest.mark.parametrize("no_zeroes", [True, False])
def test_padding_after_export_name_depends_on_no_zeroes(no_zeroes: bool) -> None:
    client = talk(greeting(1 | 2 * no_zeroes), reply(p.OPT_GO, p.REP_ERR_UNSUP))
    client.receive(p.EXPORT_INFO.pack(512, 1))
    assert (client.state is State.DONE) == no_zeroes
    if not no_zeroes:
        client.receive(bytes(124))
        assert client.state is State.DONE


def test_abort_client_flags_are_only_those_offered() -> None:
    for flags in range(4):
        client = talk(greeting(flags))
        assert client.data_to_send()[:4] == p.U32.pack(flags)
    assert talk(greeting(0xFFFF)).data_to_send()[:4] == p.U32.pack(3)


def test_abort_server_hanging_up_is_explained() -> None:
    client = talk(greeting(), reply(p.OPT_GO, p.REP_ERR_UNSUP))
    assert isinstance(client.receive_eof(), ConfigError)  # EXPORT_NAME's only way to say no
    assert "the greeting" in str(Handshake(PLAIN).receive_eof())


def test_starttls_comes_first_and_resets_everything() -> None:
    client, _server = negotiate(ServerSettings(tls=True), HandshakeOptions(tls=True))
    assert client.export is not None
    assert client.export.tls
    assert client.export.extended


def test_starttls_tls_refused_ends_it() -> None:
    with pytest.raises(ConfigError, match="TLS is required, but the server does not do it"):
        negotiate(ServerSettings(tls=False), HandshakeOptions(tls=True))
    with pytest.raises(ConfigError, match="TLS is required, but"):
        negotiate(ServerSettings(fixed_newstyle=False), HandshakeOptions(tls=True))
    with pytest.raises(ConfigError, match="TLS is required, but"):
        negotiate(ServerSettings(oldstyle=True), HandshakeOptions(tls=True))


def test_starttls_plaintext_after_the_tls_ack_is_an_attack() -> None:
    """The CVE-2021-3716 family: bytes that an attacker put behind the ACK must not be believed."""
    injected = reply(p.OPT_STRUCTURED_REPLY, p.REP_ACK)
    with pytest.raises(ProtocolError, match="bytes in clear"):
        talk(
            greeting() + reply(p.OPT_STARTTLS, p.REP_ACK) + injected,
            wishes=HandshakeOptions(tls=True),
        )


def test_starttls_server_requiring_tls_is_named_whichever_option_meets_it_first() -> None:
    for wishes in (
        HandshakeOptions(),
        HandshakeOptions(extended=False),
        PLAIN,
        HandshakeOptions(goal=Goal.INFO),
    ):
        with pytest.raises(ConfigError, match="requires TLS"):
            negotiate(ServerSettings(tls_required=True, tls=True), wishes)


def test_headers_structured_replies_only_when_extended_headers_are_refused() -> None:
    client = talk(
        greeting(),
        reply(p.OPT_EXTENDED_HEADERS, p.REP_ACK),
        reply(p.OPT_SET_META_CONTEXT, p.REP_ACK),
        wishes=HandshakeOptions(),
    )
    assert options_sent(client.data_to_send()) == [
        p.OPT_EXTENDED_HEADERS,
        p.OPT_SET_META_CONTEXT,
        p.OPT_GO,
    ]
    client = talk(
        greeting(),
        reply(p.OPT_EXTENDED_HEADERS, p.REP_ERR_UNSUP),
        reply(p.OPT_STRUCTURED_REPLY, p.REP_ERR_UNSUP),
        wishes=HandshakeOptions(),
    )
    assert options_sent(client.data_to_send()) == [
        p.OPT_EXTENDED_HEADERS,
        p.OPT_STRUCTURED_REPLY,
        p.OPT_GO,
    ]


def test_headers_no_export_name_after_extended_headers() -> None:
    client = talk(
        greeting(), reply(p.OPT_EXTENDED_HEADERS, p.REP_ACK), wishes=replace(PLAIN, extended=True)
    )
    with pytest.raises(ConfigError):
        client.receive(reply(p.OPT_GO, p.REP_ERR_UNSUP))


def test_contexts_context_is_asked_for_the_same_export_after_structured_replies() -> None:
    client = talk(
        greeting(),
        reply(p.OPT_STRUCTURED_REPLY, p.REP_ACK),
        wishes=HandshakeOptions(export_name="vol", extended=False),
    )
    sent = client.data_to_send()
    assert options_sent(sent) == [p.OPT_STRUCTURED_REPLY, p.OPT_SET_META_CONTEXT]
    assert sent.endswith(
        p.U32.pack(3) + b"vol" + p.U32.pack(1) + p.U32.pack(15) + b"base:allocation"
    )


@pytest.mark.parametrize("final", [p.REP_ACK, p.REP_ERR_UNSUP, p.REP_ERR_INVALID])
def test_contexts_no_or_foreign_contexts_mean_no_block_status(final: int) -> None:
    option = p.OPT_SET_META_CONTEXT
    client = talk(
        greeting(),
        reply(p.OPT_STRUCTURED_REPLY, p.REP_ACK),
        reply(option, p.REP_META_CONTEXT, p.U32.pack(1) + b"qemu:dirty"),
        reply(option, final),
        EXPORT,
        ACK,
        wishes=HandshakeOptions(extended=False),
    )
    assert client.export is not None
    assert client.export.contexts == {}


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad", b"SSH-2.0-OpenSSH_", bytes(16)])
def test_greeting_of_something_else_is_named(says: bytes) -> None:
    with pytest.raises(ProtocolError, match="not an NBD server"):
        talk(says)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((3, 4096, 1 << 20), "not a power of two"),
        ((0, 4096, 1 << 20), "not a power of two"),
        ((1 << 17, 1 << 17, 1 << 20), "not a power of two up to 65536"),
        ((4096, 4096, 512), "below the minimum"),
        ((1, 4096, 0), "below the minimum"),
        ((1, 4096, 1), "less than 512"),
    ],
)
def test_block_sizes_bad_block_sizes_are_a_violation(
    sizes: tuple[int, int, int], says: str
) -> None:
    with pytest.raises(ProtocolError, match=says):
        talk(greeting(), info(p.INFO_BLOCK_SIZE, p.BLOCK_SIZE_INFO.pack(*sizes)))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 4096, 0xFFFFFFFF), (1, 4096, 32 << 20)),
        ((512, 7, 1 << 20), (512, 4096, 1 << 20)),
        ((4096, 4096, 10_000), (4096, 4096, 8192)),
        ((1, 4096, 1 << 30), (1, 4096, 32 << 20)),
    ],
)
def test_block_sizes_are_bounded(
    sizes: tuple[int, int, int], expected: tuple[int, int, int]
) -> None:
    client = talk(greeting(), EXPORT, info(p.INFO_BLOCK_SIZE, p.BLOCK_SIZE_INFO.pack(*sizes)), ACK)
    export = client.export
    assert export is not None
    found = (export.min_block_bytes, export.preferred_block_bytes, export.max_payload_bytes)
    assert found == expected


def test_cve_2023_5215_size_of_2_to_the_63_is_refused() -> None:
    """libnbd took such a size for a negative number, an error."""
    with pytest.raises(ProtocolError, match="2\\^63"):
        talk(greeting(), info(p.INFO_EXPORT, p.EXPORT_INFO.pack(1 << 63, 1)), ACK)


def test_cve_2021_20286_server_hanging_up_in_the_option_phase_is_an_error() -> None:
    """libnbd aborted on an assertion."""
    for upto in range(len(greeting() + EXPORT + ACK)):
        client = Handshake(PLAIN)
        client.receive((greeting() + EXPORT + ACK)[:upto])
        assert isinstance(client.receive_eof(), BridgeError)


def test_cve_2019_14842_option_reply_with_more_than_was_asked_is_refused() -> None:
    """libnbd wrote a too long reply behind its buffer."""
    header = p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, p.OPT_GO, p.REP_INFO, 1 << 31)
    with pytest.raises(ProtocolError):
        talk(greeting(), header)


def test_description_words_are_properties() -> None:
    export = Export("", 0, description="our plugin; instance=ab-1 generation=7, session=yes")
    assert export.volume.words == {"instance": "ab-1", "generation": "7", "session": "yes"}


@pytest.mark.parametrize("word", ["generation", "written"])
@pytest.mark.parametrize(
    ("number", "says"),
    [
        ("99999999999999999999999", "more than 2^63 - 1"),
        (str(1 << 63), "more than 2^63 - 1"),
        ("9" * 128, "more than 2^63 - 1"),
        ("-5", "less than 0"),
    ],
)
def test_number_out_of_range_in_a_description_is_a_violation(
    word: str, number: str, says: str
) -> None:
    """It is kept in the header of a cache file, which has 64 bits for it."""
    words = {"generation": "1", "written": "1"} | {word: number}
    text = " ".join(f"{key}={value}" for key, value in words.items())
    description = info(p.INFO_DESCRIPTION, text.encode())
    with pytest.raises(ProtocolError, match=re.escape(says)):
        talk(greeting(), EXPORT, description, ACK)


@pytest.mark.parametrize(
    ("text", "sessions"),
    [
        ("generation=9223372036854775807 written=0", (2**63 - 1, 0)),
        ("generation=1", None),
        ("generation=latest written=1", None),
        ("generation=1_0 written=1", None),
        ("generation=\u0661 written=1", None),
        ("generation=1.5 written=1", None),
    ],
)
def test_counters_of_sessions_are_decimal_numbers_or_none(
    text: str, sessions: tuple[int, int] | None
) -> None:
    assert Export("", 0, description=text).sessions == sessions


def refused(*listed: bytes, typed: str = "vm0", sent: str | None = None, final: int = 0) -> str:
    """What the operator is told when GO is refused, and LIST then brings `listed`."""
    wishes = replace(
        PLAIN, export_name=typed if sent is None else sent, typed_name=typed, list_if_refused=True
    )
    client = talk(greeting(), reply(p.OPT_GO, p.REP_ERR_UNKNOWN), wishes=wishes)
    for each in listed:
        client.receive(reply(p.OPT_LIST, p.REP_SERVER, each))
    with pytest.raises(ConfigError) as caught:
        client.receive(reply(p.OPT_LIST, final or p.REP_ACK))
    assert options_sent(client.data_to_send()) == [p.OPT_GO, p.OPT_LIST, p.OPT_ABORT]
    return explain(caught.value)


def listed(name: bytes, description: bytes = b"") -> bytes:
    return p.U32.pack(len(name)) + name + description


def test_refused_export_is_told_with_the_list_of_what_there_is() -> None:
    assert refused(listed(b"a"), listed(b""), listed(b"a")) == (
        "the server refused the export 'vm0': unknown export; there is 'a', the default one "
        "(nbd-bridge info --list)"
    )
    many = refused(*(listed(b"%d" % number) for number in range(15)))
    assert "'9' and 5 more (nbd-bridge info --list)" in many


def test_refused_export_is_named_as_the_operator_typed_it() -> None:
    text = refused(listed(b"a"), sent="vm0@session=0123456789abcdef,client=1,connection=1")
    assert "the export 'vm0': " in text
    assert refused(typed="", sent="@readonly") == (
        "the server refused its default export: unknown export"
    )


@pytest.mark.parametrize("typed", ["vm0", "vm0@session=a"])
def test_refused_export_that_is_listed_is_told_with_our_plugins_reason(typed: str) -> None:
    line = b"nbd-bridge volume=vm0 size=1 session=yes refused: volume vm0 is in use"
    text = refused(listed(b"vm0", line), listed(b"vm1"), typed=typed)
    assert text == f"the server refused the export {typed!r}: volume vm0 is in use"


def test_refused_default_export_has_the_reason_of_the_only_one() -> None:
    line = b"nbd-bridge volume=disk.img session=yes refused: permission denied"
    assert refused(listed(b"disk.img", line), typed="") == (
        "the server refused its default export: permission denied"
    )


def test_refused_export_that_is_listed_may_be_in_use() -> None:
    assert "it is in the server's list: is it in use?" in refused(listed(b"vm0"))


def test_refused_export_without_a_list_is_told_as_it_is() -> None:
    text = refused(final=p.REP_ERR_UNSUP)
    assert text == "the server refused the export 'vm0': unknown export"


def test_refused_export_whose_list_breaks_the_protocol_is_told_as_it_is() -> None:
    wishes = replace(PLAIN, export_name="x", list_if_refused=True)
    client = talk(greeting(), reply(p.OPT_GO, p.REP_ERR_UNKNOWN), wishes=wishes)
    with pytest.raises(ConfigError, match=r"refused the export 'x': unknown export$"):
        client.receive(reply(p.OPT_LIST, p.REP_SERVER, b"\xff\xff\xff\xff"))


def test_refused_export_of_a_server_that_hangs_up_then_is_told_as_it_is() -> None:
    wishes = replace(PLAIN, export_name="x", list_if_refused=True)
    client = talk(greeting(), reply(p.OPT_GO, p.REP_ERR_UNKNOWN), wishes=wishes)
    error = client.receive_eof()
    assert isinstance(error, ConfigError)
    assert "refused the export 'x'" in str(error)
