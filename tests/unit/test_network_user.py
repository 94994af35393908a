"""The address plan of the user network, and the host's addresses."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv4Network

import pytest

from stoker.host.addresses import RTM_NEWADDR, RTM_NEWROUTE, _network, host_addresses, parse_messages
from stoker.network.user import DENIED, plan_user_network
from stoker.vmm.shim import filter_rules


def denied(address: str, *host: str) -> bool:
    return any(IPv4Address(address) in IPv4Network(network) for network in plan_user_network(host).denied)


def test_the_plan() -> None:
    plan = plan_user_network(("8.8.4.4/32",))
    assert (plan.address, plan.gateway, plan.nameserver) == ("10.0.2.15/24", "10.0.2.2", "10.0.2.3")
    assert int(plan.mac[:2], 16) & 1 == 0, "a unicast address"
    assert filter_rules(plan).splitlines()[:2] == ["nameserver 10.0.2.3", "deny 0.0.0.0/8"]
    assert "deny 8.8.4.4/32" in filter_rules(plan).splitlines()


@pytest.mark.parametrize(
    "address",
    "0.1.2.3 10.0.2.2 10.0.2.3 100.64.0.1 127.0.0.53 169.254.169.254 172.16.0.1 172.31.255.255 192.168.0.1 192.0.0.8 198.19.0.1"
    " 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255".split(),
)
def test_special_addresses_are_denied(address: str) -> None:
    assert denied(address)


@pytest.mark.parametrize(
    "address", "1.1.1.1 9.255.255.255 11.0.0.0 100.63.0.1 100.128.0.1 126.1.1.1 172.15.0.1 172.32.0.1 223.255.255.1".split()
)
def test_public_addresses_are_not_unless_they_are_the_hosts(address: str) -> None:
    assert not denied(address) and denied(address, f"{address}/32")


def test_networks_are_not_lost_when_they_are_joined() -> None:
    before = [IPv4Network(network) for network in DENIED]
    after = [IPv4Network(network) for network in plan_user_network(("127.0.0.0/8", "10.1.2.3/32")).denied]
    assert all(any(network.subnet_of(wide) for wide in after) for network in before)
    assert sum(network.num_addresses for network in after) == sum(network.num_addresses for network in before)


def test_this_hosts_addresses() -> None:
    found = host_addresses()
    assert "127.0.0.1/32" in found and "127.0.0.0/8" in found
    assert all(IPv4Network(network) for network in found)


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body


def test_messages_are_read_by_kind() -> None:
    address = bytes([socket.AF_INET, 24, 0, 0]) + bytes(4)
    # On a link between two points IFA_ADDRESS is the other end, IFA_LOCAL ours.
    ours = attribute(1, socket.inet_aton("203.0.113.1")) + attribute(3, b"eth0\0") + attribute(2, socket.inet_aton("5.5.5.5"))
    local = bytes([socket.AF_INET, 24, 0, 0, 255, 0, 0, 2]) + bytes(4) + attribute(1, socket.inet_aton("7.7.7.0"))
    everything = bytes([socket.AF_INET, 0, 0, 0, 255, 0, 0, 2]) + bytes(4)
    unicast = bytes([socket.AF_INET, 24, 0, 0, 254, 0, 0, 1]) + bytes(4) + attribute(1, socket.inet_aton("9.9.9.0"))
    other = bytes([socket.AF_INET6, 64, 0, 0]) + bytes(4) + attribute(1, bytes(16))
    stream = b"".join(
        [
            message(RTM_NEWADDR, address + ours),
            message(RTM_NEWROUTE, local),
            message(RTM_NEWROUTE, everything),
            message(RTM_NEWROUTE, unicast),
            message(RTM_NEWADDR, other),
        ]
    )
    assert [_network(kind, body) for kind, body in parse_messages(stream)] == ["5.5.5.5/32", "7.7.7.0/24", "0.0.0.0/0", None, None]


@pytest.mark.parametrize(
    "junk", [b"", b"\0" * 16, b"\xff" * 40, message(RTM_NEWADDR, b""), message(RTM_NEWROUTE, b"\x02\x20" + bytes(10) + b"\x01")]
)
def test_damaged_messages_are_nothing(junk: bytes) -> None:
    assert not [found for kind, body in parse_messages(junk) if (found := _network(kind, body)) not in (None, "0.0.0.0/32")]
