"""Why a machine ended before its agent answered, from what it left: how the VMM ended, the console's tail and the VMM's own words.

Give many console lines (200): a panic's reason comes before a screen of registers. The error carries the twenty that matter.

A kernel with ``quiet loglevel=1`` still says on the console that it panics, powers off or restarts (KERN_EMERG). A VMM that ended
well without any of these words was reset: a triple fault. All of it is the guest's word, good for an error's text and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from stoker.errors import Conflict, GuestError, HostError, StokerError
from stoker.host.run import describe_exit
from stoker.vmm.driver import Machine
from stoker.vmm.machine import MachineExit

__all__ = ["diagnose", "explain"]

MORE_MEMORY = "give it more: --memory 512M"
NO_HOST_MEMORY = re.compile(
    r"cannot allocate memory|cannot set up guest memory|out of memory|failed to (?:map|allocate) memory", re.I
)
NO_GUEST_MEMORY = re.compile(
    r"System is deadlocked on memory|Out of memory|page allocation failure|Initramfs unpacking failed: (?:write error|junk)"
    r"|Cannot allocate|Failed to allocate|not enough memory|no killable processes",
    re.I,
)
TOO_SMALL_FOR_QEMU = re.compile(
    r"(?:initrd|ramdisk|kernel).{0,60}too (?:large|big)|not enough (?:space|memory) for initrd|does not fit", re.I
)
BAD_KERNEL = re.compile(r"linux kernel too old|could not load kernel|[Ee]rror loading (?:uncompressed )?kernel|invalid kernel|PVH")
NO_LOCK = re.compile(r'Failed to get "[a-z ]+" lock')
FATAL = re.compile(r"stoker-agent: fatal: ([a-z_]{1,40}): (.*)")
PANIC = re.compile(r"Kernel panic - not syncing: (.*)")
INIT_DIED = re.compile(r"Attempted to kill init! exitcode=0x([0-9a-f]+)")


def diagnose(exit: MachineExit, console: Sequence[str], vmm: Sequence[str] = ()) -> StokerError:
    """The error to raise for a machine that is gone: ``console`` and ``vmm`` are the last lines of both logs."""
    lines = tuple(console)
    error = _host(exit, vmm, lines) or _guest(lines) or _ended(exit, vmm, lines)
    if error.console:
        at = next((index for index, line in enumerate(lines) if PANIC.search(line)), len(lines))
        first = min(max(0, at - 4), max(0, len(lines) - 20))
        error.console = lines[first : first + 20]
    return error


def _host(exit: MachineExit, vmm: Sequence[str], console: tuple[str, ...]) -> StokerError | None:
    said = "\n".join(vmm)
    if exit.out_of_memory or (exit.code not in (0, None) and NO_HOST_MEMORY.search(said)):
        return HostError(
            "host_out_of_memory", "the host has no memory left for this machine", "ask for less (--memory), or end others"
        )
    if exit.code not in (0, None) and NO_LOCK.search(said):
        return Conflict("disk_in_use", "another machine writes to a disk of this one", "give each machine a disk of its own")
    if exit.code not in (0, None) and TOO_SMALL_FOR_QEMU.search(said):
        return GuestError("memory_too_small", f"the memory does not hold kernel and initramfs: {vmm[-1]}", MORE_MEMORY)
    if exit.code not in (0, None) and (found := next((line for line in vmm if BAD_KERNEL.search(line)), None)):
        return GuestError("kernel_unusable", f"QEMU cannot start this kernel: {found}", "an x86-64 vmlinux with PVH, or a bzImage")
    if exit.code not in (0, None) or (exit.signal is not None and exit.signal != 9):
        how = describe_exit(-exit.signal if exit.signal is not None else exit.code or 0)
        # QEMU puts its name before an error, and explanations without it behind.
        error = next((line for line in reversed(vmm) if line.startswith("qemu")), vmm[-1] if vmm else "it said nothing")
        return HostError("vmm_failed", f"QEMU {how}: {error}", "stoker doctor", details={"log": list(vmm)}, console=console)
    return None


def _guest(console: tuple[str, ...]) -> StokerError | None:
    for line in reversed(console):
        if found := FATAL.search(line):
            return GuestError(found[1], f"the agent could not start: {found[2]}", FATAL_HINTS.get(found[1], ""), console=console)
    panic = next((found for line in console if (found := PANIC.search(line))), None)
    if any(NO_GUEST_MEMORY.search(line) for line in console):
        what = f": {panic[1]}" if panic else ""
        return GuestError("memory_too_small", f"the guest ran out of memory while it started{what}", MORE_MEMORY, console=console)
    if panic is None:
        return None
    if died := INIT_DIED.search(panic[1]):
        code = int(died[1], 16)
        how = describe_exit(-(code & 0x7F) if code & 0x7F else code >> 8)
        return GuestError("init_died", f"the guest's init {how}", "", console=console)
    return GuestError("kernel_panic", f"the guest's kernel panicked: {panic[1]}", "try another kernel: --kernel", console=console)


FATAL_HINTS = {
    "no_channel": "the kernel needs virtio_console (and virtio_mmio) as a module or built in",
    "no_devices": "the kernel needs virtio_mmio and ACPI",
    "bad_module": "the modules do not belong to this kernel",
}


def _ended(exit: MachineExit, vmm: Sequence[str], console: tuple[str, ...]) -> StokerError:
    if exit.signal is not None:
        who = "when it was told to end" if exit.requested else "by somebody else"
        return GuestError("machine_killed", f"the machine was killed {who}", details={"log": list(vmm)}, console=console)
    if any("reboot: Power down" in line or "reboot: System halted" in line for line in console):
        return GuestError("machine_stopped", "the guest powered off before its agent answered", console=console)
    if any("reboot: Restarting system" in line for line in console):
        return GuestError("machine_stopped", "the guest restarted before its agent answered", console=console)
    if exit.code is None:
        return GuestError("machine_gone", "the machine is gone, and nobody saw how", console=console)
    return GuestError(
        "machine_reset",
        "the guest was reset without a word (a triple fault): the kernel does not run on this machine, or has too little memory",
        "try another kernel (--kernel), or more memory (--memory)",
        console=console,
    )


async def explain(machine: Machine, exit: MachineExit) -> StokerError:
    """:func:`diagnose` with what the machine's directory holds."""
    return diagnose(exit, await machine.console_tail(200), await machine.vmm_tail(20))
