"""The storage container's first process: settings, certificates, volume, then nbdkit.

Every setting is an environment variable of docker/README.md's table.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import certificates
from environment import SettingError, choice, integer, number, run, size, switch, text
from supervise import supervise

PORT = 10809
LIBRARY = Path(__file__).parent
VOLUMES = Path("/volumes")
SERVER_CERTIFICATES = Path("/certificates/server")
CLIENT_CERTIFICATES = Path("/certificates/client")

NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}"
_NAME_HINT = "letters, digits and _ . + -"
_ALWAYS_NAMES = ("storage", "localhost", "127.0.0.1")
_HOST = re.compile(r"[A-Za-z0-9.:_-]{1,253}")


def main() -> None:
    store = choice("NBD_STORE", "file", ("file", "memory", "rbd"))
    volume = text("NBD_VOLUME", "disk", pattern=NAME_PATTERN, hint=_NAME_HINT)
    tls = tls_options()
    parameters = store_parameters(store, volume)
    if store == "file":
        create_volume(VOLUMES, volume, size("NBD_VOLUME_SIZE", "10G"))
    command = [
        "nbdkit", "--foreground", "--port", str(PORT), *tls,
        "python", str(LIBRARY / "nbd_plugin" / "plugin.py"), f"store={store}", *parameters,
    ]  # fmt: skip
    say(f"serving volume {volume}, store {store}, TLS {'on' if tls else 'off'}, port {PORT}")
    supervise(command)


def store_parameters(store: str, volume: str) -> list[str]:
    """The parameters of the plugin. Raises SettingError."""
    fence = [
        "fence=" + choice("NBD_FENCE", "on", ("on", "takeover", "token", "off")),
        "fence_timeout=" + number("NBD_FENCE_TIMEOUT", "10"),
        f"connections={integer('NBD_CONNECTIONS', 8)}",
    ]
    if store == "file":
        return [f"dir={VOLUMES}", f"volume={volume}", *fence]
    volume_size = size("NBD_VOLUME_SIZE", "10G")
    if store == "memory":
        return [f"volume={volume}", f"size={volume_size}", *fence]
    return [*rbd_parameters(volume), *fence]


def rbd_parameters(volume: str) -> list[str]:
    """The parameters of an existing Ceph cluster. Raises SettingError."""
    conf = Path(text("RBD_CONF", "/etc/ceph/ceph.conf"))
    if not os.access(conf, os.R_OK):
        raise SettingError(f"{conf} cannot be read: mount the cluster's configuration there")
    parameters = [
        "pool=" + text("RBD_POOL", "rbd", pattern=NAME_PATTERN, hint=_NAME_HINT),
        "id=" + text("RBD_ID", "admin", pattern=NAME_PATTERN, hint=_NAME_HINT),
        f"conf={conf}",
        f"volume={volume}",
        "timeout=" + number("RBD_TIMEOUT", "10"),
    ]
    if namespace := text("RBD_NAMESPACE", "", pattern=f"({NAME_PATTERN})?", hint=_NAME_HINT):
        parameters.append(f"namespace={namespace}")
    if switch("RBD_CREATE", "off"):
        parameters += ["create=on", "size=" + size("NBD_VOLUME_SIZE", "10G")]
    return parameters


def tls_options() -> list[str]:
    """Make missing certificates; return nbdkit's TLS options. Raises SettingError."""
    if not switch("NBD_TLS", "on"):
        return []
    names = list(_ALWAYS_NAMES)
    for name in text("NBD_TLS_NAMES", "").replace(",", " ").split():
        if _HOST.fullmatch(name) is None:
            raise SettingError(
                f"NBD_TLS_NAMES: {name[:100]!r} is neither a host name nor an address"
            )
        names.append(name)
    if certificates.ensure_certificates(SERVER_CERTIFICATES, CLIENT_CERTIFICATES, names):
        say(f"made certificates for {', '.join(names)}")
    return ["--tls=require", "--tls-verify-peer", f"--tls-certificates={SERVER_CERTIFICATES}"]


def create_volume(folder: Path, volume: str, wanted: str) -> None:
    """Make the sparse file of `volume`, unless it exists; keep one of another size.

    Raises SettingError.
    """
    certificates.check_writable(folder)
    sys.path.insert(0, str(LIBRARY))
    from nbd_plugin.errors import PluginError
    from nbd_plugin.file_store import FileStore
    from nbd_plugin.sizes import format_size, parse_size

    try:
        wanted_bytes = parse_size(wanted)
        path = folder / volume
        if not path.exists():
            FileStore(folder).create(volume, wanted_bytes)
            say(f"created volume {volume} of {format_size(wanted_bytes)}")
        elif path.stat().st_size != wanted_bytes:
            present = format_size(path.stat().st_size)
            say(f"volume {volume} has {present}, NBD_VOLUME_SIZE={wanted} is ignored")
    except (PluginError, OSError) as error:
        raise SettingError(f"volume {volume}: {error}") from None


def say(line: str) -> None:
    print(f"storage: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run("storage", main)
