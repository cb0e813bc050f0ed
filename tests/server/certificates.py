"""Certificates for the TLS tests, in the layout that every NBD program reads."""

from __future__ import annotations

import datetime
from pathlib import Path

import trustme


def make(folder: Path) -> dict[str, Path]:
    """Directories: "good", "expired", "other-name", "other-ca", "clients" (a client's own)."""
    authority = trustme.CA()
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)
    made = {
        "good": (authority, authority.issue_cert("localhost", "127.0.0.1")),
        "expired": (authority, authority.issue_cert("localhost", not_after=past)),
        "other-name": (authority, authority.issue_cert("elsewhere.example")),
    }
    stranger = trustme.CA()
    made["other-ca"] = (stranger, stranger.issue_cert("localhost"))
    found = {}
    for name, (ca, certificate) in made.items():
        place = found[name] = folder / name
        place.mkdir()
        ca.cert_pem.write_to_path(place / "ca-cert.pem")
        certificate.cert_chain_pems[0].write_to_path(place / "server-cert.pem")
        certificate.private_key_pem.write_to_path(place / "server-key.pem")
    clients = found["clients"] = folder / "clients"
    clients.mkdir()
    client = authority.issue_cert("client@example.com")
    authority.cert_pem.write_to_path(clients / "ca-cert.pem")
    client.cert_chain_pems[0].write_to_path(clients / "client-cert.pem")
    client.private_key_pem.write_to_path(clients / "client-key.pem")
    return found
