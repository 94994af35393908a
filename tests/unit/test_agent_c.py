"""The agent's own tests and fuzz targets, which are C, run by its makefile under the sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)

AGENT = Path(__file__).resolve().parents[2] / "agent"
LARGEST = 140 * 1024


def make(*words: str) -> str:
    __tracebackhide__ = True
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    argv = ["make", "-C", str(AGENT), f"PYTHON={sys.executable}", *words]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    if done.returncode:
        pytest.fail(f"{' '.join(argv)}\n{done.stdout[-8000:]}", pytrace=False)
    return done.stdout


def test_agent_checks() -> None:
    assert "Nothing to be done" not in make("check")


def test_agent_survives_fuzzing(request: pytest.FixtureRequest) -> None:
    seconds = 120 if request.config.getoption("--full") else 10
    assert "Nothing to be done" not in make("fuzz", f"FUZZ_SECONDS={seconds}")


def test_agent_is_small_and_static(tmp_path: Path) -> None:
    """140 KiB with musl; an initramfs of every machine carries it."""
    make("all", f"OUT={tmp_path}", f"BUILD={tmp_path / 'build'}")
    data = (tmp_path / "stoker-agent").read_bytes()
    assert data[:4] == b"\x7fELF"
    assert b"/lib64/ld-linux" not in data and b"/lib/ld-musl" not in data
    assert len(data) <= LARGEST
