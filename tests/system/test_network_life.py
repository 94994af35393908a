"""What becomes of a machine's network when the machine, its daemon or its host's uplink changes: forks, pauses, crashes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from guest_world import BEYOND, CLOSED, FOUNTAIN, SECOND, GuestWorld, dies, eventually, reached, same_after, serving
from network_world import EVERYTHING, HOST, ROUTER, configure
from stoker.host import netlink
from stoker.network.plan import INSIDE

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.timeout(300),
]
INNER = "cat /proc/net/route /proc/net/fib_trie /sys/class/net/eth0/address /etc/resolv.conf"
"""What a machine knows of its network."""


@pytest.fixture(scope="module")
def shared(session_root: Path, data_dir: Path, accelerator: str) -> Iterator[GuestWorld]:
    with serving(session_root, data_dir, accelerator, box={"publish": ["9000:80"]}) as made:
        yield made


@pytest.fixture
def made(shared: GuestWorld) -> Iterator[GuestWorld]:
    """There is a machine ``box`` that serves, at the port 9000 of the host."""
    shared.settled()
    with same_after(shared):
        yield shared


def drained(made: GuestWorld, name: str) -> int:
    """Bytes of the fountain's that have come to a machine."""
    return int(made.sure(name, "cat /drained 2>/dev/null || echo 0").split()[0])


def test_copies_with_the_same_address_inside_talk_at_the_same_time(made: GuestWorld) -> None:
    made.set("box", publish=[])
    copies = [item["sandbox"] for item in made.post("box", "fork", json={"count": 2})["items"]]
    names = ["box", *(copy["id"] for copy in copies)]
    try:
        assert len({made.address(name) for name in names}) == 3
        inner = {made.sure(name, INNER) for name in names}
        assert len(inner) == 1 and str(INSIDE.guest.ip) in inner.pop()
        for number, name in enumerate(names):
            made.set(name, publish=[f"{9000 + number}:80"])
            made.begin(name, "drain", "1.1.1.1", str(FOUNTAIN), "/drained", tag="drain")
        # All three at once, out, in, and by the address of each.
        eventually(
            lambda: all(int(made.sure(n, "cat /drained || echo 0").split()[0]) > 20_000 for n in names), "one does not get on"
        )
        for number, name in enumerate(names):
            assert made.ask(name, "tcp/8.8.8.8", "udp/1.1.1.1") == [str(HOST.ip)] * 2
            assert reached(made, 9000 + number) == f"box {ROUTER.ip}"
            assert made.host.ask(made.address(name), 80).startswith("box ")
        # That each port leads to its own: one is served by somebody else from now on.
        made.end(names[1], "serve")
        made.serve(names[1], 80, "copy")
        assert [reached(made, port).split()[0] for port in (9000, 9001, 9002)] == ["box", "copy", "box"]
        # They are strangers to each other, and have policies of their own.
        assert all(
            said in CLOSED for said in made.ask(names[1], *(f"tcp/{made.address(name)}/80" for name in (names[0], names[2])))
        )
        made.set(names[2], egress="none")
        assert [made.ask(name, "tcp/1.1.1.1")[0] in CLOSED for name in names] == [False, False, True]
    finally:
        made.remove(*names[1:])
        made.end("box", "drain")
        made.set("box", publish=["9000:80"])
    assert reached(made) == f"box {ROUTER.ip}"


def test_a_pause_keeps_what_is_inside(made: GuestWorld) -> None:
    inner, links = made.sure("box", INNER), made.interfaces()
    paused = made.post("box", "pause")
    assert paused["state"] == "paused" and paused["address"] == ""
    eventually(lambda: len(made.interfaces()) == len(links) - 1 and not made.left(), "a paused machine has a slot")
    assert reached(made) in ("ConnectionRefusedError", "timeout")
    assert made.post("box", "resume")["state"] == "running"
    assert made.sure("box", INNER) == inner
    assert made.ask("box", "tcp/1.1.1.1", "udp/8.8.8.8") == [str(HOST.ip)] * 2
    assert reached(made) == f"box {ROUTER.ip}"


def test_a_stop_gives_the_address_back(made: GuestWorld) -> None:
    made.create("other", publish=["9001:80"], egress="allow: 1.1.1.1")
    links = made.interfaces()
    try:
        made.serve("other", 80, "other")
        assert reached(made, 9001) == f"other {ROUTER.ip}"
        stopped = made.post("other", "stop")
        assert (stopped["state"], stopped["address"]) == ("stopped", "")
        eventually(lambda: len(made.interfaces()) == len(links) - 1, "a stopped machine has a slot")
        # What it published is free meanwhile.
        assert made.set("box", publish=["9000:80", "9001:80"])["publish"]
        assert reached(made, 9001) == f"box {ROUTER.ip}"
        made.set("box", publish=["9000:80"])
        assert made.post("other", "start", expect=200)["state"] == "running"
        made.serve("other", 80, "again")
        assert reached(made, 9001) == f"again {ROUTER.ip}"
        assert [said in CLOSED for said in made.ask("other", "tcp/1.1.1.1", "tcp/8.8.8.8")] == [False, True]
    finally:
        made.remove("other")


