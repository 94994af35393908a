"""Machines with a run id: addresses that follow from a name and are theirs while they exist, on TAPs in the host's namespace."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from guest_world import CLOSED, INTRUDER, GuestWorld, arp, datagram, dies, ethernet, eventually, reached, same_after, serving
from network_world import HOST, ROUTER, up
from stoker.host import netlink
from stoker.host.netlink import Netlink
from stoker.network.plan import RunPlan, Taken, plan_run

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.timeout(300),
]


BESIDE = IPv4Interface("10.99.0.1/24")


def planned(name: str) -> RunPlan:
    """What is printable before anything starts."""
    return plan_run("r1", [name], Taken())[name]


@pytest.fixture(scope="module")
def shared(session_root: Path, data_dir: Path, accelerator: str) -> Iterator[GuestWorld]:
    with serving(session_root, data_dir, accelerator, box={"run_id": "r1", "publish": ["9000:80"]}, two={}) as made:
        yield made


@pytest.fixture
def made(shared: GuestWorld) -> Iterator[GuestWorld]:
    """There are machines ``box``, of the run r1, and ``two``, of none, which serve."""
    shared.settled()
    with same_after(shared):
        yield shared


def test_addresses_follow_from_the_name(made: GuestWorld) -> None:
    plan = planned("box")
    assert made.address("box") == str(plan.guest) and plan.tap in made.interfaces()
    assert f"|-- {plan.guest}\n" in made.sure("box", "cat /proc/net/fib_trie")
    assert made.sure("box", "cat /sys/class/net/eth0/address").strip() == plan.mac
    gateway = int(plan.host).to_bytes(4, "little").hex().upper().rjust(8, "0")
    assert gateway in made.sure("box", "cat /proc/net/route")
    closed = [str(plan.host), str(HOST.ip), str(INTRUDER.ip), "10.1.2.3", "169.254.169.254", made.address("two")]
    wanted = [f"{kind}/{address}" for address in closed for kind in ("tcp", "udp")]
    *said, tcp, udp = made.ask("box", *wanted, f"tcp/{closed[-1]}/80", "tcp/1.1.1.1", "udp/8.8.8.8")
    assert all(one in CLOSED for one in said), said
    assert tcp == udp == str(HOST.ip)
    assert made.ask("two", f"tcp/{plan.guest}/80")[0] in CLOSED
    assert reached(made) == f"box {ROUTER.ip}"
    made.set("box", host_access=True)
    assert made.ask("box", f"tcp/{plan.host}", f"tcp/{INTRUDER.ip}")[0] == str(plan.guest)
    made.set("box", host_access=False)
    assert made.ask("box", f"tcp/{plan.host}")[0] in CLOSED


def test_forged_packets_go_nowhere_and_are_counted(made: GuestWorld) -> None:
    plan, far = planned("box"), made.internet.serve("8.8.8.8", 9053)
    mac = made.tool("box", "mac", str(plan.host)).strip()

    def frame(payload: str, source: str = str(plan.guest), sender: str = plan.mac) -> str:
        return ethernet(sender, 0x0800, datagram(source, "8.8.8.8", 9053, payload.encode()), mac)

    sources = made.address("two"), str(plan.host), "9.9.9.9", "127.0.0.1", "0.0.0.0"
    forged = [frame(f"from {source}", source) for source in sources]
    forged += [frame("another's MAC", sender="02:fc:00:00:00:99")]
    before = made.counted("box")
    made.tool("box", "frames", frame("first"), *forged, frame("last"))
    eventually(lambda: b"last" in far.heard, "what is not forged does not come through")
    assert far.heard == [b"first", b"last"]
    assert made.counted("box") >= before + len(forged)
    claim = arp("02:fc:00:00:00:99", str(plan.guest)) + arp(mac, str(plan.host))
    made.tool("box", "frames", ethernet("02:fc:00:00:00:99", 0x0806, bytes.fromhex("0001080006040002") + claim, mac))
    assert made.ask("box", "tcp/1.1.1.1") == made.ask("two", "tcp/1.1.1.1") == [str(HOST.ip)]


def test_the_address_is_its_own_over_pauses_and_stops(made: GuestWorld) -> None:
    plan = planned("other")
    made.create("other", run_id="r1", publish=["9001:80"])
    try:
        assert made.post("other", "pause")["state"] == "paused"
        eventually(lambda: plan.tap not in made.interfaces(), "a paused machine has a TAP")
        assert made.post("other", "resume")["address"] == str(plan.guest)
        made.serve("other", 80, "other")
        assert reached(made, 9001) == f"other {ROUTER.ip}"
        assert made.post("other", "stop")["state"] == "stopped"
        assert plan.tap not in made.interfaces()
        assert made.post("other", "start")["address"] == str(plan.guest)
        assert made.ask("other", "tcp/1.1.1.1") == [str(HOST.ip)]
    finally:
        made.gone("other")


@pytest.fixture
def bridge(made: GuestWorld) -> Iterator[str]:
    """A bridge of the operator's, by which the host has an address with somebody who serves on it."""

    def work() -> socket.socket:
        with Netlink() as link:
            subprocess.run(["ip", "link", "add", "br7", "type", "bridge"], check=True)
            link.apply(netlink.add_address(link.index("br7") or 0, BESIDE, "br7"), up("br7"))
        return socket.create_server((str(BESIDE.ip), 8099))

    server = made.host.run(work)
    ended = threading.Event()

    def answer() -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError, OSError), server.accept()[0] as one:
                one.sendall(one.getpeername()[0].encode())

    server.settimeout(0.2)
    thread = threading.Thread(target=answer)
    thread.start()
    yield "br7"
    ended.set()
    thread.join()
    server.close()
    made.host.run(lambda: subprocess.run(["ip", "link", "del", "br7"], check=True))


