"""Machines that begin in a process of their program that was loaded before, with a shell in the VMM's place, and with QEMU."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shim_pipes import ENVIRONMENT, Pipes, ended, gone, pipes
from stoker.errors import HostError
from stoker.host.binaries import shim_path
from stoker.host.process import ProcessIdentity
from stoker.vmm.shim import Supervised, find, read_exit, start
from stoker.vmm.zygote import Zygote

__all__ = ["pipes"]
pytestmark = pytest.mark.anyio
SHELL = "/bin/sh"


@asynccontextmanager
async def zygote(program: str = SHELL) -> AsyncIterator[Zygote]:
    found = await Zygote.begin(program)
    try:
        yield found
    finally:
        await found.close()
    assert not Path(f"/proc/{found._pid}").exists() if found._pid else True


async def begun(pipes: Pipes, mother: Zygote, *argv: str, **options: object) -> Supervised:
    pair = await start(shim_path(), pipes.options(**options), argv, {**ENVIRONMENT, "A": "b c"}, mother)
    assert pair.descriptor is not None
    os.close(pair.descriptor)
    return pair


def field(pid: int, name: str) -> str:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(name + ":"))


async def test_a_machine_is_what_it_would_be_without(pipes: Pipes) -> None:
    script = 'echo "$0 $# $2"; env; umask; ulimit -c; while :; do sleep 0.1; done'
    argv = (SHELL, "-c", script, "name", "one", "two words")
    async with zygote() as mother:
        user = {"user": 0x5A000001} if os.geteuid() == 0 else {}
        pair = await begun(pipes, mother, *argv, **user)
        assert find(pipes.directory) is not None
        assert Path(f"/proc/{pair.vmm.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0") == [text.encode() for text in argv]
        assert pair.shim.exe == str(shim_path().resolve()) and pair.vmm.exe == os.path.realpath(SHELL)
        assert field(pair.vmm.pid, "PPid") == str(pair.shim.pid) and field(pair.shim.pid, "PPid") == str(mother._pid)
        own = 0x180000000  # the C library's, which nobody can change
        assert field(pair.vmm.pid, "NoNewPrivs") == "1" and int(field(pair.vmm.pid, "SigIgn"), 16) & ~own == 0
        if user:
            assert field(pair.vmm.pid, "Uid").split() == [str(0x5A000001)] * 4 and field(pair.vmm.pid, "Groups") == ""
            assert field(pair.vmm.pid, "CapPrm") == field(pair.vmm.pid, "CapEff") == "0" * 16
            assert os.stat(f"/proc/{pair.vmm.pid}/fd").st_uid == 0x5A000001
        # It has its streams and the one descriptor it was given, and nothing of the zygote's or ours.
        assert set(os.listdir(f"/proc/{pair.vmm.pid}/fd")) - {"10"} == {"0", "1", "2", str(pipes.console)}
        assert os.stat(f"/proc/{pair.vmm.pid}/fd/{pipes.console}").st_ino == os.fstat(pipes.console).st_ino
        log = pipes.directory / "vmm.log"
        await gone(lambda: log.exists() and b"0\n" in log.read_bytes().partition(b"0077")[2])
        said = log.read_text().splitlines()
        assert said[0] == "name 2 two words" and {"A=b c", "PATH=/usr/bin:/bin"} <= set(said)
        assert not [line for line in said if line.startswith(("LD_", "ZYGOTE"))]
        # It lives on without the zygote, and not without its shim.
        await mother.close()
        assert pair.vmm.alive() and pair.shim.alive()
        os.kill(pair.shim.pid, signal.SIGKILL)
        await gone(lambda: not pair.vmm.alive())


async def test_ends_and_failures(pipes: Pipes) -> None:
    async with zygote() as mother:
        pair = await begun(pipes, mother, SHELL, "-c", "exit 7")
        await ended_there(pair)
        record = read_exit(pipes.directory)
        assert record is not None and (record["code"], record["cause"]) == (7, "vmm")
        theirs, ours = pipes.owner()
        pair = await begun(pipes, mother, SHELL, "-c", "while :; do sleep 0.1; done", owner=theirs)
        os.close(ours)
        await ended_there(pair)
        assert (read_exit(pipes.directory) or {})["cause"] == "owner"
        if os.geteuid() == 0:
            with pytest.raises(HostError) as failed:
                await begun(pipes, mother, SHELL, "-c", ":", user=5, device=pipes.directory / "none")
            assert failed.value.details == {"step": "device", "errno": 2}
        # With a gate nothing runs before it returns, and what it put the shim into is where all of it is.
        seen: list[int] = []

        async def gate(pid: int) -> None:
            seen.append(pid)
            await asyncio.sleep(0.1)
            assert find(pipes.directory) is None

        pair = await begun(pipes, mother, SHELL, "-c", "while :; do sleep 0.1; done", gate=gate)
        assert seen == [pair.shim.pid]
        os.kill(pair.shim.pid, signal.SIGTERM)
        await ended_there(pair)

        async def refused(pid: int) -> None:
            seen.append(pid)
            raise HostError("refused", "no")

        with pytest.raises(HostError, match="no"):
            await begun(pipes, mother, SHELL, "-c", ":", gate=refused)
        await gone(lambda: not ProcessIdentity(seen[-1], 0).alive())


async def ended_there(pair: Supervised) -> None:
    """It is the zygote's child, which nobody has to wait for."""
    await gone(lambda: not pair.vmm.alive() and not pair.shim.alive())


