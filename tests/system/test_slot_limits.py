"""Limits of machines: what TCP gets of a rate in both directions, and the connection that is one too many."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from network_world import PORT, Guest, Place, World, world
from stoker.host.nftables import Nftables
from stoker.network.egress import ALL, Protocol
from stoker.network.firewall import Firewall
from stoker.network.plan import NAMESPACE_RANGE, RUN_RANGE
from stoker.network.rules import TABLE, Machine, Publication

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
KINDS = pytest.mark.parametrize("kind", ["run", "ns"])
RATE = 2_000_000
"""Bytes a second: far below what a test's machine gets by itself, far above what a packet is."""
LEAD, WINDOW = 2.5, 6.0
"""Seconds until a bucket is empty, and those that are judged."""


@pytest.fixture
def made() -> Iterator[World]:
    with world() as one:
        yield one


@dataclass
class Received:
    """How many bytes had come at which moment."""

    at: list[tuple[float, int]] = field(default_factory=list)

    def rate(self, begin: float, seconds: float) -> float:
        """Bytes a second from ``begin`` seconds after the first byte on."""
        start = self.at[0][0] + begin
        inside = [(moment, total) for moment, total in self.at if start <= moment <= start + seconds]
        return (inside[-1][1] - inside[0][1]) / seconds


def transfer(sender: Place, receiver: Place, address: str, seconds: float, *, port: int = 7000, target: int = 7000) -> Received:
    """Sends as fast as TCP does for some seconds. ``target``: the port that the receiver listens on."""
    received = Received()
    server = receiver.run(lambda: socket.create_server(("0.0.0.0", target)))

    def sink() -> None:
        connection, _ = server.accept()
        total = 0
        with connection:
            while data := connection.recv(1 << 18):
                total += len(data)
                received.at.append((time.monotonic(), total))

    thread = threading.Thread(target=sink)
    thread.start()
    with sender.connect(address, port, timeout=5) as connection:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            connection.send(bytes(1 << 16))
        connection.shutdown(socket.SHUT_WR)
        thread.join(60)
    server.close()
    assert not thread.is_alive()
    return received


def put(made: World, guest: Guest, **facts: Any) -> None:
    """As an edit of a machine that is up."""
    plan = guest.slot.plan
    made.slots.change(Machine(plan.interface, plan.source_mac, plan.address, **{"egress": ALL, **facts})).result(20)


@KINDS
def test_rates_hold_and_are_reached(made: World, kind: str) -> None:
    ports = (Publication(Protocol.TCP, 9000, 7000),)
    guest = made.machine(kind, published=ports)
    interface = guest.slot.plan.interface

    def out(seconds: float) -> Received:
        return transfer(guest, made.internet, "1.1.1.1", seconds)

    def inward(seconds: float) -> Received:
        return transfer(made.internet, guest, "5.5.5.5", seconds, port=9000)

    for way in (out, inward):
        free = way(1.5).rate(0.2, 1.0)
        assert free > 4 * RATE, "this host is too slow for this test"
    # Limits of a machine that is up; those of one direction leave the other alone.
    put(made, guest, published=ports, rate_out=RATE)
    assert 0.8 * RATE <= out(LEAD + WINDOW).rate(LEAD, WINDOW) <= 1.05 * RATE
    assert inward(1.5).rate(0.2, 1.0) > 2 * RATE
    counters = made.firewall.counters()[interface]
    assert counters.over_out > 0 and counters.over_in == counters.denied == 0
    put(made, guest, published=ports, rate_in=RATE)
    assert 0.8 * RATE <= inward(LEAD + WINDOW).rate(LEAD, WINDOW) <= 1.05 * RATE
    assert out(1.5).rate(0.2, 1.0) > 2 * RATE
    counters = made.firewall.counters()[interface]
    assert counters.over_in > 0 and counters.over_out == 0
    put(made, guest, published=ports)
    assert out(1.5).rate(0.2, 1.0) > 2 * RATE < inward(1.5).rate(0.2, 1.0)


@KINDS
def test_one_connection_too_many(made: World, kind: str) -> None:
    guest, other = made.machine(kind, connections=3), made.machine(kind, "two", connections=3)
    crowded = lambda: made.firewall.counters()[guest.slot.plan.interface].crowded  # noqa: E731
    open_ones = [made.stack.enter_context(guest.connect(address)) for address in ("1.1.1.1", "8.8.8.8", "8.8.8.8")]
    for one in open_ones:
        assert one.recv(100) == b"5.5.5.5\n"
    assert crowded() == 0
    assert guest.ask("1.1.1.1") == "No route to host"
    assert crowded() == 1
    assert guest.ask_udp("1.1.1.1", timeout=0.3) == "timeout" and crowded() == 2, "of every protocol"
    assert other.ask("1.1.1.1") == "5.5.5.5", "each machine has a number of its own"
    for one in open_ones:
        one.sendall(b"still there?")
        assert one.recv(100) == b"still there?"
    # Its place is free when one has ended.
    open_ones.pop().close()
    eventually(lambda: guest.ask("1.1.1.1") == "5.5.5.5")
    # What comes to it does not count, nor does a change of something else forget what is open.
    guest.serve("0.0.0.0")
    kept: list[socket.socket] = []
    eventually(lambda: connected(guest, kept))
    put(made, guest, connections=3, published=(Publication(Protocol.TCP, 9000, PORT),))
    assert made.internet.ask("5.5.5.5", 9000) == "5.5.5.1"
    assert guest.ask("1.1.1.1") == "No route to host"
    put(made, guest)
    assert guest.ask("1.1.1.1") == "5.5.5.5"
    kept.pop().close()


def connected(guest: Guest, kept: list[socket.socket]) -> bool:
    try:
        kept.append(guest.connect("1.1.1.1"))
    except OSError:
        return False
    return True


def eventually(look: Callable[[], bool]) -> None:
    """The end of a connection reaches the kernel's table when the other end has answered it."""
    deadline = time.monotonic() + 10
    while not look():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.05)


def test_limits_are_found_again(made: World) -> None:
    """By a daemon that starts again, and by the next that has to make the tables anew."""
    facts = {"rate_in": 3 << 20, "rate_out": 1_000_001, "connections": 7}
    guest = made.machine("run", **facts)
    one = guest.connect("1.1.1.1")

    def elements(name: str) -> Any:
        with made.host.run(Nftables) as nft:
            return nft.query(f"list set {TABLE} {name}")[0]["set"].get("elem")

    before = {name: elements(name) for name in ("rate_in", "rate_out", "connections")}
    assert all(before.values())
    with made.host.run(lambda: Firewall.open([RUN_RANGE.network, NAMESPACE_RANGE.network], log_group=5300)) as later:
        plan = guest.slot.plan
        later.put(Machine(plan.interface, plan.source_mac, plan.address, ALL, **facts))
        assert not later.restore(), "what is read is what was written"
        with made.host.run(Nftables) as nft:
            nft.apply(["flush ruleset"])
        assert later.restore()
    assert {name: elements(name) for name in before} == before
    one.close()
