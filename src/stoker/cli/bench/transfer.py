"""TCP between a real guest and a host beyond this one, through a slot; and the same guest on its TAP with nothing in between.

For the second the slot's own tables are taken away and the guest is led to the other end of its TAP: no filter, no translation, no
veth. The two take turns, so that a host that becomes busy slows both.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any, Final

from stoker.errors import InternalError

if TYPE_CHECKING:
    from stoker.engine.boot import LiveMachine
    from stoker.engine.networks import Wire
    from stoker.host.namespaces import Namespace
    from stoker.network.slot import Slot, Slots

__all__ = ["FAR", "Rates", "transfer"]

FAR: Final = IPv4Address("5.5.5.1")
"""The host beyond."""
MIB: Final = 1 << 20
PATIENCE: Final = 300.0
UPLOAD: Final = "exec dd if=/dev/zero bs=1M count={count} status=none > /dev/tcp/{address}/{port}"
DOWNLOAD: Final = "exec cat < /dev/tcp/{address}/{port} > /dev/null"


@dataclass(slots=True)
class Rates:
    """Bytes a second of each turn."""

    upload: list[float] = field(default_factory=list)
    download: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(values) / 1e6, 1) for name, values in (("out", self.upload), ("in", self.download))}


@dataclass(frozen=True, slots=True)
class _Way:
    """Where the other end listens: its address, and the namespace that has it."""

    address: IPv4Address
    place: Callable[[Callable[[], Any]], Any]


def _received(listener: socket.socket, size: int) -> float:
    """Seconds from the first byte to the end."""
    peer, _ = listener.accept()
    with peer:
        peer.settimeout(PATIENCE)
        block = bytearray(MIB)
        seen = peer.recv_into(block)
        began = time.perf_counter()
        while got := peer.recv_into(block):
            seen += got
        took = time.perf_counter() - began
    if seen != size:
        raise InternalError("bytes_lost", f"{seen} of {size} bytes came out of the guest")
    return took


def _sent(listener: socket.socket, size: int) -> float:
    """Seconds from the first byte until the guest has read the last, and closed."""
    peer, _ = listener.accept()
    with peer:
        peer.settimeout(PATIENCE)
        block = bytes(MIB)
        began = time.perf_counter()
        for _ in range(size // MIB):
            peer.sendall(block)
        peer.shutdown(socket.SHUT_WR)
        if peer.recv(1):
            raise InternalError("bytes_lost", "the guest answered")
        return time.perf_counter() - began


async def _once(live: LiveMachine, way: _Way, words: str, size: int, work: Callable[[socket.socket, int], float]) -> float:
    """Bytes a second of one transfer."""
    from stoker.guest.messages import ExecRequest

    listener: socket.socket = way.place(lambda: socket.create_server((str(way.address), 0)))
    with listener:
        listener.settimeout(PATIENCE)
        command = words.format(count=size // MIB, address=way.address, port=listener.getsockname()[1])
        process = await live.agent.exec(ExecRequest(argv=["bash", "-c", command]))
        working = asyncio.create_task(asyncio.to_thread(work, listener, size))
        text = b""
        async for data in process.stderr:
            text += data
        status = await process.wait()
        if status.code or status.signal:
            listener.shutdown(socket.SHUT_RDWR)  # nobody comes any more
            await asyncio.wait({working})
            raise InternalError("transfer_failed", f"the guest cannot reach {way.address}: {text.decode(errors='replace')[:200]}")
        return size / await working


def _tables(slots: Slots, slot: Slot, *, there: bool) -> None:
    """Takes the slot's tables away, or makes them anew."""
    from stoker.host.nftables import Nftables
    from stoker.network import rules
    from stoker.network.plan import NamespacePlan

    plan = slot.plan

    def change() -> None:
        with Nftables() as nft:
            if there and isinstance(plan, NamespacePlan):
                nft.apply(rules.inside(plan.host))
            elif not there:
                nft.apply([f"delete table {rules.TABLE}", f"delete table {rules.ARP_TABLE}"])

    if slot.namespace is not None:
        slot.namespace.run(change)
    else:
        change()
        if there:
            slots.firewall.restore()


def _wire(slot: Slot) -> Wire:
    from stoker.engine.networks import Wire
    from stoker.network.plan import INSIDE, RunPlan

    plan = slot.plan
    own = isinstance(plan, RunPlan)
    gateway = plan.host if own else INSIDE.gateway.ip
    return Wire(plan.mac, f"{plan.guest}/30", str(gateway), str(FAR), slot.tap, own)


async def transfer(slots: Slots, slot: Slot, beyond: Namespace, image: str, size: int, turns: int) -> tuple[Rates, Rates]:
    """Boots a guest on the slot and sends ``size`` bytes each way in each turn: through the slot, and over its bare TAP."""
    from stoker.cli.progress import progress_for
    from stoker.engine.boot import MachineRequest
    from stoker.engine.run import running
    from stoker.settings import load_settings

    wire = _wire(slot)
    home: Callable[[Callable[[], Any]], Any] = slot.namespace.run if slot.namespace is not None else lambda work: work()
    through, bare = _Way(FAR, beyond.run), _Way(IPv4Address(wire.gateway), home)
    rates = Rates(), Rates()
    progress = progress_for(False)
    request = MachineRequest(name=f"bench-{os.getpid()}", image=image, network="nat", wire=wire)
    try:
        async with running(request, load_settings(), progress) as live:
            progress.close()
            slot.let_go()
            await _once(live, through, UPLOAD, MIB, _received)  # bash, dd and the kernel's own first times
            for turn in range(2 * turns):
                way, into = (through, rates[0]) if turn % 2 == 0 else (bare, rates[1])
                if way is bare:
                    _tables(slots, slot, there=False)
                into.upload.append(await _once(live, way, UPLOAD, size, _received))
                into.download.append(await _once(live, way, DOWNLOAD, size, _sent))
                if way is bare:
                    _tables(slots, slot, there=True)
    finally:
        progress.close()
    return rates
