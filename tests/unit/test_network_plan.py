"""Address plans: values that anybody can compute, and properties that hold whatever is taken."""

from __future__ import annotations

import hashlib
import json
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.errors import CapacityExhausted, InvalidRequest
from stoker.network.plan import (
    INSIDE,
    NAMESPACE_RANGE,
    RUN_RANGE,
    Foreign,
    Range,
    Taken,
    check_ranges,
    first_guess,
    number_of,
    parse_any_slot,
    parse_slot,
    plan_bridge,
    plan_namespace,
    plan_run,
    plan_tap,
    ula,
    ula_beside,
)

NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=20)
SMALL = Range("small", IPv4Network("172.20.4.0/24"))
BLOCKS = st.lists(
    st.builds(
        lambda number, prefix: IPv4Network((int(SMALL.network.network_address) + number, prefix), strict=False),
        st.integers(0, 255),
        st.integers(26, 32),
    ),
    max_size=12,
)


def test_the_plan_of_a_run_by_value() -> None:
    digest = hashlib.md5(b"nightly-web", usedforsecurity=False).hexdigest()
    assert digest == "1c77f5b255d930bb393fb5494876f50e"
    plan = plan_run("nightly", ["web"], Taken())["web"]
    number = 0xF50E & 0x3FFF
    assert first_guess("nightly", "web") == ("tap1c77f5b255d9", number)
    third, fourth = divmod(number, 64)
    assert plan.as_dict() == {
        "name": "tap1c77f5b255d9",
        "host_ip": f"172.16.{third}.{fourth * 4 + 1}",
        "guest_ip": f"172.16.{third}.{fourth * 4 + 2}",
        "mac": f"02:fc:ac:10:{third:02x}:{fourth * 4 + 2:02x}",
        "network": f"172.16.{third}.{fourth * 4}/30",
    }
    json.dumps(plan.as_dict())
    assert plan.id == f"run:tap1c77f5b255d9:{plan.guest}/30"
    assert plan.address == plan.guest and plan.source_mac == plan.mac != plan.tap_mac


def test_the_namespace_plan_by_value() -> None:
    plan = plan_namespace(Taken())
    assert (INSIDE.tap, str(INSIDE.gateway), str(INSIDE.guest), INSIDE.guest_mac) == (
        "tap0",
        "169.254.0.22/30",
        "169.254.0.21/30",
        "02:fc:00:00:00:05",
    )
    assert (plan.veth, str(plan.host), str(plan.address), plan.mac) == ("stk64500000", "100.80.0.0", "100.80.0.1", INSIDE.guest_mac)
    assert plan.id == "ns:stk64500000:100.80.0.1/31"
    assert plan_namespace(Taken(), after=0).id == "ns:stk64500002:100.80.0.3/31"
    assert number_of(plan_namespace(Taken(), after=41), NAMESPACE_RANGE) == 42
    assert number_of(plan_namespace(Taken(), after=32767), NAMESPACE_RANGE) == 0, "and from the beginning"


@given(st.text(max_size=20), st.lists(NAMES, max_size=40, unique=True), BLOCKS)
def test_a_run_gets_different_free_places(run_id: str, names: list[str], blocks: list[IPv4Network]) -> None:
    try:
        plans = plan_run(run_id, names, Taken(networks=blocks), SMALL)
    except CapacityExhausted:
        free = [part for part in SMALL.network.subnets(new_prefix=30) if not any(part.overlaps(block) for block in blocks)]
        assert len(free) < len(names)
        return
    assert list(plans) == names
    for one in plans.values():
        assert one.network.subnet_of(SMALL.network) and one.network.prefixlen == 30
        assert not any(one.network.overlaps(block) for block in blocks)
        assert len(one.tap) == 15
        assert parse_slot(one.id).id == one.id
    assert len({one.network for one in plans.values()}) == len({one.tap for one in plans.values()}) == len(names)
    assert plan_run(run_id, names, Taken(networks=blocks), SMALL) == plans, "the same again"


@given(NAMES, NAMES)
def test_where_nothing_is_taken_the_first_guess_holds(run_id: str, name: str) -> None:
    plan = plan_run(run_id, [name], Taken())[name]
    tap, number = first_guess(run_id, name)
    assert (plan.tap, int(plan.network.network_address) - int(RUN_RANGE.network.network_address)) == (tap, number * 4)


