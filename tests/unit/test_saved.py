"""A machine's memory and state on disk: whole or not there, and only for what can take them up again."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stoker.engine.golden import begin_disk
from stoker.errors import HostError
from stoker.storage.overlay import create_overlay
from stoker.vmm.machine import Accelerator, Disk, GuestMemory, MachineSpec
from stoker.vmm.memory import new_memory
from stoker.vmm.qemu.facts import QemuFacts
from stoker.vmm.saved import fingerprint, load, save

SIZE = 8 << 20
MADE = {"vmm": "7.2.0", "memory": SIZE}


@pytest.fixture
def memory() -> Iterator[int]:
    fd = new_memory("test", SIZE)
    os.pwrite(fd, b"guest" * 1000, 1 << 20)
    os.pwrite(fd, bytes(8192), 4 << 20)
    yield fd
    os.close(fd)


def test_what_is_put_away_comes_back_and_cannot_be_written(memory: int, tmp_path: Path) -> None:
    save(tmp_path / "one", memory, b"devices", MADE)
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
    saved = load(tmp_path / "one", MADE)
    try:
        assert (saved.size, saved.state) == (SIZE, b"devices")
        assert os.pread(saved.memory, SIZE, 0) == os.pread(memory, SIZE, 0)
        assert os.stat(tmp_path / "one/memory").st_blocks * 512 < 1 << 20
        with pytest.raises(PermissionError):
            os.pwrite(saved.memory, b"x", 0)
    finally:
        os.close(saved.memory)


def test_the_disk_comes_with_it_and_only_onto_a_fresh_one(memory: int, tmp_path: Path) -> None:
    disk, fresh, used = (tmp_path / name for name in ("disk", "fresh", "used"))
    for path in (disk, fresh):
        create_overlay(path, tmp_path, 1 << 30)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 5M 70k", disk], check=True, capture_output=True)
    save(tmp_path / "one", memory, b"devices", MADE, disk)
    saved = load(tmp_path / "one", MADE)
    os.close(saved.memory)
    assert sum(len(data) for _, data in saved.disk) < 1 << 20
    empty = fresh.read_bytes()
    assert begin_disk(fresh, saved) == empty
    assert fresh.read_bytes() == disk.read_bytes()
    used.write_bytes(disk.read_bytes())
    with pytest.raises(HostError) as caught:
        begin_disk(used, saved)
    assert caught.value.code == "disk_used"
    with open(tmp_path / "one/disk", "r+b") as file:
        os.pwrite(file.fileno(), b"damage", 0)
    with pytest.raises(HostError, match="damaged"):
        load(tmp_path / "one", MADE)


def test_another_vmm_is_refused_by_name(memory: int, tmp_path: Path) -> None:
    save(tmp_path / "one", memory, b"devices", MADE)
    with pytest.raises(HostError, match="another vmm and memory") as caught:
        load(tmp_path / "one", {"vmm": "8.0.0", "memory": 1})
    assert caught.value.code == "saved_unusable"
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", MADE)


@pytest.mark.parametrize("name", ["memory", "state", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "changed"])
def test_damage_is_seen(memory: int, tmp_path: Path, name: str, how: str) -> None:
    save(tmp_path / "one", memory, b"devices", MADE)
    path = tmp_path / "one" / name
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[len(data) // 2 :]
    else:
        at = (1 << 20) + 7 if name == "memory" else len(data) // 2
        data[at] ^= 0xFF
    path.write_bytes(data)
    opened = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError) as caught:
        load(tmp_path / "one", MADE)
    assert caught.value.code in ("saved_damaged", "saved_unusable")
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_full_disk_leaves_nothing(memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "one", memory, b"devices", MADE)
    assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_tells_what_matters_from_what_does_not(tmp_path: Path) -> None:
    for name in ("qemu", "kernel", "initrd", "root"):
        (tmp_path / name).write_bytes(b"x")
    spec = MachineSpec(
        name="one",
        directory=tmp_path / "a",
        kernel=tmp_path / "kernel",
        initrd=tmp_path / "initrd",
        cmdline=(),
        cpus=1,
        memory=256 << 20,
        disks=(Disk(name="root", path=tmp_path / "a/disk", format="qcow2", backing=(tmp_path / "root",)),),
        network=None,
        accelerator=Accelerator.TCG,
        guest_memory=GuestMemory(7),
    )
    qemu = QemuFacts(str(tmp_path / "qemu"), (7, 2, 0), 2_400_000)
    first = fingerprint(spec, qemu)
    assert json.loads(json.dumps(first)) == first
    same = replace(spec, name="two", directory=tmp_path / "b", disks=(replace(spec.disks[0], path=tmp_path / "b/disk"),))
    os.utime(tmp_path / "initrd", (1, 1))
    assert fingerprint(same, replace(qemu, tsc_khz=2_400_001)) == first
    for other in (replace(spec, cpus=2), replace(spec, memory=512 << 20), replace(spec, cmdline=("debug",))):
        assert fingerprint(other, qemu) != first
    assert fingerprint(spec, replace(qemu, version=(8, 0, 0))) != first
    (tmp_path / "new").write_bytes(b"another one")
    os.replace(tmp_path / "new", tmp_path / "root")
    assert fingerprint(spec, qemu) != first
