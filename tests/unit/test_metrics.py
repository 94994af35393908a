"""Rings, what the host says of a process, consoles by offset, control groups as files."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from stoker.engine.consoles import Console
from stoker.engine.metrics import RINGS, HostSample, Ring, Rings, read_host
from stoker.guest.messages import GuestInfo
from stoker.host import cgroups


def row(at: float, cpu: float) -> list[float]:
    return [at, 0.0, cpu, *[0.0] * 8]


def test_a_ring_holds_its_window() -> None:
    ring = Ring(0.5, 10.0)
    for n in range(100):
        ring.add(row(n * 0.5, n * 0.25))
    rows = list(ring.rows())
    assert len(rows) == 20 and [r[0] for r in rows] == [n * 0.5 for n in range(80, 100)]
    assert all(r[1] == pytest.approx(50.0) for r in rows)


def test_a_coarse_ring_takes_every_sixtieth_and_the_share_over_all_that_time() -> None:
    ring = Ring(30.0, 7200.0)
    for n in range(241):
        ring.add(row(n * 0.5, float(n // 120)))
    rows = list(ring.rows())
    assert [r[0] for r in rows] == [0.0, 30.0, 60.0, 90.0, 120.0]
    assert [round(r[1], 1) for r in rows[1:]] == [0.0, 3.3, 0.0, 3.3]


def test_uneven_ticks_are_taken() -> None:
    ring = Ring(0.5, 600.0)
    for at in (0.0, 0.45, 1.02, 1.3, 1.49, 2.6):
        ring.add(row(at, at))
    assert [r[0] for r in ring.rows()] == [0.0, 0.45, 1.02, 1.3, 2.6] or len(ring) >= 4


def test_rings_answer_with_the_finest_that_covers() -> None:
    rings = Rings()
    rings.add(HostSample(1.0, 2 << 20, 3 << 20))
    for window, step in ((60, 0.5), (600, 0.5), (601, 30.0), (7200, 30.0), (80000, 300.0), (1e6, 300.0)):
        metrics = rings.read("sb-aaaaaaaaaaaaaaaaaaaa", window, None)
        assert (metrics.step, len(metrics.samples)) == (step, 1)
    sample = rings.read("sb-aaaaaaaaaaaaaaaaaaaa", 600, None).samples[0]
    assert (sample.memory_host, sample.disk_host, sample.memory_guest_total, sample.network_sent) == (2 << 20, 3 << 20, None, None)
    assert rings.read("sb-aaaaaaaaaaaaaaaaaaaa", 600, time.time() + 1).samples == []
    rings.guest = GuestInfo()
    rings.restart()
    assert rings.guest is None


def test_rings_are_compact() -> None:
    total = sum(round(window / step) for step, window in RINGS)
    assert total * 11 * 8 < 160_000


def test_the_host_knows_this_process(tmp_path: Path) -> None:
    clone = tmp_path / "c"
    clone.mkdir()
    (clone / "disk.0").write_bytes(b"x" * 100_000)
    sample = read_host(os.getpid(), clone)
    assert sample is not None and sample.cpu > 0 and sample.memory > 1 << 20 and sample.disk >= 100_000
    assert read_host(2**22 - 1, clone) is None


# -- consoles -----------------------------------------------------------------------------------------------------------


def test_a_console_by_offset(tmp_path: Path) -> None:
    path, console = tmp_path / "console.log", Console()
    assert console.read(path, None, 100) == (0, b"", 0)
    path.write_bytes(b"0123456789")
    assert console.read(path, None, 4) == (6, b"6789", 0)
    assert console.read(path, 2, 3) == (2, b"234", 0)
    assert console.read(path, 10, 3) == (10, b"", 0)
    assert console.read(path, 99, 3) == (10, b"", 0)


def test_a_console_that_rotates_never_goes_back(tmp_path: Path) -> None:
    """Followed by ``next``, every byte comes once, through three rotations."""
    path, console = tmp_path / "console.log", Console()
    written, seen, following = b"", b"", 0
    for turn in range(4):
        if turn:
            os.rename(path, path.with_name("console.log.1"))
        part = f"half {turn} of the console\n".encode() * 3
        path.write_bytes(part)
        written += part
        while True:
            offset, data, oldest = console.read(path, following, 10)
            assert offset == following >= oldest
            if not data:
                break
            seen += data
            following = offset + len(data)
    assert seen == written
    assert console.read(path, 0, 5)[0] == console.read(path, 0, 5)[2] > 0


# -- control groups -----------------------------------------------------------------------------------------------------


def fake_tree(root: Path, controllers: str) -> Path:
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text("0::/service/daemon\n")
    tree = root / "cgroup"
    for directory in (tree, tree / "service", tree / "service" / "daemon", tree / "service" / "stoker"):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cgroup.controllers").write_text(controllers)
        (directory / "cgroup.subtree_control").write_text("")
    return tree


def test_groups_are_made_beside_our_own(tmp_path: Path) -> None:
    tree = fake_tree(tmp_path, "cpu memory pids io")
    group = cgroups.base(root=tree, proc=tmp_path / "proc")
    assert group == tree / "service" / "stoker"
    assert (tree / "service" / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    cgroups.create(group / "sb", cgroups.Limits(memory=100, pids=5, cpus=2))
    assert {f.name: f.read_text() for f in (group / "sb").iterdir()} == {
        "memory.max": "100",
        "memory.swap.max": "0",
        "pids.max": "5",
        "cpu.max": "200000 100000",
        "cpu.weight": "100",
    }


@pytest.mark.parametrize("controllers", ["", "cpu io", "hugetlb"])
def test_a_host_without_the_controllers_has_no_limits(tmp_path: Path, controllers: str) -> None:
    tree = fake_tree(tmp_path, controllers)
    assert cgroups.base(root=tree, proc=tmp_path / "proc") is None
    assert cgroups.base(root=tmp_path / "none") is None


def test_removing_a_group_that_is_gone(tmp_path: Path) -> None:
    cgroups.remove(tmp_path / "gone")
    (tmp_path / "there").mkdir()
    try:
        cgroups.remove(tmp_path / "there", timeout=0.1)
    except OSError:
        # On a file system that is no control group, the kill file stays in the way.
        assert (tmp_path / "there" / "cgroup.kill").exists()
