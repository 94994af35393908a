"""Makes and drops a slot in a namespace that it is given, and dies at a trace point: ``slot_worker.py FD SLOT POINT``."""

from __future__ import annotations

import ctypes
import sys

from stoker.host.trace import arm
from stoker.network.bridged import Port
from stoker.network.egress import parse_egress
from stoker.network.firewall import Firewall
from stoker.network.plan import NAMESPACE_RANGE, RUN_RANGE, BridgePlan, parse_any_slot
from stoker.network.rules import Machine, Protocol, Publication
from stoker.network.slot import Slots

descriptor, text, point = sys.argv[1:]
assert ctypes.CDLL(None).setns(int(descriptor), 0x40000000) == 0
plan = parse_any_slot(text)
policy = parse_egress("allow: example.org, 1.1.1.1")
ports = (Publication(Protocol.TCP, 9000, 80),)
firewall = Firewall.open([RUN_RANGE.network, NAMESPACE_RANGE.network], log_group=5300)
with Slots.open(firewall) as slots:
    arm(point)
    if isinstance(plan, BridgePlan):
        joined = slots.join(plan, Port(plan.interface, plan.mac))
        slots.drop(plan, joined).result(20)
        sys.exit()
    slot = slots.up(plan, Machine(plan.interface, plan.source_mac, plan.address, policy, ports))
    slots.drop(plan, slot).result(20)
