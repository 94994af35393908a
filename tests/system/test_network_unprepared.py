"""A create on a host that does not forward packets: it says so, and nothing of a slot is left of it."""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from crashing import ADMIN
from engine_fixtures import own_data
from engine_guests import make, opened
from network_world import Place
from stoker.api.models import CreateSandbox, NetworkMode, SandboxState
from stoker.settings import Settings

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


def test_a_host_that_does_not_forward(settings: Settings, short_dir: Path) -> None:
    own = own_data(settings, short_dir)

    async def body() -> None:
        Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
        async with opened(own) as engine:
            request = CreateSandbox(image="debian:12", name="out", network=NetworkMode.NAT)
            operation = await engine.wait_operation(ADMIN, (await engine.create(ADMIN, request)).id, 600)
            assert operation.error is not None and operation.error.code == "network_unprepared" and operation.error.hint
            box = await engine.get(ADMIN, "out")
            assert (box.state, box.address) == (SandboxState.FAILED, "")
            # What reaches nothing needs no forwarding.
            assert (await make(engine, name="in", network=NetworkMode.NAT, egress="none")).address

    with ExitStack() as stack:
        Place(stack).run(lambda: asyncio.run(body()))
