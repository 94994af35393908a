"""Doctor's probes: they try things, never raise, and say how to get what is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stoker.cli.doctor import _install_line
from stoker.host.facilities import INSTALL, Facility, Status, Tool, kernel_facilities, probe_tool


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory first on the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def program(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)", "7.2.22"),
        ("passt 0.0~git20230309.7c7625d-1\nAGPL <https://example.org/agpl-3.0.html>", "0.0~git20230309.7c7625d-1"),
        ("mke2fs 1.47.0 (5-Feb-2023)", "1.47.0"),
        ("ip utility, iproute2-6.1.0, libbpf 1.1.0", "6.1.0"),
    ],
)
async def test_a_tool_tells_its_version(fake: Path, said: str, version: str) -> None:
    program(fake, "some-tool", f"cat <<'END'\n{said}\nEND")
    row = await probe_tool(Tool("some-tool", "package", "things"))
    assert row.status is Status.OK
    assert row.detail.endswith(version)


@pytest.mark.anyio
async def test_a_missing_and_a_broken_tool(fake: Path) -> None:
    missing = await probe_tool(Tool("no-such-tool-at-all", "package", "things", required=True))
    assert (missing.status, missing.required, missing.get) == (Status.MISSING, True, INSTALL + "package")
    program(fake, "some-tool", "exit 3")
    broken = await probe_tool(Tool("some-tool", "package", "things"))
    assert broken.status is Status.BROKEN and "3" in broken.detail


def test_probes_leave_nothing_and_say_how(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    rows = kernel_facilities(tmp_path / "not" / "there")
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.enables and row.get, row.name
        assert row.status is Status.OK or row.detail, row.name


def test_one_command_installs_everything() -> None:
    rows = [
        Facility("a", Status.MISSING, "", "x", INSTALL + "one"),
        Facility("b", Status.OK, "", "x", INSTALL + "two"),
        Facility("c", Status.BROKEN, "", "x", INSTALL + "three"),
        Facility("d", Status.MISSING, "", "x", INSTALL + "one"),
        Facility("e", Status.MISSING, "", "x", "modprobe loop"),
    ]
    assert _install_line(rows) == INSTALL + "one three"
    assert _install_line(rows[1:2]) == ""
