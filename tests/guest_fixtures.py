"""Fixtures of tests that boot real guests: settings with directories of the test's own, and the installed command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import STOKER, CommandLine
from engine_fixtures import own_data
from leaks import processes, wait_gone
from stoker.settings import Settings, load_settings


@pytest.fixture(scope="session")
def data_dir() -> Path:
    path = Path(os.environ.get("STOKER_TEST_DATA_DIR") or load_settings().data_dir)
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def accelerator(session_root: Path, data_dir: Path) -> str:
    """What ``auto`` comes to here: found once, since every test has a run directory (where the verdict is kept) of its own."""
    if os.environ.get("STOKER_ACCEL"):
        return os.environ["STOKER_ACCEL"]
    if not os.path.exists("/dev/kvm"):
        return "tcg"
    env = {**os.environ, "STOKER_DATA_DIR": str(data_dir), "STOKER_RUN_DIR": str(session_root / "verdict")}
    done = subprocess.run([STOKER, "doctor", "--json"], env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
    return "kvm" if b'"accelerator": "kvm"' in done.stdout else "tcg"


@pytest.fixture
def settings(data_dir: Path, short_dir: Path, accelerator: str) -> Iterator[Settings]:
    """Settings with a run directory of the test's own; afterwards nothing may live that names it, and the directory is empty."""
    run_dir = short_dir / "run"
    run_dir.mkdir(mode=0o755)
    yield load_settings(
        {
            **os.environ,
            "STOKER_DATA_DIR": str(data_dir),
            "STOKER_RUN_DIR": str(run_dir),
            "STOKER_ACCEL": accelerator,
            "STOKER_CONFIG": "/nonexistent/stoker.toml",
        }
    )
    left = wait_gone(lambda: [str(process) for process in processes(short_dir)])
    assert not left, "a test left processes behind"
    runs = run_dir / "runs"
    assert not runs.exists() or not list(runs.iterdir()), "a test left directories of machines behind"


@pytest.fixture
def stoker(settings: Settings, short_dir: Path) -> Iterator[CommandLine]:
    """Runs the installed command: ``stoker("run", "debian:12", "--", "true").code``.

    Its daemon, which the first word starts, keeps its database and disks in a directory of the test's own, and ends with it.
    """
    own = own_data(settings, short_dir)
    command = CommandLine(
        own,
        {
            "STOKER_DATA_DIR": str(own.data_dir),
            "STOKER_RUN_DIR": str(own.run_dir),
            "STOKER_ACCEL": own.accel,
            "STOKER_CONFIG": str(own.config_file),
        },
    )
    yield command
    if command("daemon", "status").code == 0:
        command("rm", "--all")
        ended = command("daemon", "stop")
        assert ended.code == 0, ended.error
