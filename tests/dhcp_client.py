"""A DHCP client without an operating system: what a machine with a MAC is offered and given, frame by frame."""

from __future__ import annotations

import secrets
import socket
import struct
import time
from ipaddress import IPv4Address

from network_world import Guest

__all__ = ["packed", "take"]

DISCOVER, OFFER, REQUEST, ACK = 1, 2, 3, 5
ANYONE = "ff:ff:ff:ff:ff:ff"


def packed(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def message(kind: int, mac: str, number: int, options: bytes = b"") -> bytes:
    """A frame from a client that has no address yet."""
    body = struct.pack("!BBBBIHH16x", 1, 1, 6, 0, number, 0, 0x8000) + packed(mac).ljust(16, b"\0") + bytes(192)
    asked = bytes((1, 3, 6, 12, 15, 26, 51, 119))
    body += b"\x63\x82\x53\x63" + bytes((53, 1, kind, 55, len(asked))) + asked + options + b"\xff"
    body = body.ljust(300, b"\0")
    ends = bytes(4) + b"\xff" * 4
    header = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(body), 1, 0, 64, 17, 0) + ends
    header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
    datagram = struct.pack("!HHHH", 68, 67, 8 + len(body), 0) + body
    return packed(ANYONE) + packed(mac) + b"\x08\x00" + header + datagram


def answer(sock: socket.socket, number: int, timeout: float) -> tuple[IPv4Address, dict[int, bytes]] | None:
    """The address and the options of the next answer to ``number``."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            frame = sock.recv(2048)
        except TimeoutError:
            return None
        data = frame[14 + 28 :]
        if frame[12:14] != b"\x08\x00" or frame[23] != 17 or data[:1] != b"\x02" or data[4:8] != number.to_bytes(4, "big"):
            continue
        options, rest = {}, data[240:]
        while rest and rest[0] != 255:
            if rest[0] == 0:
                rest = rest[1:]
                continue
            options[rest[0]] = rest[2 : 2 + rest[1]]
            rest = rest[2 + rest[1] :]
        return IPv4Address(data[16:20]), options
    return None


def take(
    guest: Guest, mac: str, *, name: bytes = b"", client: bytes = b"", timeout: float = 10.0
) -> tuple[IPv4Address, dict[int, bytes]] | None:
    """What a machine with that MAC is given; asks again and again until the time is over, as clients do."""

    def work() -> tuple[IPv4Address, dict[int, bytes]] | None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)) as sock:
            sock.bind(("eth0", 0x0800))
            deadline = time.monotonic() + timeout
            said = bytes((12, len(name))) + name if name else b""
            said += bytes((61, len(client))) + client if client else b""
            while time.monotonic() < deadline:
                number = secrets.randbits(32)
                sock.send(message(DISCOVER, mac, number, said))
                offer = answer(sock, number, 0.5)
                if offer is None:
                    continue
                assert offer[1][53] == bytes([OFFER])
                wanted = bytes((50, 4)) + offer[0].packed + bytes((54, 4)) + offer[1][54]
                sock.send(message(REQUEST, mac, number, said + wanted))
                if (given := answer(sock, number, 2.0)) is not None:
                    assert given[1][53] == bytes([ACK]) and given[0] == offer[0]
                    return given
            return None

    return guest.run(work)
