"""The core of an engine with one sandbox, whose machine is an agent that runs on this host."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from stoker.api.models import NetworkMode, Principal
from stoker.engine.lines import Lines
from stoker.guest.agent import Agent
from stoker.network.plan import parse_slot


class Door:
    """What :class:`stoker.engine.lines.Connections` needs of an engine's core: one sandbox, ``web``, and an agent."""

    def __init__(self, agent: Agent, slot: str = "") -> None:
        self.live = SimpleNamespace(hub=SimpleNamespace(lines=Lines()), agent=agent)
        request = SimpleNamespace(labels={}, network=NetworkMode.NAT if slot else NetworkMode.USER)
        record = SimpleNamespace(label="web", warm=False, doomed=False, owner="local", request=request, slot=slot)
        value = SimpleNamespace(address=str(parse_slot(slot).address) if slot else "")
        self.box = SimpleNamespace(id="sb-1", record=record, value=value, users=0, touch=lambda: None)
        self.boxes = {"sb-1": self.box}
        self.names = {("local", "Web"): "sb-1"}
        self.alarm = asyncio.Event()
        self.woken = 0

    def find(self, who: Principal, sandbox: str) -> Any:
        return self.box

    async def awake(self, box: Any) -> None: ...

    async def agent(self, box: Any) -> Any:
        self.woken += 1
        return self.live, self.live.agent
