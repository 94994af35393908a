"""``stoker bench network``: network slots made, used again and given back, against the same by spawned tools; many at once; and
what goes through one from a real guest (:mod:`.transfer`).

Everything is in a namespace of the benchmark's own, with an uplink that leads to another one: the real host's is not touched.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stoker.cli.bench.report import Report, percentile
from stoker.cli.options import SIZE
from stoker.errors import StokerError

if TYPE_CHECKING:
    from stoker.host.namespaces import Namespace
    from stoker.network.plan import NamespacePlan, RunPlan
    from stoker.network.slot import Slot, Slots

__all__ = ["network"]

T = TypeVar("T")
NAMED = Path("/run/netns")
"""Where `ip netns` has its namespaces."""
REFERENCE = 5
"""Runs by spawned tools. They take a tenth of a second each."""
TENTH = 100
TURNS = 7
MIB = 1 << 20


def _timed(into: list[float], work: Callable[[], T]) -> T:
    began = time.perf_counter()
    result = work()
    into.append(time.perf_counter() - began)
    return result


def _milliseconds(values: Sequence[float]) -> float:
    return round(1000 * percentile(values, 0.5), 2)


@contextmanager
def _slots() -> Iterator[tuple[Slots, Namespace]]:
    """In the calling thread's namespace, which gets an uplink; and the namespace that this leads to."""
    from stoker.host import netlink
    from stoker.host.namespaces import Namespace
    from stoker.network.firewall import Firewall
    from stoker.network.plan import NAMESPACE_RANGE, RUN_RANGE
    from stoker.network.slot import Slots

    with ExitStack() as stack:
        beyond, _ = Namespace.create(lambda _: None)
        stack.callback(beyond.close)
        with netlink.Netlink() as link:
            link.apply(
                netlink.add_veth(netlink.End("up0", "02:aa:00:00:00:01"), netlink.End("net0", "02:aa:00:00:00:02"), beyond.fd)
            )
            beyond.run(_raise_uplink)
            index = socket.if_nametoindex("up0")
            link.apply(
                netlink.set_link(index, "up0", up=True),
                netlink.add_address(index, IPv4Interface("5.5.5.5/24"), "up0"),
                netlink.add_route(IPv4Network("0.0.0.0/0"), gateway=IPv4Address("5.5.5.1")),
            )
        with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
            file.write("1")
        firewall = stack.enter_context(Firewall.open([RUN_RANGE.network, NAMESPACE_RANGE.network], log_group=1))
        yield stack.enter_context(Slots.open(firewall)), beyond


def _raise_uplink() -> None:
    from stoker.cli.bench.transfer import FAR
    from stoker.host import netlink

    index = socket.if_nametoindex("net0")
    with netlink.Netlink() as link:
        link.apply(netlink.set_link(index, "net0", up=True), netlink.add_address(index, IPv4Interface((FAR, 24)), "net0"))


def _plans(slots: Slots, kind: str, count: int) -> list[RunPlan | NamespacePlan]:
    from stoker.network.plan import plan_namespace, plan_run

    if kind == "run":
        return [*plan_run("bench", [f"machine{number}" for number in range(count)], slots.taken()).values()]
    plans: list[RunPlan | NamespacePlan] = []
    for _ in range(count):
        plans.append(plan_namespace(slots.taken(plans)))
    return plans


def _up(slots: Slots, plan: RunPlan | NamespacePlan) -> Slot:
    from stoker.network.egress import ALL
    from stoker.network.rules import Machine

    return slots.up(plan, Machine(plan.interface, plan.source_mac, plan.address, ALL))


def _one_by_one(slots: Slots, kind: str, runs: int) -> tuple[list[float], dict[str, Any]]:
    from stoker.network.egress import ALL
    from stoker.network.rules import Machine

    up: list[float] = []
    parked: list[float] = []
    again: list[float] = []
    given_back: list[float] = []
    gone: list[float] = []
    for plan in _plans(slots, kind, runs):
        slot = _timed(up, partial(_up, slots, plan))
        _timed(parked, partial(slots.park, slot)).result()
        machine = Machine(plan.interface, plan.source_mac, plan.address, ALL)
        _timed(again, partial(slots.reuse, slot, machine))
        left = _timed(given_back, partial(slots.drop, plan, slot))
        _timed(gone, left.result)
    return up, {
        "recycled_p50_ms": _milliseconds(again),
        "parked_p50_ms": _milliseconds(parked),
        "given_back_p50_ms": _milliseconds(given_back),
        "gone_behind_p50_ms": _milliseconds(gone),
    }


