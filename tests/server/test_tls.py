"""TLS against our own server: what is accepted, and which of the many refusals it is."""

from __future__ import annotations

import contextlib
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trustme
from cryptography.hazmat.primitives import serialization

from bridge.datapath.request import FLUSH, READ, WRITE
from bridge.errors import BridgeError, CertificateWanted, ConfigError
from bridge.peers.nbd_server import Faults, Server
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.peers.nbd_server_settings import ServerSettings
from bridge.server import tls
from bridge.server.client_options import ClientOptions
from bridge.server.tls import client_context, server_context
from bridge.server.uri import parse_uri
from tests.server import certificates
from tests.server.helpers import FAST, do, pattern, read, running_client, start, write
from tests.tools import told, until


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return certificates.make(tmp_path_factory.mktemp("pki"))


@contextlib.asynccontextmanager
async def tls_server(
    folder: Path, *, client_ca: Path | None = None, faults: Faults | None = None
) -> AsyncIterator[tuple[int, Server, MemoryDisk]]:
    context = server_context(str(folder / "server-cert.pem"), str(folder / "server-key.pem"))
    if client_ca is not None:
        context.load_verify_locations(client_ca / "ca-cert.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    disk = MemoryDisk(4 << 20)
    settings = ServerSettings(tls=True, tls_required=True)
    server = Server({"": disk}, settings, faults=faults, tls_context=context)
    async with trio.open_nursery() as nursery:
        yield await nursery.start(server.serve_tcp), server, disk
        nursery.cancel_scope.cancel()


async def test_tls_reads_and_writes_of_any_size_arrive(folders: dict[str, Path]) -> None:
    async with tls_server(folders["good"]) as (port, _, disk):
        uri = f"nbds://localhost:{port}/?tls-certificates={folders['clients']}"
        async with running_client(uri) as client:
            assert client.export.tls
            for length in (512, 4096, 100_000, 3 << 20):
                data = pattern(length, length)
                assert await write(client, 512, data, pieces=3) == 0
                assert disk.data[512 : 512 + length] == data
                assert await read(client, 512, length, 2) == data
            waiters = [
                start(client, READ, 4096 * i, 4096, [memoryview(bytearray(4096))])
                for i in range(200)
            ]
            waiters += [
                start(client, WRITE, 65536 * i, 65536, [memoryview(bytes(65536))])
                for i in range(60)
            ]
            assert [await waiter.wait() for waiter in waiters] == [0] * 260
            assert await do(client, FLUSH) == 0


async def test_tls_connection_cut_without_notice_is_replaced(folders: dict[str, Path]) -> None:
    """Rule `violations`: no close_notify is tolerated."""
    async with tls_server(folders["good"]) as (port, server, disk):
        uri = f"nbds://localhost:{port}/?tls-certificates={folders['clients']}"
        options = replace(FAST, stale_write_grace_s=0)
        async with running_client(uri, options) as client:
            disk.data[:4096] = pattern(0, 4096)
            server.cut()
            assert await read(client, 0, 4096) == pattern(0, 4096)
            assert client.generation == 2


async def test_tls_over_a_unix_socket_verifies_the_name_given(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders["good"]
    context = server_context(str(folder / "server-cert.pem"), str(folder / "server-key.pem"))
    server = Server({"": MemoryDisk(512)}, ServerSettings(tls=True), tls_context=context)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_unix, tmp_path / "s")
        base = f"nbds+unix:///?socket={tmp_path}/s&tls-certificates={folders['clients']}"
        async with running_client(base + "&tls-hostname=localhost") as client:
            assert client.export.tls
        async with running_client(base + "&tls-verify-peer=false") as client:
            assert client.export.tls
        async with running_client(base, connect=False) as client:
            with pytest.raises(ConfigError, check=told("add tls-hostname=NAME")):
                await client.connect()
        nursery.cancel_scope.cancel()


async def _refused(uri: str, match: str, options: ClientOptions = FAST) -> None:
    async with running_client(uri, options, connect=False) as client:
        with pytest.raises(BridgeError, check=told(match)) as caught:
            await client.connect()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("server", "says"),
    [
        ("expired", "expired"),
        ("other-name", "[Hh]ostname mismatch.*tls-hostname=NAME"),
        ("other-ca", r"unable to get local issuer.*give that with --tls-ca"),
    ],
)
async def test_bad_certificate_is_refused_with_its_fault(
    folders: dict[str, Path], server: str, says: str
) -> None:
    async with tls_server(folders[server]) as (port, _, _disk):
        uri = f"nbds://localhost:{port}/?tls-certificates={folders['clients']}"
        await _refused(uri, says)
        async with running_client(uri + "&tls-verify-peer=false") as client:
            assert client.export.tls


