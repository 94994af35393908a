"""Process identities, pidfds, and sockets under long names."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from stoker.host.process import ProcessIdentity, boot_id, send_signal, wait_pidfd
from stoker.host.sockets import listen_unix, unix_address

pytestmark = pytest.mark.anyio


async def test_an_identity_lives_as_long_as_its_process(tmp_path: Path) -> None:
    # A name that would confuse a reader of /proc/PID/stat.
    program = tmp_path / "a ) b (c"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    child = subprocess.Popen([program, "600"])  # noqa: ASYNC220
    me = ProcessIdentity.of(child.pid)
    for _ in range(200):
        me = ProcessIdentity.of(child.pid)
        if me.exe == str(program):
            break
        await asyncio.sleep(0.01)
    assert me.exe == str(program) and me.alive()
    assert not ProcessIdentity(me.pid, me.start - 1, me.exe).alive()
    assert not ProcessIdentity(me.pid, me.start, "/bin/other").alive()
    assert ProcessIdentity(me.pid, me.start).alive()
    pidfd = me.open_pidfd()
    waiting = [asyncio.create_task(wait_pidfd(pidfd)) for _ in range(2)]
    await asyncio.sleep(0.02)
    assert not any(task.done() for task in waiting)
    cancelled = asyncio.create_task(wait_pidfd(pidfd))
    await asyncio.sleep(0)
    cancelled.cancel()
    assert send_signal(pidfd, 9)
    await asyncio.wait_for(asyncio.gather(*waiting), 5)
    assert not me.alive(), "a zombie is not alive"
    with pytest.raises(ProcessLookupError):
        me.open_pidfd()
    child.wait()
    assert not send_signal(pidfd, 9)
    os.close(pidfd)
    with pytest.raises(ProcessLookupError):
        ProcessIdentity.of(child.pid)


def test_boot_id() -> None:
    assert len(boot_id()) == 36


def test_sockets_have_their_mode_from_the_start_and_any_length_of_name(short_dir: Path) -> None:
    directory = short_dir / ("d" * 150)
    directory.mkdir()
    old = os.umask(0)
    try:
        with listen_unix(directory / "x.sock") as server, socket.socket(socket.AF_UNIX) as client:
            assert stat.S_IMODE((directory / "x.sock").stat().st_mode) == 0o600
            with unix_address(directory / "x.sock") as address:
                client.connect(address)
            server.accept()[0].close()
            with pytest.raises(OSError, match="in use"):
                listen_unix(directory / "x.sock")
    finally:
        os.umask(old)
