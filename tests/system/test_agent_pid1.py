"""The agent's own tests, driven over the channel of a real machine in which it is PID 1."""

from __future__ import annotations

import sys
from pathlib import Path

import anyio
import pytest

from stoker.engine.boot import MachineRequest, boot
from stoker.engine.run import overlay_at
from stoker.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]

CHECK = Path(__file__).resolve().parents[2] / "agent" / "tests" / "check.py"
QUICK = (
    "explains_failed_starts keeps_stdin_whole stops_at_the_window discards_the_oldest survives_reconnection "
    "sends_input_again_after_a_loss hunts_through_damage does_not_wait_for_grandchildren gives_terminals reaps_orphans"
).split()


async def test_the_agents_own_tests_as_pid_1(settings: Settings, short_dir: Path, request: pytest.FixtureRequest) -> None:
    wanted = [] if request.config.getoption("--full") else QUICK
    directory = short_dir / "machine"
    directory.mkdir()
    live = await boot(
        MachineRequest("agent", "debian:12", network="none"),
        settings,
        directory,
        overlay_at(directory / "disk.qcow2"),
        detached=False,
    )
    try:
        assert live.agent.welcome.pid == 1
        await live.agent.aclose()  # one host at a time
        argv = [sys.executable, str(CHECK), "--guest", str(live.machine.channel()), *wanted]
        done = await anyio.run_process(argv, check=False)
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
        assert done.stdout.count(b"ok ") >= len(QUICK)
    finally:
        await live.end()