async def test_certificate_by_system_authorities_only_without_parameters(
    folders: dict[str, Path],
) -> None:
    async with tls_server(folders["good"]) as (port, _, _disk):
        await _refused(f"nbds://localhost:{port}/", "not accepted")


async def test_client_certificate_missing_is_refused_and_given_is_taken(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "ca-cert.pem").write_bytes((folders["clients"] / "ca-cert.pem").read_bytes())
    async with tls_server(folders["good"], client_ca=folders["clients"]) as (port, _, _disk):
        await _refused(
            f"nbds://localhost:{port}/?tls-certificates={tmp_path}",
            "(TLS|hung up|lost).*give --tls-cert and --tls-key",
        )
        uri = f"nbds://localhost:{port}/?tls-certificates={folders['clients']}"
        async with running_client(uri) as client:
            assert client.export.tls


@pytest.mark.parametrize("has_certificate", [False, True])
async def test_server_that_hangs_up_after_tls_may_not_like_our_certificate(
    folders: dict[str, Path], tmp_path: Path, has_certificate: bool
) -> None:
    """GnuTLS says no with TLS 1.3 after our handshake is over, and no more than that."""
    from tests.server.test_handshake import greeting, reply

    folder = folders["good"]
    context = server_context(str(folder / "server-cert.pem"), str(folder / "server-key.pem"))

    async def speak(stream: trio.SocketStream) -> None:
        await stream.send_all(greeting())
        await stream.receive_some()
        await stream.send_all(reply(5, 1))
        over_tls = trio.SSLStream(stream, context, server_side=True)
        await over_tls.do_handshake()
        await stream.aclose()

    files = folders["clients"]
    if not has_certificate:
        (tmp_path / "ca-cert.pem").write_bytes((files / "ca-cert.pem").read_bytes())
        files = tmp_path
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, speak, listeners)
        async with running_client(
            f"nbds://localhost:{port}/?tls-certificates={files}", FAST, connect=False
        ) as client:
            says = "accept the certificate" if has_certificate else "give --tls-cert and --tls-key"
            with pytest.raises(CertificateWanted, check=told(says)) as caught:
                await client.connect()
            assert caught.value.exit_status == 2
        nursery.cancel_scope.cancel()


async def test_plain_client_at_a_server_requiring_tls_is_told(folders: dict[str, Path]) -> None:
    async with tls_server(folders["good"]) as (port, _, _disk):
        await _refused(f"nbd://localhost:{port}/", "requires TLS: use the scheme nbds")


async def test_tls_client_at_a_plain_server_is_told(folders: dict[str, Path]) -> None:
    server = Server({"": MemoryDisk(512)})
    async with trio.open_nursery() as nursery:
        port = await nursery.start(server.serve_tcp)
        uri = f"nbds://localhost:{port}/?tls-certificates={folders['clients']}"
        await _refused(uri, "TLS is required, but the server does not do it")
        nursery.cancel_scope.cancel()


async def test_tls_server_that_falls_silent_in_the_handshake_is_left_in_time(
    folders: dict[str, Path],
) -> None:
    from tests.server.test_handshake import greeting, reply

    async def speak(stream: trio.SocketStream) -> None:
        await stream.send_all(greeting())
        await stream.receive_some()
        await stream.send_all(reply(5, 1))
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, speak, listeners)
        uri = f"nbds://localhost:{port}/?tls-certificates={folders['clients']}"
        options = replace(FAST, connect_timeout_s=0.3)
        await _refused(uri, "no answer within 0.3 s .*TLS handshake", options)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ("tls-certificates=/nonexistent", "does not exist"),
        ("tls-certificates={tmp}", "no ca-cert.pem"),
        ("tls-psk-file={tmp}/none", "No such file" if sys.version_info >= (3, 13) else "3.13"),
    ],
)
def test_context_missing_files_are_config_errors(
    tmp_path: Path, parameters: str, says: str
) -> None:
    uri = parse_uri("nbds://localhost/?" + parameters.format(tmp=tmp_path))
    with pytest.raises(ConfigError, check=told(says)):
        client_context(uri, ClientOptions())


def test_context_broken_certificate_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "ca-cert.pem").write_text("no certificate")
    with pytest.raises(ConfigError, check=told("not a usable certificate")):
        client_context(parse_uri(f"nbds://h/?tls-certificates={tmp_path}"), ClientOptions())


def _key_files(folder: Path, tmp_path: Path) -> dict[str, str]:
    """Paths: "cert", its "key", the key "encrypted", "both" in one, a "stranger"'s key, "none"."""
    certificate = (folder / "client-cert.pem").read_bytes()
    key = (folder / "client-key.pem").read_bytes()
    private = serialization.load_pem_private_key(key, None)
    stranger = trustme.CA().issue_cert("x@example.com").private_key_pem.bytes()
    contents = {
        "cert": certificate,
        "key": key,
        "encrypted": private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        ),
        "both": certificate + key,
        "stranger": stranger,
        "none": b"nothing\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: str(tmp_path / name) for name in contents}


