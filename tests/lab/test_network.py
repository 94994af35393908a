"""What the network room needs a whole host for: units of systemd's that offer addresses, uplinks over a VLAN and over WireGuard."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import IPv4Interface
from pathlib import Path

import anyio
import pytest

from dhcp_client import take
from network_world import HOST, PORT, ROUTER, SERVED, Guest, Place, World, world
from stoker.engine.leases import Leases, lease_name
from stoker.engine.units import Units
from stoker.network.egress import ALL
from stoker.network.firewall import Firewall
from stoker.network.plan import RUN_RANGE, plan_run
from stoker.network.rules import Machine
from stoker.network.slot import Slots

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]
HERE, THERE = IPv4Interface("10.99.0.1/24"), IPv4Interface("10.99.0.2/24")
LOTS = 3 << 20


def say(*argv: str, given: str = "") -> str:
    done = subprocess.run(argv, input=given, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout


def shown(unit: str, what: str) -> str:
    return say("systemctl", "show", "--value", "-p", what, unit).strip()


def until(look: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + 60
    while not look():
        assert time.monotonic() < deadline, why
        time.sleep(0.2)


@pytest.mark.anyio
async def test_addresses_are_offered_by_a_unit_of_systemds(tmp_path: Path) -> None:
    with ExitStack() as stack:
        firewall = stack.enter_context(Firewall.open([RUN_RANGE.network]))
        stack.callback(firewall.drop)
        slots = stack.enter_context(Slots.open(firewall))
        plan = plan_run("lab", ["web"], slots.taken())["web"]
        slot = slots.up(plan, Machine(plan.interface, plan.source_mac, plan.address, ALL))
        stack.callback(lambda: slots.drop(plan, slot).result(60))
        guest = Guest(stack, slot)
        leases = Leases()
        async with Units() as units:
            assert units.usable
            name = lease_name(plan, tmp_path, units)
            assert name == f"dnsmasq-tap@{plan.tap}:{plan.host}:{plan.guest}.service"
            await leases.begin(name, slot, "web.example.org", "9.9.9.9", units)
            try:
                assert shown(name, "ActiveState") == "active"
                for _ in range(2):
                    given = await anyio.to_thread.run_sync(lambda: take(guest, plan.mac, timeout=60))
                    assert given is not None and given[0] == plan.guest
                    assert (given[1][3], given[1][6], given[1][12]) == (plan.host.packed, bytes((9, 9, 9, 9)), b"web")
                    before = shown(name, "MainPID")
                    os.kill(int(before), signal.SIGKILL)
                    until(lambda before=before: shown(name, "MainPID") not in ("0", before), "it was not started again")  # type: ignore[misc]
            finally:
                await leases.end(name, units)
                await leases.end(name, units)
            assert shown(name, "ActiveState") == "inactive"
            assert not list(Path("/run").glob(f"dnsmasq-tap-{plan.tap}*"))
        Path("/run/systemd/system/dnsmasq-tap@.service").unlink()
        say("systemctl", "daemon-reload")


@pytest.fixture
def made() -> Iterator[World]:
    with world() as one:
        yield one


def both(made: World, *commands: str) -> None:
    """Each with the words ``HOST`` or ``NET`` first: where it is done."""
    for command in commands:
        where, *words = command.split()
        place = made.host if where == "HOST" else made.internet
        place.run(lambda words=words: say(*words))  # type: ignore[misc]


def by_vlan(made: World) -> str:
    both(
        made,
        "HOST ip link add link up0 name up0.7 type vlan id 7",
        "NET ip link add link net0 name net0.7 type vlan id 7",
        f"HOST ip address add {HERE} dev up0.7",
        f"NET ip address add {THERE} dev net0.7",
        "HOST ip link set up0.7 up",
        "NET ip link set net0.7 up",
        f"HOST ip route replace default via {THERE.ip}",
    )
    return "up0.7"


def by_wireguard(made: World) -> str:
    mine, theirs = say("wg", "genkey").strip(), say("wg", "genkey").strip()
    for place, name, key, at, peer, where in (
        (made.host, "wg0", mine, HERE, theirs, ("endpoint", "5.5.5.1:51820", "persistent-keepalive", "5")),
        (made.internet, "wg1", theirs, THERE, mine, ()),
    ):

        def up(name: str = name, key: str = key, at: IPv4Interface = at, peer: str = peer, where: tuple[str, ...] = where) -> None:
            say("ip", "link", "add", name, "type", "wireguard")
            say("wg", "set", name, "listen-port", "51820", "private-key", "/dev/stdin", given=key)
            public = say("wg", "pubkey", given=peer).strip()
            say("wg", "set", name, "peer", public, "allowed-ips", "0.0.0.0/0", *where)
            say("ip", "address", "add", str(at), "dev", name)
            say("ip", "link", "set", name, "up")

        place.run(up)
    both(made, "HOST ip route replace default dev wg0")
    return "wg0"


def pours(place: Place, address: str) -> int:
    """How much of what is sent to an echo comes back, in pieces larger than any packet on the way."""
    with place.connect(address, timeout=60) as connection:
        connection.recv(100)
        connection.settimeout(60)
        sent = got = 0
        while got < LOTS:
            if sent < LOTS and sent - got < 1 << 16:
                sent += connection.send(bytes(1 << 15))
            got += len(connection.recv(1 << 16))
        return got


@pytest.mark.parametrize("way", [by_vlan, by_wireguard])
@pytest.mark.parametrize("kind", ["run", "ns"])
def test_out_by_another_uplink(made: World, kind: str, way: Callable[[World], str]) -> None:
    """A machine is up while the host's way out becomes another; its next connections take that, as its new address there."""
    guest = made.machine(kind)
    assert guest.ask(SERVED[0]) == str(HOST.ip)
    uplink = way(made)
    assert guest.ask(SERVED[0], timeout=30) == guest.ask_udp(SERVED[1], timeout=30) == str(HERE.ip)
    assert pours(guest, SERVED[0]) >= LOTS, "a path with smaller packets than the machine's own link"
    made.internet.serve(str(THERE.ip))
    assert made.host.ask(str(THERE.ip), PORT, timeout=30) == str(HERE.ip)
    said = guest.ask(str(THERE.ip), PORT, timeout=2)
    assert said in ("PermissionError", "No route to host", "timeout"), "a private network is closed by whatever link it is on"
    both(made, f"HOST ip link delete {uplink}", f"HOST ip route replace default via {ROUTER.ip}")
