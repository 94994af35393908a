"""A name server of the tests', in a namespace of theirs: what it answers is set name by name, to the last byte if need be."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset
from dns.message import Message

T = TypeVar("T")
Answering = Callable[[Message, bool], "Message | bytes | list[bytes] | None"]
"""Of a question, and whether it came over TCP: the answer; nothing, or packets as they are."""


def records(*lines: str) -> list[dns.rrset.RRset]:
    """``NAME TTL TYPE DATA``."""
    found = []
    for line in lines:
        name, ttl, kind, data = line.split(" ", 3)
        absolute = data + "." if kind == "CNAME" else data
        found.append(dns.rrset.from_text(name + ".", int(ttl), "IN", kind, absolute))
    return found


def reply(question: Message, *lines: str, rcode: int = 0) -> Message:
    made = dns.message.make_response(question, recursion_available=True)
    made.set_rcode(rcode)
    for one in records(*lines):
        made.find_rrset(made.answer, one.name, one.rdclass, one.rdtype, create=True).update(one)
        made.find_rrset(made.answer, one.name, one.rdclass, one.rdtype).ttl = one.ttl
    return made


class NameServer:
    """Answers what is in :attr:`zone` (by name and type); the rest does not exist. Its sockets are of the namespace
    it is made in."""

    def __init__(self, address: str, port: int = 53) -> None:
        self.zone: dict[tuple[str, str], Answering | list[str]] = {}
        self.asked: list[tuple[str, str, bool]] = []
        """What was asked as it was written, and whether over TCP."""
        self.ports: list[int] = []
        self.numbers: list[int] = []
        self._stop, self._wake = os.pipe()
        self.tcp = socket.create_server((address, port))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind((address, port))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def names(self) -> list[str]:
        return [name.lower() for name, _, _ in self.asked]

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._stop, self.tcp, self.udp], [], [])
            if self._stop in ready:
                return
            if self.udp in ready:
                data, peer = self.udp.recvfrom(65535)
                self.ports.append(peer[1])
                for packet in self._answers(data, False):
                    self.udp.sendto(packet, peer)
            if self.tcp in ready:
                connection, _ = self.tcp.accept()
                with connection:
                    connection.settimeout(5)
                    data = connection.recv(2048)
                    for packet in self._answers(data[2:], True):
                        connection.sendall(len(packet).to_bytes(2, "big") + packet)

    def _answers(self, data: bytes, stream: bool) -> list[bytes]:
        question = dns.message.from_wire(data)
        name, kind = question.question[0].name.to_text(), dns.rdatatype.to_text(question.question[0].rdtype)
        self.asked.append((name, kind, stream))
        self.numbers.append(question.id)
        known = self.zone.get((name.lower().rstrip("."), kind))
        if known is None:
            made: Message | bytes | list[bytes] | None = reply(question, rcode=3)
        else:
            made = known(question, stream) if callable(known) else reply(question, *known)
        match made:
            case None:
                return []
            case Message():
                return [made.to_wire(max_size=65535)]
            case bytes():
                return [made]
            case _:
                return made

    def close(self) -> None:
        os.write(self._wake, b"x")
        self._thread.join()
        for one in (self.tcp, self.udp):
            one.close()
        os.close(self._stop)
        os.close(self._wake)


class Loop:
    """An event loop in a thread of its own, for tests that are not asynchronous."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def call(self, work: Callable[[], T]) -> T:
        async def inside() -> T:
            return work()

        return self.run(inside())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
