"""Starting the daemon on demand and ending it: real daemon processes, no guests."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stoker.client import launch
from stoker.client.client import AsyncClient
from stoker.errors import HostError
from stoker.settings import Settings, load_settings

pytestmark = pytest.mark.anyio
STOKER = Path(sys.executable).with_name("stoker")


@pytest.fixture
def settings(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setenv("STOKER_RUN_DIR", str(short_dir / "run"))
    monkeypatch.setenv("STOKER_DATA_DIR", str(short_dir / "data"))
    monkeypatch.setenv("STOKER_CONFIG", "/nonexistent/stoker.toml")
    monkeypatch.delenv("STOKER_URL", raising=False)
    settings = load_settings()
    yield settings
    # Whatever a test left running is ended here; a clean test has ended it itself.
    try:
        daemon = launch.listening(settings.socket)
    except HostError:
        daemon = None
    if daemon is not None and daemon.pid != os.getpid():
        launch.stop_daemon(daemon.pid)


async def stoker(*words: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        STOKER, *words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_two_clients_at_once_start_one_daemon(settings: Settings) -> None:
    results = await asyncio.gather(*(stoker("ls", "--json") for _ in range(3)))
    assert [(code, out) for code, out, _ in results] == [(0, "[]\n")] * 3, results
    starts = (settings.run_dir / "daemon.log").read_text().count("event=ready")
    assert starts == 1
    code, out, _ = await stoker("daemon", "status", "--json")
    status = json.loads(out)
    assert code == 0 and status["auto_started"]
    first = launch.listening(settings.socket)
    assert first is not None and first.pid == status["pid"] and first.uid == os.geteuid()
    code, out, _ = await stoker("daemon", "restart", "--json")
    assert code == 0 and json.loads(out)["pid"] != first.pid
    assert (await stoker("daemon", "stop"))[0] == 0
    assert launch.listening(settings.socket) is None
    assert (await stoker("daemon", "status"))[0] == 3
    assert (await stoker("daemon", "stop"))[1] == "no daemon runs\n"


async def test_a_killed_daemon_is_replaced(settings: Settings) -> None:
    async with AsyncClient() as client:
        first = (await client.version()).pid
        os.kill(first, signal.SIGKILL)
        deadline = asyncio.get_running_loop().time() + 10
        while launch.listening(settings.socket) is not None:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.02)
        # The same client goes on: its kept connection is seen to be dead, nobody listens, another daemon is started.
        second = (await client.version()).pid
        assert second != first
    assert launch.stop_daemon(second)
    assert not launch.stop_daemon(second)


async def test_what_keeps_a_daemon_from_starting_is_said(settings: Settings) -> None:
    settings.data_dir.mkdir(parents=True)
    (settings.data_dir / "stoker.db").write_bytes(b"this is no database" * 1000)
    code, _, err = await stoker("ls")
    assert code == 125 and "database" in err and err.startswith("stoker: "), err
    assert len(err.splitlines()) <= 2


async def test_a_daemon_that_dies_at_once_is_no_riddle(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(HostError) as caught:
        await launch.start_daemon(settings)
    assert caught.value.code == "daemon_start_failed"


async def test_a_daemon_that_is_never_ready_is_given_up(
    settings: Settings, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = short_dir / "python"
    script.write_text("#!/bin/sh\nexec sleep 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(Exception, match="not ready after") as caught:
        await launch.start_daemon(replace(settings, start_timeout=0.3))
    assert getattr(caught.value, "code", "") == "daemon_start_timeout"
    await asyncio.sleep(3)  # the script ends by itself


async def test_another_users_directory_is_refused(settings: Settings, short_dir: Path) -> None:
    place = short_dir / "theirs"
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(HostError) as caught:
        await launch.start_daemon(replace(settings, run_dir=place))
    assert caught.value.code == "directory_not_private"
    (short_dir / "link").symlink_to(short_dir)
    with pytest.raises(HostError):
        await launch.start_daemon(replace(settings, run_dir=short_dir / "link"))


async def test_a_stale_socket_is_nobody(settings: Settings) -> None:
    settings.run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(settings.socket))
    assert launch.listening(settings.socket) is None


async def test_a_url_is_never_started_for(settings: Settings) -> None:
    async with AsyncClient(f"unix:{settings.socket}") as client:
        with pytest.raises(HostError) as caught:
            await client.version()
    assert caught.value.code == "daemon_unreachable" and not settings.run_dir.exists()
