"""The networks of sandboxes as they are seen: counters and denials, what was learned, and why a port is reached or not.

What it takes to look is imported when somebody asks: a daemon starts without.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from stoker.api.models import (
    Denial,
    ExplainNetwork,
    ExplainStep,
    Explanation,
    LearnedNetwork,
    NetworkCounters,
    NetworkMode,
    NetworkStatus,
    Principal,
    Transport,
    Verdict,
)
from stoker.engine.state import require
from stoker.errors import Conflict, InvalidRequest

if TYPE_CHECKING:
    from stoker.engine.core import Box, Core
    from stoker.network.facts import Facts

__all__ = ["NetworksSeen", "told"]


class NetworksSeen:
    """Fits ``server.network_ports.NetworksSeen``."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def _find(self, who: Principal, sandbox: str) -> Box:
        box = self._core.find(who, sandbox)
        if box.record.request.network is not NetworkMode.NAT:
            mode = box.record.request.network or NetworkMode.USER
            raise InvalidRequest(
                "bad_network", f"{box.record.label} has the network {mode.value}, and no interface on the host", "--network nat"
            )
        return box

    async def show(self, who: Principal, sandbox: str) -> NetworkStatus:
        from stoker.network.firewall import Counters

        box = self._find(who, sandbox)
        core, record, value = self._core, box.record, box.value
        counted = Counters()
        if record.slot:
            firewall, machine, _, _ = await core.networks.seen(record)
            counted = await asyncio.to_thread(firewall.counters_of, machine.interface)
        return NetworkStatus(
            sandbox=box.id,
            network=value.network,
            interface=value.interface,
            address=value.address,
            slot=record.slot,
            egress=value.egress,
            learn=record.request.learn,
            publish=value.publish,
            counters=NetworkCounters(
                sent=counted.sent, sent_bytes=counted.sent_bytes, denied=counted.denied, refused=counted.refused
            ),
            denials=[
                Denial(
                    protocol=one.word,
                    destination=None if one.destination is None else str(one.destination),
                    port=one.port,
                    first_at=one.first,
                    last_at=one.last,
                    times=one.times,
                )
                for one in core.networks.denials.recent(box.id)
            ],
            logged=core.networks.denials.logged,
        )

    async def learned(self, who: Principal, sandbox: str) -> LearnedNetwork:
        from stoker.engine.judged import egress_of
        from stoker.network.explain import wider

        box = self._find(who, sandbox)
        learned = self._core.networks.denials.learned(box.id)
        if learned is None:
            raise Conflict(
                "not_learned", f"{box.record.label} was not learned from", f"stoker network set {box.record.label} --learn"
            )
        rules = learned.rules()
        egress = wider(egress_of(box.record.request.egress), ", ".join(rules)) if rules else ""
        seen = learned.as_dict()
        return LearnedNetwork(sandbox=box.id, rules=rules, egress=egress, names=seen["names"], lost=learned.lost)

    async def explain(self, who: Principal, sandbox: str, request: ExplainNetwork) -> Explanation:
        from stoker.engine.gathering import AgentInside, gather
        from stoker.host.namespaces import Namespace, own_namespace
        from stoker.network.egress import Protocol
        from stoker.network.facts import parse_target
        from stoker.network.looking import Looking
        from stoker.network.plan import INSIDE, NamespacePlan

        box = self._find(who, sandbox)
        target = parse_target(request.target, Protocol(request.protocol.value))
        require(box.record, "ping")
        began = time.monotonic()
        agent = box.live.agent if box.live is not None else None
        async with self._core.used(box):
            firewall, machine, plan, namespace = await self._core.networks.seen(box.record)
            gateway = INSIDE.gateway.ip if isinstance(plan, NamespacePlan) else plan.host
            with ExitStack() as undo:
                home = undo.enter_context(Namespace(own_namespace()))
                looking = Looking(firewall, home, machine, namespace)
                inside = AgentInside(agent) if agent is not None else None
                facts = await gather(box.record.label, target, looking, gateway, home, inside)
        return told(box.id, facts, time.monotonic() - began)


def told(sandbox: str, facts: Facts, seconds: float) -> Explanation:
    """What there is to say of these facts."""
    from stoker.network.explain import judge
    from stoker.network.facts import Outcome

    steps = judge(facts)
    fault = next((step.name for step in steps if step.verdict is Verdict.FAIL), None)
    reached: bool | None = None if fault is None else False
    if facts.probe is not None:
        reached = facts.probe.outcome is Outcome.CONNECTED
    return Explanation(
        sandbox=sandbox,
        target=facts.target.host + f":{facts.target.port}",
        protocol=Transport(facts.target.protocol.value),
        reached=reached,
        fault=fault,
        steps=[ExplainStep(name=one.name, verdict=one.verdict, says=one.says, mend=one.mend) for one in steps],
        milliseconds=round(seconds * 1000, 1),
    )