@given(BLOCKS, st.integers(-1, 200))
def test_namespaces_keep_clear_and_come_round(blocks: list[IPv4Network], after: int) -> None:
    free = [part for part in SMALL.network.subnets(new_prefix=31) if not any(part.overlaps(block) for block in blocks)]
    if not free:
        with pytest.raises(CapacityExhausted):
            plan_namespace(Taken(networks=blocks), SMALL, after=after)
        return
    plan = plan_namespace(Taken(networks=blocks), SMALL, after=after)
    start = (after + 1) % 128
    wanted = min(free, key=lambda part: ((int(part.network_address) - int(SMALL.network.network_address)) // 2 - start) % 128)
    assert plan.network == wanted
    assert parse_slot(plan.id) == plan


def test_a_taken_tap_or_network_moves_on() -> None:
    tap, number = first_guess("r", "m")
    usual = plan_run("r", ["m"], Taken())["m"]
    moved = plan_run("r", ["m"], Taken([tap], [usual.network, IPv4Network("0.0.0.0/0")]))["m"]
    assert moved.tap != tap and moved.tap.startswith("tap") and len(moved.tap) == 15
    assert int(moved.network.network_address) == int(usual.network.network_address) + 4
    with pytest.raises(InvalidRequest, match="one name"):
        plan_run("r", ["m", "m"], Taken())
    with pytest.raises(CapacityExhausted, match="small"):
        plan_run("r", ["m"], Taken(networks=[SMALL.network]), SMALL)


def test_a_named_range_gives_its_first_free_place() -> None:
    apps = Range.parse("apps", "172.19.0.0/16")
    plan = plan_tap("db", "db0", Taken(networks=[IPv4Network("172.19.0.0/29")]), apps)
    assert (plan.tap, str(plan.network)) == ("db0", "172.19.0.8/30")
    with pytest.raises(CapacityExhausted, match="db0"):
        plan_tap("db", "db0", Taken(["db0"]), apps)
    for name in ("", "a" * 16, "tap*", "a b", 'x"', "../x", "a/b", "-x"):
        with pytest.raises(InvalidRequest):
            plan_tap("db", name, Taken(), apps)


@pytest.mark.parametrize(
    "text",
    ["172.19.0.1/16", "172.19.0.0/31", "10.0.0.0/4", "127.0.0.0/16", "224.0.0.0/8", "169.254.0.0/16", "240.0.0.0/8", "x", "::/64"],
)
def test_bad_ranges(text: str) -> None:
    with pytest.raises(InvalidRequest, match="range apps"):
        Range.parse("apps", text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "run",
        "run:tap0:1.2.3.4",
        "run:tap0:1.2.3.5/30",
        "run:ta p:1.2.3.6/30",
        "ns:stk1:1.2.3.4/31",
        "ns:stk1:1.2.3.5/30",
        "x:a:1.2.3.6/30",
    ],
)
def test_bad_slots(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no slot"):
        parse_slot(text)
    assert parse_slot("run:tap0:1.2.3.6/30").address == IPv4Address("1.2.3.6")


def test_ranges_against_the_host() -> None:
    vpn = Foreign(IPv4Network("172.16.0.0/12"), "is routed to wg0")
    docker = Foreign(IPv4Interface("172.16.4.1/24").network, "docker0 has the address 172.16.4.1/24 of")
    every = Foreign(IPv4Network("0.0.0.0/0"), "is routed to eth0")
    assert check_ranges([RUN_RANGE, NAMESPACE_RANGE], [docker, every]) == []
    assert check_ranges([RUN_RANGE], [vpn]) == ["the range default (172.16.0.0/16) lies in 172.16.0.0/12, which is routed to wg0"]
    inner = Range("inner", IPv4Network("172.16.8.0/24"))
    assert check_ranges([RUN_RANGE, inner], []) == ["the range inner (172.16.8.0/24) overlaps the range default (172.16.0.0/16)"]


def test_ipv6_addresses_follow_from_ipv4() -> None:
    assert str(ula(IPv4Address("172.16.109.218"))) == "fd73:746f:6b65::ac10:6dda"
    assert str(ula_beside(IPv4Interface("172.16.109.218/30"))) == "fd73:746f:6b65::ac10:6dda/126"
    assert str(INSIDE.guest6) == "fd73:746f:6b65::a9fe:15/126" and INSIDE.gateway6.network == INSIDE.guest6.network


def test_a_port_of_a_bridge() -> None:
    plan = plan_bridge("br0", Taken(), "tap7")
    assert (plan.id, plan.interface) == ("bridge:tap7:br0", "tap7") and parse_any_slot(plan.id) == plan
    assert plan.mac.startswith("02:") and plan.tap_mac == "fe" + plan.mac[2:] and plan.mac != plan_bridge("br0", Taken()).mac
    with pytest.raises(CapacityExhausted, match="tap7"):
        plan_bridge("br0", Taken(["tap7"]), "tap7")
    for bridge, tap in (("a b", ""), ("br0", 'x"'), ("x" * 16, "")):
        with pytest.raises(InvalidRequest, match="no name for an interface"):
            plan_bridge(bridge, Taken(), tap)
    with pytest.raises(InvalidRequest, match="no slot"):
        parse_slot(plan.id)