async def test_many_at_once_and_hostile_requests(pipes: Pipes) -> None:
    async with zygote() as mother:
        directories = [pipes.directory.parent / f"m{number}" for number in range(8)]
        for directory in directories:
            directory.mkdir(mode=0o700)
        script = "while :; do sleep 0.1; done"
        pairs = await asyncio.gather(*(begun(pipes, mother, SHELL, "-c", script, directory=directory) for directory in directories))
        assert len({pair.vmm.pid for pair in pairs}) == 8
        for pair in pairs:
            os.kill(pair.shim.pid, signal.SIGTERM)
        for pair in pairs:
            await ended_there(pair)
        # What makes no sense is refused, and the next is served.
        for data, fds in ((b"x", []), (b"9,\0-1\0\0a\0--\0b\0", [0]), (b"5\0-1\0\0--\0b\0", []), (b"\0" * 5000, [])):
            socket.send_fds(mother._sock, [data], fds)
            assert await mother._answer() is None
        with pytest.raises(HostError, match="too much"):
            await mother.start(["x" * 200000], {}, [], None)
        await ended_there(await begun(pipes, mother, SHELL, "-c", ":"))
    with pytest.raises(HostError):
        await mother.start(["x"], {}, [], None)


async def test_what_is_no_program_of_that_kind(tmp_path: Path, pipes: Pipes) -> None:
    script = tmp_path / "qemu"
    script.write_text("#!/bin/sh\nexit 0\n")
    script.chmod(0o755)
    for program in (str(script), str(shim_path()), str(tmp_path / "none")):
        with pytest.raises(HostError) as refused:
            await Zygote.begin(program)
        assert refused.value.code == "zygote_failed"
    # Where it has ended, machines are started as ever.
    async with zygote() as mother:
        os.kill(mother._pid, signal.SIGKILL)
        pair = await start(shim_path(), pipes.options(), (SHELL, "-c", "exit 3"), ENVIRONMENT, mother)
        assert pair.descriptor is None and mother.broken
        await ended(pair)


async def test_one_that_does_not_answer_begins_nothing_twice(pipes: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker.vmm.zygote.PATIENCE", 0.2)
    async with zygote() as mother:
        os.kill(mother._pid, signal.SIGSTOP)
        with pytest.raises(HostError) as silent:
            await start(shim_path(), pipes.options(), (SHELL, "-c", ":"), ENVIRONMENT, mother)
        assert silent.value.code == "zygote_silent" and mother.broken and find(pipes.directory) is None


async def test_qemu_itself() -> None:
    program = shutil.which("qemu-system-x86_64")
    assert program is not None
    async with zygote(program) as mother:
        assert mother.current and field(mother._pid, "Threads") == "1"
