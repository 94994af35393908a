"""The short operations on one sandbox: freeze, thaw, ping, timeout, waiting for a state."""

from __future__ import annotations

import asyncio
import logging

from msgspec.structs import asdict, replace

from stoker.api.models import Sandbox, SandboxState, SetNetwork, Timeout
from stoker.engine.core import Box, Core
from stoker.engine.create import expiry, settled
from stoker.engine.network_words import check_network
from stoker.engine.slots import whose_port
from stoker.engine.state import require
from stoker.errors import DeadlineExceeded, HostError, NotFound, StokerError

__all__ = ["freeze", "ping", "set_network", "set_timeout", "thaw", "wait"]

log = logging.getLogger(__name__)


async def freeze(core: Core, box: Box) -> None:
    """Stops the vCPUs."""
    await _turn(core, box, "freeze", SandboxState.FROZEN)


async def thaw(core: Core, box: Box) -> None:
    """Lets them go on."""
    await _turn(core, box, "thaw", SandboxState.RUNNING)


async def _turn(core: Core, box: Box, verb: str, state: SandboxState) -> None:
    require(box.record, verb)
    async with box.lock:
        require(box.record, verb)
        if box.live is None:
            raise HostError("machine_missing", f"{box.record.label} has no machine", f"stoker inspect {box.id}")
        if verb == "thaw":
            core.filling.check_thaw(box)
        box.touch()
        machine = box.live.machine
        await (machine.freeze() if verb == "freeze" else machine.thaw())
        await core.save(box, event="sandbox.state", state=state, reason="")
        if verb == "thaw" and box.live.agent is not None:
            try:
                # Its clock stood still.
                await box.live.agent.set_time()
            except StokerError as error:
                log.warning("the clock of %s could not be set: %s", box.id, error)


async def ping(core: Core, box: Box) -> float:
    """Milliseconds."""
    _, agent = await core.agent(box, "ping")
    return await agent.ping() * 1000


async def set_timeout(core: Core, box: Box, timeout: Timeout | None) -> None:
    """Replaces the timeout; it counts from now."""
    timeout = settled(timeout)
    require(box.record, "set_timeout")
    box.touch()
    await core.save(box, event="sandbox.timeout", timeout=timeout, expires_at=expiry(timeout))


async def set_network(core: Core, box: Box, request: SetNetwork) -> None:
    """Another policy, other ports; at once where it has a machine, else from its next one on."""
    async with box.lock:
        record = box.record
        require(record, "set_network")
        given = {name: value for name, value in asdict(request).items() if value is not None}
        wanted = replace(record.request, **given)
        check_network(wanted)
        if record.slot or record.joined:
            with whose_port(core, box):
                await core.networks.change(replace(record, request=wanted))
        await core.save(box, event="sandbox.network", request=wanted)


async def wait(box: Box, states: frozenset[SandboxState], timeout: float) -> Sandbox:
    """Until the sandbox is in one of ``states``, or, without any, until it is gone."""
    last = box.value
    try:
        async with asyncio.timeout(timeout):
            while not box.gone:
                last = box.value
                if last.state in states:
                    return last
                await box.changed.wait()
    except TimeoutError:
        wanted = " or ".join(sorted(states)) or "destroyed"
        raise DeadlineExceeded(
            "wait_timeout",
            f"{box.record.label} is {last.state.value} and did not become {wanted} within {timeout:g} s",
            f"stoker inspect {box.id}",
            details={"state": last.state.value},
        ) from None
    if states:
        raise NotFound("sandbox_unknown", f"{box.record.label} was destroyed meanwhile", "stoker ls")
    return last
