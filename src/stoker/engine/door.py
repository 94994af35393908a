"""The door: where a machine waits that has started and is not anybody's yet. See :mod:`.parking`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from stoker.errors import HostError

if TYPE_CHECKING:
    from stoker.engine.boot import MachineRequest
    from stoker.engine.operations import Running
    from stoker.vmm.driver import Machine

__all__ = ["LOST", "NOT_PARKED", "Door"]

LOST = "parked_lost"
"""The code of the error that a machine ended while it waited."""
NOT_PARKED = "not_parked"
"""... that there is no golden memory to wait over."""


class Door:
    """Opened once, with the words of the create that the machine is for."""

    def __init__(self, operation: Running) -> None:
        self.operation = operation
        """The create that it is going to be."""
        self.there = asyncio.Event()
        """Set when a machine waits."""
        self._asked: asyncio.Future[MachineRequest] = asyncio.get_running_loop().create_future()

    @property
    def opened(self) -> bool:
        return self._asked.done()

    def open(self, request: MachineRequest) -> None:
        self._asked.set_result(request)

    async def wait(self, machine: Machine) -> MachineRequest:
        """Until somebody opens. Raises ``parked_lost`` (HostError) when the machine ends before."""
        ended = asyncio.ensure_future(machine.wait())
        self.there.set()
        try:
            either: list[asyncio.Future[Any]] = [ended, self._asked]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise HostError(LOST, "a machine that waited for a create has ended")
            return self._asked.result()
        finally:
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)
