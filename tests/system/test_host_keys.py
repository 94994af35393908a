"""Copies of a machine with an SSH server: each has host keys of its own, and its sshd uses them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from crashing import ADMIN
from engine_fixtures import own_data
from engine_guests import make, opened, run
from stoker.api.models import CopySandbox, CreateSnapshot, ForkSandbox, OperationState, OutputMode, StartProcess
from stoker.cli.bench.ssh import sshd_packages
from stoker.engine.engine import Engine
from stoker.host.run import run as run_here
from stoker.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]
KINDS = ("ed25519", "ecdsa", "rsa")
TO_SSHD = "exec 3<>/dev/tcp/127.0.0.1/22 || exit; cat <&3 & exec cat >&3"
UNPACK = """set -e
cd /root/debs
for deb in *.deb; do dpkg-deb --fsys-tarfile "$deb" | tar -x -C / --keep-directory-symlink; done
grep -q ^sshd: /etc/passwd || echo sshd:x:102:65534::/run/sshd:/usr/sbin/nologin >> /etc/passwd
mkdir -p /run/sshd
ldconfig
rm -r /root/debs
echo 0123456789abcdef0123456789abcdef > /etc/machine-id
"""
IDENTITY = "cat /etc/machine-id; hostname; cat /proc/sys/kernel/random/boot_id"


async def said(engine: Engine, name: str, script: str) -> str:
    code, data = await run(engine, name, script)
    assert code == 0, data
    return data.decode()


async def put(engine: Engine, name: str, path: str, data: bytes) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield data

    await engine.files.write(ADMIN, name, path, pieces(), append=False, mode=0o600, user=None)


@asynccontextmanager
async def sshd_at(engine: Engine, name: str) -> AsyncIterator[int]:
    """A port of this host that leads to the sshd in a guest."""
    tasks: set[asyncio.Task[None]] = set()

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = StartProcess(argv=["bash", "-c", TO_SSHD], stdin=True, mode=OutputMode.BLOCK)
        attached = await engine.processes.open(ADMIN, name, request)

        async def feed() -> None:
            while data := await reader.read(65536):
                await attached.write(data)
            await attached.close_stdin()

        feeding = asyncio.ensure_future(feed())
        try:
            while (piece := await attached.read()) is not None:
                if piece.stream == 1:
                    writer.write(piece.data)
                    await writer.drain()
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            writer.close()
            await attached.aclose()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(task := asyncio.ensure_future(join(reader, writer)))
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def scanned(engine: Engine, name: str) -> dict[str, str]:
    """The host keys that the sshd in a guest shows, by kind: all three, however long it takes to listen."""
    async with sshd_at(engine, name) as port, asyncio.timeout(120):
        while True:
            done = await run_here(["ssh-keyscan", "-T", "60", "-t", "ed25519,ecdsa,rsa", "-p", str(port), "127.0.0.1"], check=False)
            lines = [line.split() for line in done.stdout.decode().splitlines() if not line.startswith("#")]
            if len(lines) == len(KINDS):
                return {kind: key for _, kind, key in lines}


async def stored(engine: Engine, name: str) -> dict[str, str]:
    """Those on its disk: of each private key, its own public one."""
    lines = (await said(engine, name, "grep -h '' /etc/ssh/ssh_host_*_key.pub; stat -c %a /etc/ssh/ssh_host_*_key")).splitlines()
    keys = dict(line.split()[:2] for line in lines if line.startswith(("ssh-", "ecdsa")))
    assert lines[len(keys) :] == ["600"] * len(keys)
    return keys


async def has_sshd(engine: Engine, settings: Settings, directory: Path, name: str) -> None:
    await said(engine, name, "mkdir -p /root/debs /etc/ssh")
    for deb in await sshd_packages("debian:12", settings, directory):
        await put(engine, name, f"/root/debs/{deb.name}", deb.read_bytes())
    for kind in KINDS:
        await run_here(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "", "-f", directory / kind])
        await put(engine, name, f"/etc/ssh/ssh_host_{kind}_key", (directory / kind).read_bytes())
        await put(engine, name, f"/etc/ssh/ssh_host_{kind}_key.pub", (directory / f"{kind}.pub").read_bytes())
    await said(engine, name, UNPACK)
    await engine.processes.start(ADMIN, name, StartProcess(argv=["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null"], tag="sshd"))


async def handled(engine: Engine, name: str) -> dict[str, str]:
    certificate = await engine.identity(ADMIN, name)
    assert all(hazard.handled or hazard.beyond for hazard in certificate.hazards), certificate
    return {hazard.name: hazard.detail for hazard in certificate.hazards if hazard.handled}


async def test_copies_with_an_sshd(settings: Settings, short_dir: Path, tmp_path: Path) -> None:
    own = own_data(settings, short_dir)
    async with opened(own) as engine:
        await make(engine, name="box")
        await has_sshd(engine, own, tmp_path, "box")
        original = await scanned(engine, "box")
        assert original == await stored(engine, "box")
        result = await engine.fork(ADMIN, "box", ForkSandbox(name="copy", count=2))
        assert [item.error for item in result.items] == [None, None]
        shown = [original]
        for name in ("copy-1", "copy-2"):
            words = await handled(engine, name)
            assert words["ssh_host_keys"].startswith("6 files written") and words["sshd"] == "told to read its keys"
            shown.append(await scanned(engine, name))
            assert shown[-1] == await stored(engine, name)
        for kind in original:
            assert len({keys[kind] for keys in shown}) == 3, kind
        assert await scanned(engine, "box") == original, "the original's keys are its own"
        # What the machine has is what its copy gets, and a copy that boots is another machine as well.
        await said(engine, "copy-1", "rm /etc/ssh/ssh_host_rsa_key* /etc/ssh/ssh_host_ecdsa_key*")
        snapshot = await engine.snapshot(ADMIN, "copy-1", CreateSnapshot(name="one"))
        before = (await said(engine, "copy-1", IDENTITY)).split()
        for name, cold in (("warm", False), ("cold", True)):
            operation = await engine.start_snapshot(ADMIN, snapshot.id, CopySandbox(name=name, cold=cold))
            ended = await engine.wait_operation(ADMIN, operation.id, 300)
            assert ended.state is OperationState.SUCCEEDED, ended.error
            assert list(await stored(engine, name)) == ["ssh-ed25519"]
            words = await handled(engine, name)
            assert words["ssh_host_keys"].startswith("2 files written") and {"machine_id", "hostname", "boot_id"} <= set(words)
            identity = (await said(engine, name, IDENTITY)).split()
            assert identity[1] == name and not set(identity) & set(before)
            shown.append(await stored(engine, name))
        assert len({keys["ssh-ed25519"] for keys in shown}) == 5
        assert (await engine.identity(ADMIN, "warm")).generation == 2 and (await engine.identity(ADMIN, "cold")).generation == 0
        # Once it is a machine of its own it stays that.
        await engine.stop(ADMIN, "cold", 5)
        operation = await engine.start(ADMIN, "cold")
        await engine.wait_operation(ADMIN, operation.id, 300)
        assert (await said(engine, "cold", IDENTITY)).split()[:2] == identity[:2]
        assert await stored(engine, "cold") == shown[-1]
        await engine.snapshots.remove(ADMIN, "one")
        assert (await engine.upkeep.fsck(repair=False)).clean
