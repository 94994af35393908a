"""Percentiles, reports, the split of a start, and the yardstick's hand-made program."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from stoker.cli.bench.bare import LINE, bare_command, write_bare_initramfs
from stoker.cli.bench.report import Report, percentile
from stoker.cli.bench.start import PARTS, split


def test_percentiles_are_values_that_were_measured() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.9, 0.99, 1.0)] == [1.0, 3.0, 5.0, 5.0, 5.0]
    assert percentile([7.0], 0.5) == 7.0
    assert math.isnan(percentile([], 0.5))


def test_a_report_has_the_keys_of_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    Report("x", [0.001, 0.003, 0.002], ["died"], {"bare": 1.25}, {"extra": 1}).print(True)
    values = json.loads(capsys.readouterr().out)
    assert (values["name"], values["n"], values["failures"]) == ("x", 4, 1)
    assert (values["p50_ms"], values["p90_ms"], values["p99_ms"]) == (2.0, 3.0, 3.0)
    assert values["ratios"] == {"bare": 1.25} and values["extra"] == 1 and values["reasons"] == ["died"]


def test_a_report_of_failures_only_is_still_json(capsys: pytest.CaptureFixture[str]) -> None:
    Report("x", [], ["died"] * 3, {"bare": math.nan}).print(True)
    values = json.loads(capsys.readouterr().out)
    assert values["p50_ms"] is None and values["failures"] == 3 and values["ratios"]["bare"] is None


def test_the_parts_of_a_start_add_up() -> None:
    timings = {
        "marks": {"parsed": 10.05, "exec": 12.0, "first_byte": 12.1},
        "laps": {"images": 0.01, "accel": 0.0, "clone": 0.01, "vmm": 0.05, "guest": 1.5, "configure": 0.1},
        "guest": {"started": 0.9, "ready": 1.1},
    }
    parts = split(10.0, 12.11, timings, 0.03)
    assert set(parts) == set(PARTS)
    assert parts["kernel"] == pytest.approx(1.27)
    assert parts["agent"] == pytest.approx(0.3)
    assert parts["vmm"] == pytest.approx(0.08)
    assert sum(parts.values()) == pytest.approx(2.11)


def test_the_yardstick_is_a_program(tmp_path: Path) -> None:
    """On this host it writes its line; then reboot(2) is refused to a process without the right, and it loops."""
    path = tmp_path / "bare.cpio"
    write_bare_initramfs(path)
    archive = path.read_bytes()
    start = archive.index(b"\x7fELF")
    program = tmp_path / "init"
    program.write_bytes(archive[start : archive.index(LINE) + len(LINE)])
    program.chmod(0o755)
    # --reuid drops CAP_SYS_BOOT: this must never reset the host.
    words = ["setpriv", "--reuid=65534", "--clear-groups", "--bounding-set=-all", "--no-new-privs", str(program)]
    if os.geteuid() != 0:
        words = [str(program)]
    os.chmod(tmp_path, 0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and parent.name.startswith("pytest-"):
            os.chmod(parent, 0o755)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == LINE
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
        finally:
            process.kill()


def test_the_yardstick_has_the_same_machine() -> None:
    words = bare_command("qemu", Path("/k"), Path("/i"), 256 << 20, "tcg", "max")
    assert words[words.index("-m") + 1] == "256M"
    assert words[words.index("-M") + 1].startswith("microvm")
    assert words[words.index("-accel") + 1] == "tcg"