def _commands(plan: RunPlan | NamespacePlan, name: str) -> tuple[list[list[str]], list[list[str]]]:
    """What a script would spawn for the same slot, and to remove it."""
    from stoker.network.plan import INSIDE, RunPlan

    host, interface = str(plan.host), plan.interface
    rules = [
        ["nft", "add", "rule", "inet", "reference", chain, *words]
        for chain, words in (
            ("guard", ["iifname", interface, "ip", "saddr", "!=", str(plan.address), "drop"]),
            ("forward", ["iifname", interface, "accept"]),
            ("forward", ["oifname", interface, "ct", "state", "established", "accept"]),
            ("source", ["ip", "saddr", str(plan.address), "masquerade"]),
        )
    ]
    if isinstance(plan, RunPlan):
        tap = ["ip", "tuntap", "add", interface, "mode", "tap"]
        up = [tap, ["ip", "address", "add", f"{host}/30", "dev", interface], ["ip", "link", "set", interface, "up"]]
        return [*up, *rules], [["ip", "link", "del", interface]]
    # (`ip -n` and `ip netns exec` change mounts as well, which cannot be done everywhere.)
    there = ["nsenter", f"--net={NAMED}/{name}"]
    inside = [*there, "ip"]
    up = [
        ["ip", "netns", "add", name],
        ["ip", "link", "add", interface, "type", "veth", "peer", "name", INSIDE.out, "netns", name],
        [*inside, "tuntap", "add", INSIDE.tap, "mode", "tap"],
        [*inside, "link", "set", "lo", "up"],
        [*inside, "address", "add", str(INSIDE.gateway), "dev", INSIDE.tap],
        [*inside, "link", "set", INSIDE.tap, "up"],
        [*inside, "address", "add", f"{plan.address}/31", "dev", INSIDE.out],
        [*inside, "link", "set", INSIDE.out, "up"],
        ["ip", "address", "add", f"{host}/31", "dev", interface],
        ["ip", "link", "set", interface, "up"],
        [*inside, "route", "add", "default", "via", host],
        [*there, "nft", "add table ip nat; add chain ip nat out { type nat hook postrouting priority 100; }"],
        [*there, "nft", "add rule ip nat out masquerade"],
    ]
    return [*up, *rules], [["ip", "netns", "del", name]]


def _reference(slots: Slots, kind: str) -> tuple[list[float], list[str]]:
    """The same by spawning `ip` and `nft`: seconds of each run, and what failed."""
    from stoker.host.mounts import mounted_at, umount
    from stoker.host.run import run

    async def all_of(commands: list[list[str]], check: bool = True) -> None:
        for words in commands:
            await run(words, check=check, timeout=30)

    def spawned(commands: list[list[str]]) -> None:
        asyncio.run(all_of(commands))

    chains = "; ".join(
        f"add chain inet reference {name} {{ type {hook}; }}"
        for name, hook in (
            ("guard", "filter hook prerouting priority -300"),
            ("forward", "filter hook forward priority 0"),
            ("source", "nat hook postrouting priority 100"),
        )
    )
    taken: list[float] = []
    failures: list[str] = []
    mounted = mounted_at(NAMED)
    try:
        asyncio.run(all_of([["nft", f"add table inet reference; {chains}"]]))
        for number, plan in enumerate(_plans(slots, kind, REFERENCE)):
            up, down = _commands(plan, f"stoker-bench-{os.getpid()}-{number}")
            try:
                _timed(taken, partial(spawned, up))
            finally:
                asyncio.run(all_of(down, check=False))
        asyncio.run(all_of([["nft", "delete table inet reference"]]))
    except StokerError as error:
        failures.append(f"reference: {error.message}")
    finally:
        if mounted is None and mounted_at(NAMED) is not None:  # by the first `ip netns add` of this host
            with suppress(OSError):
                umount(NAMED)
    return taken, failures


def _packet(plan: RunPlan | NamespacePlan, port: int) -> bytes:
    """A frame of the machine's from a port to a public address, with its virtio header."""
    from stoker.network.plan import INSIDE, RunPlan

    gateway = plan.tap_mac if isinstance(plan, RunPlan) else INSIDE.tap_mac
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 32, 1, 0, 64, 17, 0, plan.guest.packed, IPv4Address("1.1.1.1").packed)
    total = sum(struct.unpack("!10H", header))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    header = header[:10] + struct.pack("!H", checksum) + header[12:]
    link = bytes.fromhex((gateway + plan.mac).replace(":", "")) + b"\x08\x00"
    return bytes(10) + link + header + struct.pack("!HHHH", port, 53, 12, 0) + b"test"