@pytest.mark.parametrize(
    ("certificate", "key", "says"),
    [
        ("cert", "encrypted", r"encrypted: the key \(--tls-key\) is encrypted"),
        ("cert", "stranger", r"stranger: the key \(--tls-key\) is not that of .*cert"),
        ("cert", "none", r"none: not a usable key \(--tls-key\)"),
        ("cert", None, "no key to the certificate in it: give --tls-key too"),
        ("key", "key", r"key: not a usable certificate \(--tls-cert\)"),
        ("none", "key", r"none: not a usable certificate \(--tls-cert\)"),
        (None, "key", "give --tls-cert too"),
    ],
)
def test_context_bad_key_or_certificate_is_told_as_what_it_is(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    certificate: str | None,
    key: str | None,
    says: str,
) -> None:
    """And the operator is not asked for a passphrase."""
    paths: dict[str | None, str | None] = {**_key_files(folders["clients"], tmp_path), None: None}
    options = ClientOptions(tls_certificate_file=paths[certificate], tls_key_file=paths[key])

    with pytest.raises(ConfigError, check=told(says)) as caught:
        client_context(parse_uri("nbds://h/"), options)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("certificate", "key"), [("cert", "key"), ("both", None)])
def test_context_good_key_and_certificate_are_taken(
    folders: dict[str, Path], tmp_path: Path, certificate: str, key: str | None
) -> None:
    paths: dict[str | None, str | None] = {**_key_files(folders["clients"], tmp_path), None: None}
    options = ClientOptions(tls_certificate_file=paths[certificate], tls_key_file=paths[key])

    assert client_context(parse_uri("nbds://h/"), options)


def test_context_options_beside_a_shared_key_are_refused(tmp_path: Path) -> None:
    options = ClientOptions(tls_ca_file=str(tmp_path / "ca"))
    with pytest.raises(ConfigError, check=told("--tls-ca and tls-psk-file exclude each other")):
        client_context(parse_uri("nbds://h/?tls-psk-file=/k"), options)


def test_context_is_never_below_tls_1_2() -> None:
    context = client_context(parse_uri("nbds://h/"), ClientOptions())
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.check_hostname


async def test_tls_output_stuck_is_continued(folders: dict[str, Path]) -> None:
    """A slow server: what the socket does not take is kept, in order."""
    faults = Faults(delay_s=0.001)
    async with tls_server(folders["good"], faults=faults) as (port, _, disk):
        uri = f"nbds://localhost:{port}/?tls-certificates={folders['clients']}"
        async with running_client(uri) as client:
            waiters = [
                start(client, WRITE, (i % 4) << 18, 1 << 18, [memoryview(pattern(i, 1 << 18))])
                for i in range(12)
            ]
            await until(lambda: all(waiter.finished.is_set() for waiter in waiters))
            assert disk.data[: 1 << 20] == b"".join(pattern(i, 1 << 18) for i in range(8, 12))


class KeyContext(ssl.SSLContext):
    """A context of Python 3.13, on any: it notes the callback that gives name and key."""

    found: tuple[str, bytes] = ("", b"")

    def set_psk_client_callback(self, callback: Callable[[str], tuple[str, bytes]]) -> None:  # type: ignore[override]
        self.found = callback("a hint")


def test_pre_shared_key_is_that_of_the_first_line(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("  alice:00ff10  \nbob:aa\n")
    context = KeyContext(ssl.PROTOCOL_TLS_CLIENT)

    tls._use_psk(context, parse_uri(f"nbds://h/?tls-psk-file={keys}"))

    assert context.found == ("alice", b"\0\xff\x10")
    assert context.verify_mode == ssl.CERT_NONE
    assert context.maximum_version == ssl.TLSVersion.TLSv1_2
    assert all(
        "PSK" in each["name"] for each in context.get_ciphers() if "TLS_" not in each["name"]
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "no line USER:HEXKEY"),
        (b"alice", "no line USER:HEXKEY"),
        (b"alice:xyz", "no line USER:HEXKEY"),
        (b"\xff\xfe:00", "no line USER:HEXKEY"),
        (b"alice:", "a key of 0 bytes"),
        (b"alice:" + b"00" * 5000, "a key of 5000 bytes"),
    ],
)
def test_file_of_keys_without_one_is_refused(text: bytes, says: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_bytes(text)

    with pytest.raises(ConfigError, check=told(says)):
        tls._use_psk(
            KeyContext(ssl.PROTOCOL_TLS_CLIENT), parse_uri(f"nbds://h/?tls-psk-file={keys}")
        )
