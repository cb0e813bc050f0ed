"""What a corpus is begun from: a few inputs that are right, for the fuzzer to spoil."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from bridge.peers.nbd_server_core import ServerCore
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.server.handshake import Handshake, State
from bridge.server.handshake_options import HandshakeOptions
from tests.server.test_streams import SIZE, draw_settings

_URIS = (
    "nbd://storage.example/vm0",
    "nbd://[fe80::1%25eth0]:10810/a%20b@session=x",
    "nbds://host/?tls-certificates=/etc/tls&tls-hostname=other&tls-verify-peer=no",
    "nbd+unix:///vm0?socket=/run/nbd.sock",
    "nbds+unix:///?socket=relative/nbd.sock&tls-psk-file=/etc/psk",
    "nbd:localhost:10809:exportname=vm0",
    "nbd:unix:/run/x:exportname=y",
    "nbd://user:secret@host/",
    "nbd://0x7f.1:1/#",
    "nbd://127.1/",
    "nbd://host/a\nb\tc",
    f"nbd+unix:///{'%61' * 1400}?socket=/run/x",
    f"nbds://{'a.' * 127}/?tls-hostname={'b' * 64}",
)
_SIZES = (
    "10G",
    "1.5GiB",
    "4096",
    "10 MB",
    " 0.5k",
    "1P",
    "7EiB",
    "9223372036854775807",
    "1B",
    "10.",
    # The sign for Kelvin, which is a K to an expression that takes either case.
    "10\N{KELVIN SIGN}",
    "1 \N{KELVIN SIGN}B",
)
_CONFIGS = (
    'uri = "nbd://storage/vm0"\nsocket-path = "/run/vm0.sock"\ncache-size = "10GB"\n'
    "num-queues = 4\nflush-interval = 7.5\nread-only = true\n",
    'features = "-mq"\nsocket-mode = \'0660\'\nlog-level = "debug"\npoll-us = 0x10\nfd = 3\n',
    '[cache]\nsize = 1\n[[a]]\nb.c = [1, {d = 2}]\n"e" = """\nf"""\n',
    f"a = {'[' * 2000}",
    f"fd = {'9' * 4400}",
    f"fd = 0x1{'0' * 4000}",
    '"a\\nb" = 1\n' + "".join(f"k{number} = 1\n" for number in range(150)),
    "cache-siez = 1979-05-27T07:32:00Z\nname = nan\n",
)
_NAMES = (
    "vm0",
    "vm0@snap",
    "@readonly",
    "vm0@session=move",
    "a@session=t,client=c,connection=2",
    ".x",
    "a@b@c",
    "a/../b",
)
_DESCRIPTIONS = (
    "nbd-bridge volume=a generation=5 written=4 grown_from=3 writer=us identity="
    "0123456789abcdef0123456789abcdef instance=x session=yes",
    "nbd-bridge volume=a generation=99999999999999999999 written=-1",
    "nbd-bridge volume=a instance=1 session=yes read-only: used by another",
    "nbd-bridge volume=b refused: no such volume",
    "nbd-bridge volume=a generation=x written=5",
    "a disk",
)
_SETTINGS = (
    "store=memory\nsize=1G\nfence=takeover\nfence_timeout=1.5\nconnections=3",
    "file=/tmp/x\ncreate=on\nsize=10G\nvolume=a\nparallel=on",
    "dir=/tmp\nstate=/tmp/state\ntimeout=nan",
    f"dir=/{'x' * 300}",
    f"file={'/x' * 2500}\nsize=1",
    "store=rbd\npool=rbd\nnamespace=n\nimage=i\nconf=/etc/ceph.conf\nid=admin",
)
_REQUESTS = (
    b'POST /settings HTTP/1.1\r\nHost: x\r\nContent-Length: 34\r\n\r\n{"cache_mode": "writeback",'
    b'"slow_ms":1}',
    b"GET /settings HTTP/1.1\r\nHost: x\r\n\r\nHEAD /stop HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /cache/warm HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'10\r\n{"offset": 1234}\r\n0\r\n\r\n',
    b"POST /stop HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    b'POST /stop HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{"when_clean":false}',
    b"POST /stop HTTP/1.1\r\nHost: x\r\nContent-Length: 416\r\n\r\n{"
    b'"timeout_s":1' + b"0" * 402 + b"}",
    b"POST /cache/warm HTTP/1.1\r\nHost: x\r\nContent-Length: 413\r\n\r\n{"
    b'"offset":1' + b"0" * 402 + b"}",
    b"GET /metrics HTTP/1.0\r\n\r\n",
)


def of(name: str) -> list[bytes]:
    """The inputs that the corpus of this target is begun from."""
    texts = {
        "uri": _URIS,
        "size": _SIZES,
        "config": _CONFIGS,
        "export_name": _NAMES,
        "description": _DESCRIPTIONS,
        "plugin_settings": _SETTINGS,
    }
    if name in texts:
        return [text.encode() for text in texts[name]]
    if name == "handshake":
        return [bytes([how]) + talk for how, talk in enumerate(_talks(), 0x80)]
    random = Random(name)
    if name == "control":
        return [bytes([n]) + request for n in range(4) for request in _REQUESTS]
    # Of choices: what leads far needs several to be right at once, which mutation rarely does.
    return [random.randbytes(length) for length in (20, 50, 100, 150, 200, 400) for _ in range(8)]


def _talks() -> Iterator[bytes]:
    """What servers of several kinds say, to clients that want several things."""
    for seed in range(64):
        server = ServerCore({"": MemoryDisk(SIZE)}, draw_settings(Random(seed)))
        client = Handshake(HandshakeOptions(extended=bool(seed & 1)))
        said = b""
        try:
            while client.state is State.TALKING and (data := server.data_to_send()):
                said += data
                client.receive(data)
                server.receive(client.data_to_send())
        except Exception:
            pass  # It is a seed all the same.
        yield said
