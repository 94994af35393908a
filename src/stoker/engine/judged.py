"""What the firewall is told of a sandbox: its policy, its ports, its limits.

Only where a machine has an interface on the host is this needed, and imported.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import AddressValueError, IPv4Address
from typing import TYPE_CHECKING

from stoker.errors import InvalidRequest
from stoker.network.bridged import Port
from stoker.network.egress import ALL, Egress, parse_egress
from stoker.network.egress import Protocol as Transport
from stoker.network.plan import BridgePlan, NamespacePlan, RunPlan
from stoker.network.rules import SERVICES, Machine, Publication

if TYPE_CHECKING:
    from stoker.api.models import CreateSandbox
    from stoker.engine.state import Record

__all__ = ["check_policy", "egress_of", "machine_of", "port_of", "publication_of"]


def check_policy(request: CreateSandbox) -> None:
    """Raises ``egress_invalid``, ``port_invalid`` (InvalidRequest)."""
    egress_of(request.egress)
    seen = [(one.protocol, one.host_port, one.host_address) for one in map(publication_of, request.publish)]
    if len(set(seen)) != len(seen):
        raise InvalidRequest("port_invalid", "a port of the host is published twice", "name each once")


def port_of(record: Record, plan: BridgePlan) -> Port:
    """What the firewall knows of a sandbox on a bridge."""
    return Port(plan.interface, plan.mac, record.request.rate_in, record.request.rate_out)


def machine_of(record: Record, plan: RunPlan | NamespacePlan) -> Machine:
    """What the firewall knows of a sandbox."""
    egress = replace(egress_of(record.request.egress), learn=record.request.learn)
    names = egress.has_domains or egress.learn
    return Machine(
        plan.interface,
        plan.source_mac,
        plan.address,
        egress,
        published=tuple(publication_of(text) for text in record.request.publish),
        host_services=SERVICES if names else (),
        host_access=record.request.host_access,
        rate_in=record.request.rate_in,
        rate_out=record.request.rate_out,
        connections=record.request.connections,
        ipv6=record.request.ipv6,
        resolver=plan.host if names else None,
    )


def egress_of(text: str | None) -> Egress:
    """Empty: everything public. Errors: ``egress_invalid`` (InvalidRequest)."""
    return parse_egress(text) if text else ALL


def publication_of(text: str) -> Publication:
    """``[IP:]HOST:GUEST[/udp]``. Errors: ``port_invalid`` (InvalidRequest)."""
    ports, _, protocol = text.partition("/")
    address, host, guest = ["", *ports.rsplit(":", 2)][-3:] if ":" in ports else ("", "", "")
    try:
        numbers = [int(port) for port in (host, guest) if port.isascii() and port.isdigit()]
        if len(numbers) != 2 or not all(0 < number < 65536 for number in numbers):
            raise ValueError
        where = IPv4Address(address) if address else None
        transport = Transport(protocol or "tcp")
        if transport is Transport.ICMP:
            raise ValueError
        return Publication(transport, numbers[0], numbers[1], where)
    except (ValueError, AddressValueError):
        raise InvalidRequest(
            "port_invalid", f"{text[:60]!r} is no port to publish", "8080:80, 127.0.0.1:8080:80, 5353:53/udp"
        ) from None