def _passed(slot: Slot, port: int) -> int:
    """How many rules of the host's a new connection's packet passes, by the kernel's own trace. Each from a port of its own."""
    from stoker.host.nftables import Nftables
    from stoker.host.run import run

    async def look() -> str:
        watch = asyncio.ensure_future(run(["timeout", "1", "nft", "monitor", "trace"], success=(124,), timeout=20))
        await asyncio.sleep(0.4)
        os.write(slot.tap, _packet(slot.plan, port))
        return (await watch).stdout.decode(errors="replace")

    hook = "add chain inet watch first { type filter hook prerouting priority -500; }"
    rule = f'add rule inet watch first iifname "{slot.plan.interface}" meta nftrace set 1'
    with Nftables() as nft:
        nft.apply(["add table inet watch", hook, rule])
        try:
            said = asyncio.run(look())
        finally:
            nft.apply(["delete table inet watch"])
    return sum(" rule " in line and "inet watch" not in line for line in said.splitlines())


def _crowd(slots: Slots, many: int) -> dict[str, Any]:
    """So many at once: the last against the first, and the rules a packet passes."""
    up: list[float] = []
    made: list[Slot] = []
    passed: list[int] = []
    try:
        plans = _plans(slots, "namespace", many)
        for plan in plans:
            made.append(_timed(up, partial(_up, slots, plan)))
            if len(made) in (1, many):
                passed.append(_passed(made[0], 4000 + len(made)))
    finally:
        began = time.perf_counter()
        for future in [slots.drop(slot.plan, slot) for slot in made]:
            future.result()
        gone = time.perf_counter() - began
    edge = min(TENTH, max(1, many // 2))
    first, last = statistics.median(up[:edge]), statistics.median(up[-edge:])
    return {
        "slots": many,
        "first_ms": round(1000 * first, 2),
        "last_ms": round(1000 * last, 2),
        "last_over_first": round(last / first, 2),
        "rules_passed_first_and_last": passed,
        "all_gone_s": round(gone, 2),
    }


def _through(slots: Slots, beyond: Namespace, kind: str, image: str, size: int) -> Report:
    """From a guest, and the same guest on its bare TAP."""
    from stoker.cli.bench.transfer import transfer

    (plan,) = _plans(slots, kind, 1)
    slot = _up(slots, plan)
    try:
        nat, bare = asyncio.run(transfer(slots, slot, beyond, image, size, TURNS))
    finally:
        slots.drop(plan, slot).result()
    # Of two transfers that followed each other: what else the host did slowed both.
    ratios = {
        f"of a bare TAP, {way} the guest": statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
        for way, ours, theirs in (("out of", nat.upload, bare.upload), ("into", nat.download, bare.download))
    }
    more = {"bytes": size, "mb_s": nat.medians(), "bare_tap_mb_s": bare.medians()}
    return Report(f"TCP through NAT, {kind} plan", [size / rate for rate in (*nat.upload, *nat.download)], (), ratios, more)


def _bench(runs: int, many: int, size: int, image: str, as_json: bool) -> int:
    failed = 0
    with _slots() as (slots, beyond):
        _one_by_one(slots, "namespace", 2)  # imports, and the kernel's own first times
        for kind in ("namespace", "run"):
            reference, failures = _reference(slots, kind)
            seconds, more = _one_by_one(slots, kind, runs)
            ratios = {"faster than spawned ip and nft": percentile(reference, 0.5) / percentile(seconds, 0.5)} if reference else {}
            if reference:
                more["spawned_p50_ms"] = _milliseconds(reference)
            if kind == "namespace" and many:
                more |= _crowd(slots, many)
            Report(f"network slot, {kind} plan", seconds, failures, ratios, more).print(as_json)
            failed += bool(failures)
            if size:
                _through(slots, beyond, kind, image, size).print(as_json)
    return 1 if failed else 0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each measurement.")
@click.option(
    "-n", "--runs", type=click.IntRange(1, 10000), default=100, show_default=True, help="Slots that are timed one by one."
)
@click.option("--slots", "many", type=click.IntRange(0, 10000), default=500, show_default=True, help="Slots at once; 0: none.")
@click.option("--size", type=SIZE, default="128M", show_default=True, help="What a guest sends and gets, whole MiB; 0: no guest.")
@click.argument("image", default="debian:12")
def network(*, as_json: bool, runs: int, many: int, size: int, image: str) -> int:
    """Time network slots of both plans, against the same by spawned `ip` and `nft` in the same run; and TCP from a guest through
    each plan, against the same guest on its bare TAP. Needs root."""
    from stoker.host.namespaces import Namespace

    size = size // MIB * MIB
    namespace, code = Namespace.create(lambda _: _bench(runs, many, size, image, as_json))
    namespace.close()
    return code
