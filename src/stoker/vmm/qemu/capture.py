"""Taking a running QEMU's memory, devices and disks at one moment: as little as possible happens while its vCPUs stand."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from stoker.errors import GuestError
from stoker.host.laps import Laps
from stoker.vmm.driver import Captured, NextDisk
from stoker.vmm.memory import Delta, Scratch, capture, changed_bytes
from stoker.vmm.qemu.qmp import Qmp

__all__ = ["capture_machine", "device_state", "top_nodes"]

LOOK = 0.05
SPARE = 16 << 20
"""What a guest may change between the look at how much there is and the stop, before the copy gets slower."""


async def _target(qmp: Qmp, undo: AsyncExitStack) -> tuple[int, str]:
    """A memory file for device state: our descriptor, and the name QEMU opens it by. Gone with ``undo``."""
    fd = os.memfd_create("state", os.MFD_CLOEXEC)
    undo.callback(os.close, fd)
    # A set's descriptor is only used for just the way of opening that it was opened with.
    theirs = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        added = await qmp.execute("add-fd", fd=theirs)
    finally:
        os.close(theirs)
    undo.push_async_callback(qmp.execute, "remove-fd", fdset_id=added["fdset-id"])
    return fd, f"/dev/fdset/{added['fdset-id']}"


async def device_state(qmp: Qmp) -> bytes:
    """See :meth:`stoker.vmm.qemu.driver.QemuMachine.device_state`."""
    async with AsyncExitStack() as undo:
        fd, name = await _target(qmp, undo)
        await qmp.execute("xen-save-devices-state", filename=name, live=False)
        return os.pread(fd, os.fstat(fd).st_size, 0)


async def top_nodes(qmp: Qmp) -> list[str]:
    """The names of what the guest's disks write to now, in the order of the specification."""
    nodes: list[dict[str, Any]] = [one["inserted"] for one in await qmp.execute("query-block") if "inserted" in one]
    names = [str(node["node-name"]) for node in nodes]
    return sorted(names, key=lambda name: int(name.removeprefix("disk").partition("-")[0]))


async def stream(qmp: Qmp, index: int, name: str) -> None:
    """See :meth:`stoker.vmm.driver.Machine.flatten_disk`. A job that goes on when this is cancelled harms nobody."""
    top = (await top_nodes(qmp))[index]
    job = f"stream-{top}"
    base = f"disk{index}-base"
    ends = {"auto_finalize": True, "auto_dismiss": False}
    await qmp.execute("block-stream", job_id=job, device=top, base_node=base, backing_file=name, **ends)
    while True:
        found = next((one for one in await qmp.execute("query-jobs") if one["id"] == job), None)
        if found is None or found["status"] == "concluded":
            break
        await asyncio.sleep(LOOK)
    if found is not None:
        await qmp.execute("job-dismiss", id=job)
        if "error" in found:
            raise GuestError("vmm_refused", f"a disk's layers could not be joined: {found['error']}")


async def _add(qmp: Qmp, disk: NextDisk, number: int) -> str:
    """Makes the overlay known to QEMU. The name is new each time: a node's is taken for as long as it lives."""
    fd = os.open(disk.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        added = await qmp.execute("add-fd", fd=fd)
    finally:
        os.close(fd)
    name = f"disk{disk.index}-next{number}"
    cache = {"direct": False, "no-flush": True}
    # Said outright, or giving up the right to write to it when it has become a layer fails: the file cannot be opened anew.
    rest: dict[str, Any] = {"cache": cache, "discard": "unmap", "read-only": False}
    file = {"driver": "file", "filename": f"/dev/fdset/{added['fdset-id']}", "aio": "threads", **rest}
    rest |= {"driver": "qcow2", "file": file, "backing": None}
    await qmp.execute("blockdev-add", node_name=name, **rest)
    return name


def _reserve(pid: int, base: int, size: int, scratch: Scratch) -> None:
    scratch.reserve(changed_bytes(pid, base, size) + SPARE)


async def capture_machine(
    qmp: Qmp, pid: int, base: int, size: int, scratch: Scratch, disks: Sequence[NextDisk], *, go_on: bool, zeros: bool = False
) -> Captured:
    """See :meth:`stoker.vmm.driver.Machine.capture`. ``size``: bytes of guest memory."""
    laps = Laps()
    async with AsyncExitStack() as undo:
        with laps.lap("prepare"):
            room = asyncio.create_task(asyncio.to_thread(_reserve, pid, base, size, scratch))
            undo.push_async_callback(asyncio.wait, {room})
            running = (await qmp.execute("query-status"))["status"] == "running"
            fd, name = await _target(qmp, undo)
            tops = await top_nodes(qmp) if disks else []
            actions = []
            for disk in disks:
                node = await _add(qmp, disk, time.monotonic_ns())
                actions.append({"type": "blockdev-snapshot", "data": {"node": tops[disk.index], "overlay": node}})
            await room
        began = time.perf_counter()
        try:
            with laps.lap("stop"):
                await qmp.execute("stop")
            if actions:
                with laps.lap("disks"):
                    await qmp.execute("transaction", actions=actions)
            with laps.lap("take"):
                delta, _ = await asyncio.gather(
                    asyncio.to_thread(capture, pid, base, scratch, size, zeros=zeros),
                    qmp.execute("xen-save-devices-state", filename=name, live=False),
                )
        except BaseException:
            if running:
                await asyncio.shield(qmp.execute("cont"))
            raise
        if go_on and running:
            with laps.lap("go on"):
                await qmp.execute("cont")
            laps.seconds["stopped"] = time.perf_counter() - began
        state = os.pread(fd, os.fstat(fd).st_size, 0)
    assert isinstance(delta, Delta)
    return Captured(delta, state, laps.seconds)
