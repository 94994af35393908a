"""Packets that a firewall's rule logs (``log group N``), read from the kernel: which interface, from where, to where.

One reader for a group and namespace. The socket never blocks: whoever has an event loop waits for :meth:`Log.fileno`. What is not
read in time the kernel throws away; :meth:`Log.read` says then that something is missing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from stoker.errors import HostError
from stoker.host.addresses import parse_messages
from stoker.host.nfnetlink import ACK, HEADER, answers, attribute, attributes, open_socket, send

__all__ = ["Log", "Logged"]

PACKET, CONFIG = 0x400, 0x401
COMMAND, MODE, TIMEOUT, THRESHOLD = 1, 2, 4, 5
BIND: Final = 1
COPY_PACKET: Final = 2
INTERFACE, PORT, PAYLOAD, PREFIX = 4, 6, 9, 10
SIOCGIFNAME: Final = 0x8910
PORTS: Final = (6, 17)


@dataclass(frozen=True, slots=True)
class Logged:
    """A packet. ``interface`` is empty when it is gone by now; the addresses are None when it is neither IPv4 nor IPv6."""

    prefix: str
    interface: str
    source: IPv4Address | IPv6Address | None
    destination: IPv4Address | IPv6Address | None
    protocol: int
    port: int | None


class Log:
    """A group's packets, in the namespace of the thread that makes this. Raises ``log_busy``, ``log_refused`` (HostError)."""

    def __init__(self, group: int, *, size: int = 128) -> None:
        self._socket = open_socket()
        try:
            self._socket.settimeout(5)
            for body in (
                attribute(COMMAND, bytes([BIND])),
                attribute(MODE, struct.pack("!IBx", size, COPY_PACKET)),
                # Each packet at once: neither a hundredth of a second nor a second packet is waited for.
                attribute(TIMEOUT, struct.pack("!I", 1)) + attribute(THRESHOLD, struct.pack("!I", 1)),
            ):
                send(self._socket, CONFIG, ACK, body, family=socket.AF_UNSPEC, resource=group)
                list(answers(self._socket))
            self._socket.setblocking(False)
        except OSError as e:
            self._socket.close()
            code = "log_busy" if e.errno == errno.EBUSY else "log_refused"
            raise HostError(code, f"the firewall's log (group {group}): {os.strerror(e.errno or 0)}", "ss -f netlink") from None
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> tuple[list[Logged], bool]:
        """What has come, without waiting; and whether some was lost."""
        found: list[Logged] = []
        lost = False
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return found, lost
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            found += [self._logged(body[HEADER:]) for kind, body in parse_messages(data) if kind == PACKET]

    def _name(self, index: int) -> str:
        """Of an interface, in the socket's namespace."""
        request = bytearray(struct.pack("16si20x", b"", index))
        try:
            fcntl.ioctl(self._socket, SIOCGIFNAME, request)
        except OSError:
            return ""  # gone
        return request[:16].split(b"\0")[0].decode()

    def _logged(self, body: bytes) -> Logged:
        parts = {kind: content for kind, content, _ in attributes(body)}
        prefix = parts.get(PREFIX, b"").rstrip(b"\0").decode(errors="replace")
        index = parts.get(PORT, parts.get(INTERFACE))  # of a bridge, its port
        interface = self._name(struct.unpack("!I", index)[0]) if index is not None else ""
        packet = parts.get(PAYLOAD, b"")
        if len(packet) >= 40 and packet[0] >> 4 == 6:
            # Behind a header of extensions the port is not looked for.
            port = struct.unpack_from("!H", packet, 42)[0] if packet[6] in PORTS and len(packet) >= 44 else None
            return Logged(prefix, interface, IPv6Address(packet[8:24]), IPv6Address(packet[24:40]), packet[6], port)
        if len(packet) < 20 or packet[0] >> 4 != 4:
            return Logged(prefix, interface, None, None, 0, None)
        header, protocol = (packet[0] & 15) * 4, packet[9]
        has_port = protocol in PORTS and len(packet) >= header + 4 and not struct.unpack_from("!H", packet, 6)[0] & 0x1FFF
        port = struct.unpack_from("!H", packet, header + 2)[0] if has_port else None
        return Logged(prefix, interface, IPv4Address(packet[12:16]), IPv4Address(packet[16:20]), protocol, port)
