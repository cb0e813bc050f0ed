"""NBD URIs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import ConfigError
from bridge.server.uri import NbdUri, canonical_server, parse_uri


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://example.com", {"host": "example.com", "port": 10809, "export_name": ""}),
        ("nbd://example.com/", {"export_name": ""}),
        ("nbd://example.com:10810/disk", {"port": 10810, "export_name": "disk"}),
        ("nbd://[::1]:1/a%20b", {"host": "::1", "port": 1, "export_name": "a b"}),
        ("nbd://h//x", {"export_name": "/x"}),
        ("nbd:///x", {"host": "localhost", "export_name": "x"}),
        ("nbd://h/gr%C3%BC%C3%9Fe", {"export_name": "grüße"}),
        ("nbds://h/x?tls-hostname=y", {"tls": True, "tls_hostname": "y"}),
        ("nbds://h/?tls-verify-peer=false", {"tls_verify_peer": False}),
        ("nbds://h/?tls-certificates=/etc/pki", {"tls_certificates": "/etc/pki"}),
        ("nbds://h/?tls-psk-file=/k", {"tls_psk_file": "/k"}),
        ("nbd+unix:///?socket=/run/s", {"host": None, "socket_path": "/run/s", "tls": False}),
        ("nbds+unix:///e?socket=/run/s%20x", {"socket_path": "/run/s x", "tls": True}),
        ("nbd+unix:///a+b?socket=/run/s+x", {"socket_path": "/run/s+x", "export_name": "a+b"}),
        ("nbd+unix:///?socket=/a;b=%26%3d", {"socket_path": "/a;b=&="}),
        ("nbd+unix:///?socket=/a=b", {"socket_path": "/a=b"}),
        ("nbd://host./x", {"host": "host."}),
        ("nbd://a_b-c.9/x", {"host": "a_b-c.9"}),
        ("nbd://[fe80::1%25eth0]/", {"host": "fe80::1%eth0"}),
        ("nbd://h/a@session=b", {"host": "h", "export_name": "a@session=b"}),
    ],
)
def test_parse_uri_good_one_has_its_parts(text: str, expected: dict[str, object]) -> None:
    uri = parse_uri(text)
    assert {name: getattr(uri, name) for name in expected} == expected


@pytest.mark.parametrize("socket", ["n.nbd", "./n.nbd", "x/../n.nbd"])
def test_parse_uri_relative_socket_becomes_absolute(
    socket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    uri = parse_uri(f"nbd+unix:///?socket={socket}")

    assert uri.socket_path == uri.server == str(tmp_path / "n.nbd")


def test_parse_uri_relative_socket_without_a_working_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    with pytest.raises(ConfigError, match="write an absolute path"):
        parse_uri("nbd+unix:///?socket=n.nbd")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("http://x", "must start with"),
        ("disk.img", "must start with"),
        ("nbd+vsock://1", "must start with"),
        ("nbd://ho\nst/x", r"a '\\n' at character 9"),
        ("nbd://h/x\t", r"a '\\t' at character 10"),
        ("nbd://user:secret@h/\x1b[31m", r"^not a URI: it has a '\\x1b' at character 21: [^s]*"),
        (" nbd://h/x", "a ' ' at character 1"),
        ("nbd://h/x ", "a ' ' at character 10"),
        ("nbd://h:port/", "not a URI"),
        ("nbd://h:99999/", "not a URI"),
        ("nbd://h:0/", "port 0"),
        ("nbd://[::1/", "not a URI"),
        ("nbd://h/x?socket=/s", "needs the scheme nbd\\+unix"),
        ("nbd+unix:///x", "which socket"),
        ("nbd+unix://h/x?socket=/s", "has no host"),
        ("nbd+unix:///x?socket=/" + "s" * 107, "longer than the 107 bytes"),
        ("nbd+unix:///x?socket=/s&socket=/t", "twice"),
        ("nbd://h/?nonsense=1", "unknown parameter nonsense"),
        ("nbd://h/?tls-hostname=x", "needs TLS"),
        ("nbds://h/?tls-verify-peer=perhaps", "true or false"),
        ("nbd://h/%ff", "not UTF-8"),
        ("nbd://h/\udcff", "not UTF-8; write other bytes as %XX"),
        ("nbd://h/a%00b", "NUL"),
        ("nbd://h/" + "x" * 4097, "longer than 4096"),
        ("nbd://h/x#y", "%23"),
        ("nbd:h:10809:exportname=a/b", "write nbd://h:10809/a%2Fb$"),
        ("nbd:h:10809", "write nbd://h:10809$"),
        ("nbd:[::1]:10809:exportname=x", r"write nbd://\[::1\]:10809/x$"),
        ("nbd:unix:/run/s:exportname=x y", r"write nbd\+unix:///x%20y\?socket=/run/s$"),
        ("nbd:unix:/run/s", r"write nbd\+unix:///\?socket=/run/s$"),
        ("nbd:/x", r"write nbd://HOST/x, or nbd\+unix:///EXPORT\?socket=PATH$"),
        ("nbd:", "write nbd://HOST"),
        ("nbds:h", "write nbds://h$"),
        ("nbd+unix:/x?socket=/s", r"write nbd\+unix:///x\?socket=/s$"),
        ("nbd://user:secret@h/x", "^nbd://h/x: a user or password stood before the host"),
        ("nbd://user@h/x", "leave it out"),
        ("nbds+unix://u:p@/x?socket=/s", "leave it out"),
        ("nbd://a..b/", "cannot be the name of a host"),
        ("nbd://.b/", "cannot be the name of a host"),
        ("nbd://" + "x" * 64 + ".example/", "1 to 63 letters"),
        ("nbd://" + ".".join(["x" * 60] * 5) + "/", "253 characters"),
        ("nbd://a%20b/", "cannot be the name of a host"),
        ("nbd://a%00b/", "cannot be the name of a host"),
        ("nbd://münchen.example/", "not ASCII: write the form of it that starts with xn--"),
        ("nbd://[::1::2]/", "not a URI|not an IPv6 address"),
        ("nbd://h/100%", "'%' in the export's name without two digits: write it as %25"),
        ("nbd+unix:///?socket=/100%", "'%' in socket without two digits"),
        ("nbd+unix:///?socket=/%ff", "socket is not UTF-8"),
        ("nbds://h/?tls-hostname=m%C3%BCnchen", "not ASCII"),
        ("nbds://h/?tls-hostname=.a", "cannot be the name of a host"),
        ("nbds://h/?tls-hostname=", "cannot be the name of a host"),
        ("nbd+unix:///?socket", "'socket' is not a parameter: write NAME=VALUE"),
    ],
)
def test_parse_uri_names_the_fault_of_a_bad_one(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_uri(text)


def test_parse_uri_password_is_in_no_message() -> None:
    for text in ("nbd://user:secret@h/x", "http://user:secret@h", "nbd://user:secret@h:port/"):
        with pytest.raises(ConfigError) as caught:
            parse_uri(text)
        assert "secret" not in str(caught.value)


@given(st.text(max_size=60).map(lambda text: "nbd" + text) | st.text(max_size=60))
def test_parse_uri_anything_is_an_uri_or_a_config_error(text: str) -> None:
    try:
        uri = parse_uri(text)
    except ConfigError:
        return
    assert isinstance(uri, NbdUri)
    assert (uri.host is None) != (uri.socket_path is None)


@pytest.mark.parametrize(
    "texts",
    [
        ("localhost", "127.0.0.1", "[::1]", "LocalHost.", "[0:0:0:0:0:0:0:1]", "127.1", "0x7f.1"),
        ("Storage.Example", "storage.example.", "storage.example:10809"),
        ("10.0.0.5", "[::ffff:10.0.0.5]", "[::ffff:a00:5]", "10.5"),
        ("[2001:db8::1]", "[2001:DB8:0::0:1]:10809"),
    ],
)
def test_spellings_of_one_server_are_one(texts: tuple[str, ...]) -> None:
    assert len({canonical_server(parse_uri(f"nbd://{text}/x").server) for text in texts}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("localhost", "localhost:10810"),
        ("127.0.0.1", "127.0.0.2"),
        ("[fe80::1%25eth0]", "[fe80::1%25eth1]"),
        ("a.example", "b.example"),
    ],
)
def test_different_servers_stay_different(one: str, other: str) -> None:
    servers = [parse_uri(f"nbd://{text}/x").server for text in (one, other)]
    assert canonical_server(servers[0]) != canonical_server(servers[1])


def test_socket_through_a_symbolic_link_is_the_same_server(tmp_path: Path) -> None:
    """As /var/run is to /run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    direct = parse_uri(f"nbd+unix:///?socket={tmp_path}/run/s").server
    linked = parse_uri(f"nbd+unix:///?socket={tmp_path}/link/../link/s").server

    assert canonical_server(linked) == canonical_server(direct) == direct
