"""What requests and settings say of networks, before anything is made: policies, ports, ranges, addresses of one's own."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import TYPE_CHECKING, Final

from stoker.api.models import CreateSandbox, NetworkMode
from stoker.errors import CapacityExhausted, InvalidRequest
from stoker.network.plan import (
    NAMESPACE_RANGE,
    RUN_RANGE,
    BridgePlan,
    Range,
    RunPlan,
    Taken,
    first_guess,
    plan_run,
    plan_tap,
)

if TYPE_CHECKING:
    from stoker.engine.state import Record
    from stoker.network.dns_upstream import Server
    from stoker.settings import Settings

__all__ = [
    "DEFAULT",
    "NAMESPACE",
    "ON_THE_HOST",
    "check_network",
    "default_network",
    "forwards",
    "has_own_addresses",
    "has_own_interfaces",
    "name_servers",
    "planned",
    "planned_interfaces",
    "private_networks",
    "range_of",
    "ranges",
]

ON_THE_HOST: Final = (NetworkMode.NAT, NetworkMode.BRIDGE)
"""Those with an interface there, which a slot is."""
NAMESPACE: Final = NAMESPACE_RANGE.name
DEFAULT: Final = RUN_RANGE.name


def forwards() -> bool:
    with open("/proc/sys/net/ipv4/ip_forward", encoding="ascii") as file:
        return file.read().strip() == "1"


def default_network(settings: Settings) -> NetworkMode:
    """What a machine gets that asks for nothing."""
    if settings.network != "auto":
        try:
            return NetworkMode(settings.network)
        except ValueError:
            hint = "auto, nat, user or none"
            raise InvalidRequest("bad_setting", f"there is no network {settings.network!r}", hint) from None
    usable = os.geteuid() == 0 and os.path.exists("/dev/net/tun") and forwards()
    return NetworkMode.NAT if usable else NetworkMode.USER


def ranges(settings: Settings) -> dict[str, Range]:
    """By their names. Raises ``range_invalid`` (InvalidRequest)."""
    found = [Range.parse(NAMESPACE, settings.network_range), Range.parse(DEFAULT, settings.run_range)]
    for text in filter(None, (one.strip() for one in settings.ranges.split(","))):
        name, _, network = text.partition("=")
        found.append(Range.parse(name.strip(), network.strip()))
    if len({one.name for one in found}) != len(found):
        raise InvalidRequest("range_invalid", "two ranges have one name", f"{NAMESPACE} and {DEFAULT} are those of the settings")
    return {one.name: one for one in found}


def private_networks(settings: Settings) -> list[IPv4Network]:
    """Raises ``bad_setting`` (InvalidRequest)."""
    try:
        return [IPv4Network(one.strip()) for one in settings.private_networks.split(",") if one.strip()]
    except ValueError as error:
        raise InvalidRequest("bad_setting", f"private_networks: {error}", 'private_networks = "192.0.2.0/24"') from None


def name_servers(settings: Settings) -> list[Server]:
    """Raises ``bad_setting`` (InvalidRequest)."""
    from stoker.network.dns_upstream import Server

    try:
        return [Server.parse(one.strip()) for one in settings.resolvers.split(",") if one.strip()]
    except ValueError as error:
        raise InvalidRequest("bad_setting", f"resolvers: {error}", 'resolvers = "9.9.9.9, 192.0.2.1:5353"') from None


def has_own_addresses(request: CreateSandbox) -> bool:
    """Whether it is of the run plan: with an interface and addresses on the host that are its own."""
    return any(one is not None for one in (request.run_id, request.address_range, request.tap, request.bridge))


def has_own_interfaces(request: CreateSandbox) -> bool:
    """Whether no machine that is there already can have what it asks for."""
    return has_own_addresses(request) or bool(request.interfaces)


def range_of(known: Mapping[str, Range], name: str | None) -> Range:
    """Raises ``range_unknown`` (InvalidRequest)."""
    within = known.get(name or DEFAULT)
    if within is None or within.name == NAMESPACE:
        there = ", ".join(name for name in known if name != NAMESPACE)
        raise InvalidRequest("range_unknown", f"there is no range {name}", f"there are: {there}")
    return within


def planned(record: Record, known: Mapping[str, Range], taken: Taken) -> RunPlan | BridgePlan:
    """The slot of a sandbox with addresses of its own."""
    request = record.request
    if request.bridge is not None:
        return _bridge_plan(request.tap or first_guess("", record.id)[0], request.bridge, taken.names)
    within = range_of(known, request.address_range)
    if request.run_id is not None:
        return plan_run(request.run_id, [record.name or ""], taken, within)[record.name or ""]
    tap = request.tap or first_guess("", record.id)[0]
    return plan_tap(record.label, tap, taken, within)


def planned_interfaces(record: Record, taken: Taken) -> list[BridgePlan]:
    """The slots of its further interfaces. Raises ``tap_taken`` (CapacityExhausted)."""
    names, plans = set(taken.names), []
    for index, asked in enumerate(record.request.interfaces, 1):
        plans.append(_bridge_plan(asked.tap or first_guess(str(index), record.id)[0], asked.bridge, names))
        names.add(plans[-1].tap)
    return plans


def _bridge_plan(tap: str, bridge: str, names: Collection[str]) -> BridgePlan:
    if tap in names:
        raise CapacityExhausted("tap_taken", f"there is an interface {tap} already", f"ip -d link show {tap}")
    return BridgePlan(tap, bridge)


def check_network(request: CreateSandbox) -> None:
    """Refuses what can never be: ``bad_network``, ``egress_invalid``, ``port_invalid`` (InvalidRequest)."""
    if request.network is not NetworkMode.NAT:
        if request.egress is not None or request.publish or request.host_access or request.learn:
            raise InvalidRequest("bad_network", "a policy and ports are for the network nat", "--network nat")
        if request.connections or request.ipv6:
            raise InvalidRequest("bad_network", "a limit of connections and IPv6 are for the network nat", "--network nat")
        if (request.rate_in or request.rate_out) and request.network is not NetworkMode.BRIDGE and not request.interfaces:
            raise InvalidRequest("bad_network", "rates are for the networks nat and bridge", "--network nat")
    _check_bridge(request)
    if request.network not in ON_THE_HOST and has_own_addresses(request):
        raise InvalidRequest("bad_network", "addresses of one's own are for the network nat", "--network nat")
    if request.run_id is not None and (request.name is None or request.tap is not None):
        raise InvalidRequest(
            "run_unnamed", "with a run id the interface and addresses follow from it and a name", "--run-id ID --name NAME"
        )
    if request.egress or request.publish:
        from stoker.engine.judged import check_policy

        check_policy(request)


def _check_bridge(request: CreateSandbox) -> None:
    bridged = request.network is NetworkMode.BRIDGE
    if bridged != (request.bridge is not None):
        raise InvalidRequest("bad_network", "the network bridge and the name of a bridge go together", "--network bridge:br0")
    if not bridged and (request.address is not None or request.gateway is not None):
        raise InvalidRequest("bad_network", "an address and a gateway are for the network bridge", "--network bridge:br0")
    if bridged and (request.run_id is not None or request.address_range is not None):
        raise InvalidRequest("bad_network", "addresses on a bridge are the operator's", "--network nat")
    taps = [one.tap for one in request.interfaces if one.tap is not None]
    if len({*taps, request.tap}) != len(taps) + 1:
        raise InvalidRequest("bad_network", "two interfaces cannot have one name", "name them with tap=")
    try:
        own = IPv4Interface(request.address) if request.address is not None else None
        for one in filter(None, (one.address for one in request.interfaces)):
            IPv4Interface(one)
        by = IPv4Address(request.gateway) if request.gateway is not None else None
    except ValueError as error:
        raise InvalidRequest("bad_network", str(error), "--address 192.168.1.50/24 --gateway 192.168.1.1") from None
    if by is not None and (own is None or by not in own.network):
        raise InvalidRequest("bad_network", f"the gateway {by} is not in the network of its address", "--address 192.168.1.50/24")
