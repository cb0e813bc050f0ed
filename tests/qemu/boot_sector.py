"""A disk that a BIOS boots: 512 bytes of code that use the firmware's disk driver.

The code reads the sectors that follow it through INT 13h, checks their sum, writes them back to
another place, says PASS or FAIL on the serial port and switches the machine off.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

DATA_SECTORS = 64
COPY_LBA = 2048
"""Where the code writes the data that it has read from sector 1 on."""
_LOAD = 0x8000
_ORIGIN = 0x7C00
_SECTOR = 512


def boot_disk(seed: int = 1) -> bytes:
    """The first sectors of the disk: the code, and the data for it to read."""
    data = random.Random(seed).randbytes(DATA_SECTORS * _SECTOR)
    total = sum(struct.unpack(f"<{len(data) // 2}H", data)) & 0xFFFF
    return _assemble(_program(total)).ljust(510, b"\0") + b"\x55\xaa" + data


@dataclass(frozen=True)
class _Label:
    name: str


@dataclass(frozen=True)
class _Jump:
    """A short jump: the opcode, then the distance to the label."""

    opcode: bytes
    label: str


@dataclass(frozen=True)
class _Address:
    """An instruction that ends with a label's address."""

    opcode: bytes
    label: str


_Part = bytes | _Label | _Jump | _Address


def _program(total: int) -> list[_Part]:
    """Real-mode x86, loaded at 0x7c00 with the boot drive in DL."""
    read_packet = struct.pack("<BBHHHQ", 16, 0, DATA_SECTORS, 0, _LOAD >> 4, 1)
    write_packet = struct.pack("<BBHHHQ", 16, 0, DATA_SECTORS, 0, _LOAD >> 4, COPY_LBA)
    return [
        b"\xfa\x31\xc0\x8e\xd8\x8e\xc0\x8e\xd0",  # cli; ds = es = ss = 0
        b"\xbc" + _word(_ORIGIN) + b"\xfb",  # mov sp, origin; sti
        _Address(b"\xbe", "read packet"),  # mov si, …
        b"\xb4\x42\xcd\x13",  # mov ah, 42h; int 13h: extended read
        _Jump(b"\x72", "bad"),  # jc bad
        b"\x31\xdb",  # xor bx, bx
        b"\xbe" + _word(_LOAD),  # mov si, the data
        b"\xb9" + _word(DATA_SECTORS * _SECTOR // 2),  # mov cx, how many words
        _Label("add"),
        b"\xad\x01\xc3",  # lodsw; add bx, ax
        _Jump(b"\xe2", "add"),  # loop add
        b"\x81\xfb" + _word(total),  # cmp bx, total
        _Jump(b"\x75", "bad"),  # jne bad
        _Address(b"\xbe", "write packet"),
        b"\xb8\x00\x43\xcd\x13",  # mov ax, 4300h; int 13h: extended write
        _Jump(b"\x72", "bad"),
        _Address(b"\xbe", "passed"),
        _Jump(b"\xeb", "say"),  # jmp say
        _Label("bad"),
        _Address(b"\xbe", "failed"),
        _Label("say"),
        b"\xac\x84\xc0",  # lodsb; test al, al
        _Jump(b"\x74", "off"),  # jz off
        b"\x88\xc4",  # mov ah, al
        _Label("busy"),
        b"\xba\xfd\x03\xec\xa8\x20",  # mov dx, 3fdh; in al, dx; test al, 20h
        _Jump(b"\x74", "busy"),
        b"\xba\xf8\x03\x88\xe0\xee",  # mov dx, 3f8h; mov al, ah; out dx, al
        _Jump(b"\xeb", "say"),
        _Label("off"),
        b"\xba\x04\x06\xb8\x00\x20\xef",  # mov dx, 604h; mov ax, 2000h; out: soft-off of q35
        _Label("halt"),
        b"\xf4",  # hlt
        _Jump(b"\xeb", "halt"),
        _Label("read packet"),
        read_packet,
        _Label("write packet"),
        write_packet,
        _Label("passed"),
        b"\r\nPASS\r\n\0",
        _Label("failed"),
        b"\r\nFAIL the firmware's disk driver\r\n\0",
    ]


def _assemble(parts: list[_Part]) -> bytes:
    labels: dict[str, int] = {}
    at = _ORIGIN
    for part in parts:
        if isinstance(part, _Label):
            labels[part.name] = at
        at += _size(part)
    code = b""
    for part in parts:
        if isinstance(part, bytes):
            code += part
        elif isinstance(part, _Address):
            code += part.opcode + _word(labels[part.label])
        elif isinstance(part, _Jump):
            distance = labels[part.label] - (_ORIGIN + len(code) + _size(part))
            code += part.opcode + struct.pack("b", distance)
    assert len(code) <= 510
    return code


def _size(part: _Part) -> int:
    if isinstance(part, bytes):
        return len(part)
    return (
        0 if isinstance(part, _Label) else len(part.opcode) + (1 if isinstance(part, _Jump) else 2)
    )


def _word(value: int) -> bytes:
    return struct.pack("<H", value)