def test_further_interfaces_are_ports_of_bridges(made: GuestWorld, bridge: str) -> None:
    """Out by the first, and beside to its neighbours by the other; over a pause, a stop, and the daemon's death."""
    asked = [{"bridge": bridge, "address": "10.99.0.7/24"}, {"bridge": bridge, "tap": "tapside"}]

    def whole(name: str) -> None:
        assert made.ask(name, "tcp/1.1.1.1", f"tcp/{BESIDE.ip}/8099") == [str(HOST.ip), "10.99.0.7"]
        links = made.sure(name, "ls /sys/class/net").split()
        assert {"eth0", "eth1", "eth2"} <= {*links}
        assert sorted(line.split()[0] for line in made.sure(name, "cat /proc/net/route").splitlines()[1:]) == [
            "eth0",
            "eth0",
            "eth1",
        ]

    try:
        for again in (False, True):  # the first leaves golden memory, where there was none; the next is out of that
            shown = made.create("many", interfaces=asked)
            first, second = (one["tap"] for one in shown["interfaces"])
            assert second == "tapside" and {first, second} <= made.interfaces()
            whole("many")
            made.settled()
            if not again:
                made.remove("many")
        assert made.daemon.call("GET", "/sandboxes/many")["origin"] == "golden"
        assert made.post("many", "fork", expect=409, json={"count": 1})["code"] == "address_own"
        made.post("many", "pause")
        eventually(lambda: not {first, second} & made.interfaces(), "a paused machine has a TAP")
        made.post("many", "resume")
        whole("many")
        made.daemon.kill()
        made.start()
        whole("many")
        made.post("many", "stop")
        assert not {first, second} & made.interfaces()
        made.post("many", "start")
        whole("many")
    finally:
        made.gone("many")
    for words, status, code in (({"tap": "up0"}, 429, "tap_taken"), ({"address": "1.2.3.4/99"}, 400, "bad_network")):
        asked = [{"bridge": bridge, **words}]
        assert made.daemon.call("POST", "/sandboxes", status, json=made.request("many", interfaces=asked))["code"] == code
        made.gone("many")


def test_a_template_is_started_with_addresses_of_its_own(made: GuestWorld) -> None:
    """Its memory was another's, with another address in it."""
    words = {"name": "tpl", "image": "debian:12", "network": "nat", "memory": 256 << 20, "setup": ["echo built > /built"]}
    made.daemon.call("POST", "/templates?wait=true", 201, json=words, timeout=280)
    try:
        made.create("of", run_id="r1", image="template:tpl", network=None, memory=None)
        assert made.daemon.call("GET", "/sandboxes/of")["origin"] in ("template", "warm")
        plan = planned("of")
        assert made.address("of") == str(plan.guest) and plan.tap in made.interfaces()
        assert made.sure("of", "cat /built /sys/class/net/eth0/address") == f"built\n{plan.mac}\n"
        assert made.ask("of", "tcp/1.1.1.1") == [str(HOST.ip)]
    finally:
        made.gone("of")
        made.daemon.call("DELETE", "/templates/tpl", 204)


def test_it_is_not_copied_with_its_address(made: GuestWorld) -> None:
    refused = made.post("box", "fork", expect=409, json={"count": 1})
    assert refused["code"] == "address_own" and refused["hint"]
    assert reached(made) == f"box {ROUTER.ip}"


def test_the_daemon_is_killed_and_traffic_goes_on(made: GuestWorld) -> None:
    made.begin("box", "flood", "1.1.1.1", "9054", tag="flood")
    noise = made.internet.serve("1.1.1.1", 9054)
    eventually(lambda: len(noise.heard) > 5, "nothing flows")
    made.daemon.kill()
    heard = len(noise.heard)
    eventually(lambda: len(noise.heard) > heard + 20, "nothing goes on without a daemon")
    assert reached(made) == f"box {ROUTER.ip}"
    made.start()
    heard = len(noise.heard)
    eventually(lambda: len(noise.heard) > heard + 20, "the daemon's start ends what goes on")
    made.end("box", "flood")
    assert made.address("box") == str(planned("box").guest) and reached(made) == f"box {ROUTER.ip}"
    made.set("box", egress="none")
    assert made.ask("box", "tcp/1.1.1.1")[0] in CLOSED
    made.set("box", egress="all")


@pytest.mark.parametrize("point", ["slot.tap", "slot.linked"])
def test_killed_while_a_slot_is_made(made: GuestWorld, point: str) -> None:
    """Its TAP outlives a process: somebody has to remove it."""
    words = made.request("victim", run_id="r1", publish=["9001:80"])
    dies(made, point, lambda: made.daemon.http.post("/v1/sandboxes", json=words))
    assert [box["name"] for box in made.daemon.call("GET", "/sandboxes")["items"] if box["state"] != "failed"] == ["two", "box"]
    made.gone("victim")
    assert planned("victim").tap not in made.interfaces()
    assert made.ask("box", "tcp/1.1.1.1") == [str(HOST.ip)] and reached(made) == f"box {ROUTER.ip}"


def test_killed_while_a_slot_is_given_back(made: GuestWorld) -> None:
    made.create("victim", run_id="r1")
    dies(made, "slot.dropping", lambda: made.daemon.http.delete("/v1/sandboxes/victim"))
    made.gone("victim")
    assert planned("victim").tap not in made.interfaces()
    assert made.ask("box", "tcp/1.1.1.1") == [str(HOST.ip)] and reached(made) == f"box {ROUTER.ip}"
