"""From what a machine left to the error that is raised, by value."""

from __future__ import annotations

import pytest

from stoker.vmm.diagnosis import diagnose
from stoker.vmm.machine import MachineExit

WELL = MachineExit(0, None)
REGISTERS = tuple(f"[    0.9] RAX: {number:016x}" for number in range(60))

CASES: list[tuple[MachineExit, tuple[str, ...], tuple[str, ...], str, str]] = [
    (WELL, (), (), "machine_reset", "triple fault"),
    (WELL, ("[    1.4] reboot: Power down",), (), "machine_stopped", "powered off"),
    (WELL, ("[    1.4] reboot: Restarting system",), (), "machine_stopped", "restarted"),
    (WELL, ("stoker-agent: fatal: no_devices: no block device", "[ 1.4] reboot: Power down"), (), "no_devices", "no block device"),
    (WELL, ("[ 1.0] Kernel panic - not syncing: VFS: Unable to mount root fs", *REGISTERS), (), "kernel_panic", "VFS: Unable"),
    (WELL, ("Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000300",), (), "init_died", "exited with 3"),
    (WELL, ("Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b",), (), "init_died", "SIGSEGV"),
    (WELL, ("Kernel panic - not syncing: System is deadlocked on memory",), (), "memory_too_small", "deadlocked"),
    (WELL, ("Out of memory: Killed process 1 (init)", "Kernel panic - not syncing: x"), (), "memory_too_small", "ran out"),
    (MachineExit(1, None), (), ("qemu-system-x86_64: -M none: bad option", "see the manual"), "vmm_failed", "bad option"),
    (MachineExit(1, None), (), (), "vmm_failed", "exited with 1"),
    (MachineExit(None, 11), (), ("assertion",), "vmm_failed", "SIGSEGV"),
    (MachineExit(1, None), (), ("qemu: cannot set up guest memory 'ram': Cannot allocate memory",), "host_out_of_memory", "host"),
    (MachineExit(None, 9, False, True), (), (), "host_out_of_memory", "host"),
    (MachineExit(None, 9), (), (), "machine_killed", "somebody else"),
    (MachineExit(None, 9, True), (), (), "machine_killed", "told to"),
    (MachineExit(None, None), (), (), "machine_gone", "nobody saw"),
    (MachineExit(1, None), (), ("qemu: linux kernel too old to load a ram disk",), "kernel_unusable", "too old"),
    (
        MachineExit(1, None),
        (),
        ('qemu: Failed to get "write" lock', "Is another process using it?"),
        "disk_in_use",
        "another machine",
    ),
]


@pytest.mark.parametrize(("ended", "console", "vmm", "code", "text"), CASES)
def test_diagnosis(ended: MachineExit, console: tuple[str, ...], vmm: tuple[str, ...], code: str, text: str) -> None:
    error = diagnose(ended, console, vmm)
    assert error.code == code and text in error.message
    assert len(error.console) <= 20 and set(error.console) <= set(console)


def test_the_console_that_is_shown_begins_before_the_panic() -> None:
    before = tuple(f"before {number}" for number in range(30))
    error = diagnose(WELL, (*before, "Kernel panic - not syncing: x", *REGISTERS))
    assert error.console[:5] == (*before[-4:], "Kernel panic - not syncing: x") and len(error.console) == 20
