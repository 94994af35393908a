"""DHCP by dnsmasq, taken by a client of the test's through the TAP of a slot."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from dhcp_client import packed, take
from network_world import Guest, World, world
from stoker.errors import HostError, InvalidRequest
from stoker.host.process import ProcessIdentity
from stoker.network import dhcp
from stoker.network.dhcp import Dhcp
from stoker.network.plan import RunPlan

KINDS = pytest.mark.parametrize("kind", ["run", "ns"])
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


@pytest.fixture
def made() -> Iterator[World]:
    with world() as one:
        yield one


@contextmanager
def served(made: World, guest: Guest, offered: Dhcp, directory: Path) -> Iterator[ProcessIdentity]:
    namespace = guest.slot.namespace or made.host.namespace
    process = dhcp.start(offered, directory, namespace)
    try:
        yield process
    finally:
        dhcp.end(directory)
        assert not process.alive()


@ROOT
@KINDS
def test_a_machine_gets_exactly_its_lease(made: World, kind: str, tmp_path: Path) -> None:
    guest, other = made.machine(kind), made.machine(kind, "two")
    plan = guest.slot.plan
    gateway = plan.host if isinstance(plan, RunPlan) else IPv4Address("169.254.0.22")
    offered = dhcp.of_slot(
        plan, hostname="web", nameservers=(gateway, IPv4Address("9.9.9.9")), search=("example.org", "b.example"), mtu=1400
    )
    with served(made, guest, offered, tmp_path) as process:
        assert list(dhcp.find(tmp_path)) == [ProcessIdentity.of(process.pid)]
        assert take(guest, "02:66:66:66:66:66", timeout=1.2) is None, "another MAC gets none, though the address is free"
        given = take(guest, plan.mac, name=b"../../evil\n,name")
        assert given is not None, (tmp_path / "dhcp.log").read_text()
        address, options = given
        assert address == plan.guest
        assert options[1] == IPv4Address("255.255.255.252").packed
        assert options[3] == gateway.packed
        assert options[6] == gateway.packed + IPv4Address("9.9.9.9").packed
        assert options[12] == b"web" and options[15] == b"example.org"
        assert options[119] == b"\x07example\x03org\0\x01b\x07example\0"
        assert options[26] == (1400).to_bytes(2, "big") and options[51] == (3600).to_bytes(4, "big")
        assert take(guest, "02:66:66:66:66:66", timeout=1.2) is None, "nor when it is taken"
        assert take(other, other.slot.plan.mac, timeout=1.2) is None, "nor does a machine of another wire"
        assert take(guest, plan.mac) is not None, "it is still there"
        line = (tmp_path / "dhcp.leases").read_text().split()
        assert line[1:3] == [plan.mac, str(plan.guest)]
        assert guest.ask(str(gateway), 53, timeout=0.3) != str(plan.guest), "no names are served"
    dhcp.end(tmp_path)
    assert list(dhcp.find(tmp_path)) == [] and list(tmp_path.iterdir()) == []


@ROOT
def test_one_machine_by_several_names(made: World, tmp_path: Path) -> None:
    """An initramfs, an installer and an init call themselves differently, with the same MAC."""
    guest = made.machine("run")
    with served(made, guest, dhcp.of_slot(guest.slot.plan), tmp_path):
        for client in (b"", b"\x01" + packed(guest.slot.plan.mac), b"\xff" + bytes(range(18)), b"\xff" + bytes(18), b""):
            given = take(guest, guest.slot.plan.mac, client=client, timeout=3)
            assert given is not None and given[0] == guest.slot.plan.guest, client
    with served(made, guest, dhcp.of_slot(guest.slot.plan), tmp_path):
        assert take(guest, guest.slot.plan.mac, client=b"\xff" + bytes(range(7))) is not None, "another life of the server's"


@ROOT
def test_two_in_one_namespace(made: World, tmp_path: Path) -> None:
    guests = [made.machine("run", name) for name in ("one", "two")]
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    one, two = (dhcp.of_slot(guest.slot.plan) for guest in guests)
    with served(made, guests[0], one, places[0]) as first:
        with served(made, guests[1], two, places[1]):
            for guest in guests:
                given = take(guest, guest.slot.plan.mac)
                assert given is not None and given[0] == guest.slot.plan.guest
                assert given[1][6] == IPv4Address("1.1.1.1").packed and 26 not in given[1] and 119 not in given[1]
        assert first.alive(), "one machine's end is not another's"
        dhcp.end(places[0], first)
        dhcp.end(places[0], first)


@ROOT
def test_the_unit_of_systemd(made: World, tmp_path: Path) -> None:
    guest = made.machine("run")
    plan = guest.slot.plan
    assert isinstance(plan, RunPlan)
    name = dhcp.instance(plan)
    assert name == f"dnsmasq-tap@{plan.tap}:{plan.host}:{plan.guest}.service"
    place, text = dhcp.unit_environment(dhcp.of_slot(plan, hostname="web", search=("example.org",)))
    assert place.name == f"{name.removesuffix('.service').replace('@', '-')}.env"
    lines = dict(line.split("=", 1) for line in text.splitlines())
    words = ["sh", "-c", dhcp.unit_script(str(tmp_path)), f"{plan.tap}:{plan.host}:{plan.guest}", *lines["OPTIONS"].split()]
    process = made.host.run(lambda: subprocess.Popen(words, stderr=subprocess.PIPE))
    try:
        given = take(guest, plan.mac)
        assert given is not None
        assert given[0] == plan.guest and given[1][3] == plan.host.packed and given[1][12] == b"web"
        assert take(guest, "02:66:66:66:66:66", timeout=1.2) is None
    finally:
        process.terminate()
        process.communicate(timeout=10)


@ROOT
@pytest.mark.parametrize("name", ["ignore", "infinite", "1h", "3600", "a", "7", "12-34-56-78-9a-bc", "a" * 63])
def test_names_that_mean_something_to_dnsmasq(made: World, name: str, tmp_path: Path) -> None:
    guest = made.machine("run")
    with served(made, guest, dhcp.of_slot(guest.slot.plan, hostname=name), tmp_path):
        given = take(guest, guest.slot.plan.mac)
        assert given is not None
        assert given[1][12] == name.encode() and given[1][51] == (3600).to_bytes(4, "big")


@ROOT
def test_what_cannot_run_says_why(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = made.machine("run")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError) as caught:
        dhcp.start(dhcp.of_slot(guest.slot.plan), tmp_path, made.host.namespace)
    assert caught.value.code == "tool_missing" and "dnsmasq-base" in caught.value.hint


def offer(**facts: object) -> Dhcp:
    return Dhcp("tap0", IPv4Address("10.0.0.1"), IPv4Address("10.0.0.2"), "02:fc:0a:00:00:02", **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["a,set:known", "a b", "-a", "a\ndhcp-script=/bin/sh", "a" * 64, "ä", "a.b", "$(id)", "a#", "infinite,1", "é"]
)
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        offer(hostname=name)
    assert caught.value.code == "hostname_invalid"
    if name != "a.b":
        with pytest.raises(InvalidRequest):
            offer(search=("example.org", name))


@pytest.mark.parametrize("mtu", [1, 575, 65536])
def test_odd_sizes_are_refused(mtu: int) -> None:
    with pytest.raises(InvalidRequest, match="MTU"):
        offer(mtu=mtu)