def test_the_daemon_is_killed_and_traffic_goes_on(made: GuestWorld) -> None:
    made.begin("box", "drain", "8.8.8.8", str(FOUNTAIN), "/drained", tag="drain")
    made.begin("box", "flood", "1.1.1.1", "9054", tag="flood")
    noise = made.internet.serve("1.1.1.1", 9054)
    address = made.address("box")
    eventually(lambda: len(noise.heard) > 5, "nothing flows")
    with made.internet.connect(str(HOST.ip), 9000) as inward:
        inward.settimeout(10)
        assert inward.recv(100) == f"box {ROUTER.ip}\n".encode()
        made.daemon.kill()
        heard = len(noise.heard)
        eventually(lambda: len(noise.heard) > heard + 20, "nothing goes on without a daemon")
        inward.sendall(b"without a daemon")
        assert inward.recv(100) == b"without a daemon"
        assert reached(made) == f"box {ROUTER.ip}"
        made.start()
        assert made.address("box") == address
        heard = len(noise.heard)
        eventually(lambda: len(noise.heard) > heard + 20, "the daemon's start ends what goes on")
        inward.sendall(b"with another")
        assert inward.recv(100) == b"with another"
    before = drained(made, "box")
    eventually(lambda: drained(made, "box") > before, "the download was cut")
    # The next daemon has it in hand: its policy, its ports, its end.
    made.set("box", egress="allow: 8.8.8.8")
    assert [said in CLOSED for said in made.ask("box", "tcp/1.1.1.1", "tcp/8.8.8.8")] == [True, False]
    made.set("box", publish=["9001:80"])
    assert reached(made, 9001) == f"box {ROUTER.ip}" and reached(made) == "ConnectionRefusedError"
    made.set("box", publish=["9000:80"], egress="all")
    for tag in ("drain", "flood"):
        made.end("box", tag)


@pytest.mark.parametrize(
    "point", ["slot.after_intent", "slot.judged", "slot.tap", "slot.inside", "slot.linked", "slot.up", "create.after_slot"]
)
def test_killed_while_a_slot_is_made(made: GuestWorld, point: str) -> None:
    dies(made, point, lambda: made.daemon.http.post("/v1/sandboxes", json=made.request("victim", publish=["9001:80"])))
    assert [box["name"] for box in made.daemon.call("GET", "/sandboxes")["items"] if box["state"] != "failed"] == ["box"]
    made.gone("victim")
    assert made.ask("box", "tcp/1.1.1.1") == [str(HOST.ip)] and reached(made) == f"box {ROUTER.ip}"


@pytest.mark.parametrize("point", ["slot.dropping", "slot.unlinked", "slot.dropped"])
def test_killed_while_a_slot_is_given_back(made: GuestWorld, point: str) -> None:
    made.create("victim", publish=["9001:80"])
    dies(made, point, lambda: made.daemon.http.delete("/v1/sandboxes/victim"))
    made.gone("victim")
    assert reached(made, 9001) == "ConnectionRefusedError"
    assert made.ask("box", "tcp/1.1.1.1") == [str(HOST.ip)] and reached(made) == f"box {ROUTER.ip}"


def test_another_uplink(made: GuestWorld) -> None:
    """The way out is another interface with another address: new connections take it, published ports are there."""
    assert made.ask("box", "tcp/1.1.1.1") == [str(HOST.ip)]
    move(made, BEYOND.ip)
    try:
        assert made.ask("box", "tcp/1.1.1.1", "udp/8.8.8.8") == [str(SECOND.ip)] * 2
        assert made.internet.ask(str(SECOND.ip), 9000, timeout=5) == f"box {BEYOND.ip}"
        assert made.ask("box", "tcp/10.1.2.3", f"tcp/{SECOND.ip}")[0] in CLOSED
    finally:
        move(made, ROUTER.ip)
    assert made.ask("box", "tcp/1.1.1.1") == [str(HOST.ip)]


def move(made: GuestWorld, gateway: IPv4Address) -> None:
    """The host's default route."""
    before = {BEYOND.ip: ROUTER.ip, ROUTER.ip: BEYOND.ip}[gateway]
    made.host.run(
        lambda: configure(netlink.delete_route(EVERYTHING, gateway=before), netlink.add_route(EVERYTHING, gateway=gateway))
    )
