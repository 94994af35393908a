"""The stock of ssh host keys: bounded, nobody else's to read, and no set is ever given twice."""

from __future__ import annotations

import asyncio
import signal
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from stoker.engine import host_keys
from stoker.engine.host_keys import HostKeys
from stoker.errors import HostError

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
ED25519 = "/etc/ssh/ssh_host_ed25519_key"
TAKER = """
import asyncio, os, sys
from pathlib import Path
from stoker.engine import host_keys
from stoker.engine.host_keys import HostKeys
host_keys.KINDS = {"ed25519": (), "ecdsa": ("-b", "256")}
async def main():
    stock = HostKeys(Path(sys.argv[1]))
    for _ in range(int(sys.argv[2])):
        print((await stock.take(["/etc/ssh/ssh_host_ed25519_key"]))[0][2].replace(chr(10), ""), flush=True)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_keys, "LATER", 0.0)
    monkeypatch.setattr(host_keys, "STOCK", 6)
    monkeypatch.setattr(host_keys, "KINDS", {"ed25519": (), "ecdsa": ("-b", "256")})


@asynccontextmanager
async def filling(stock: HostKeys) -> AsyncIterator[None]:
    task = asyncio.create_task(stock.keep_filled())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_filled(stock: HostKeys, place: Path) -> None:
    """And at rest: some are taken into memory last."""
    while len(stock._ready) < host_keys.READY or len(list(place.glob("*.json"))) + len(stock._ready) < host_keys.STOCK:
        await asyncio.sleep(0.02)


async def test_filled_bounded_and_private(tmp_path: Path) -> None:
    stock, place = HostKeys(tmp_path), tmp_path / "host-keys"
    async with filling(stock):
        await until_filled(stock, place)
        seen = {(await stock.take([ED25519]))[0][2] for _ in range(3)}
        await until_filled(stock, place)
        assert len(seen) == 3
        # It rests when it is full.
        before = sorted(place.iterdir())
        await asyncio.sleep(0.3)
        assert sorted(place.iterdir()) == before and len(before) == host_keys.STOCK - host_keys.READY
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o600}


async def test_what_a_guest_has_decides(tmp_path: Path) -> None:
    stock = HostKeys(tmp_path)
    files = await stock.take(["/etc/ssh/ssh_host_ecdsa_key", "/etc/passwd", "/etc/ssh/ssh_host_dsa_key"])
    assert [(path, mode) for path, mode, _ in files] == [
        ("/etc/ssh/ssh_host_ecdsa_key", 0o600),
        ("/etc/ssh/ssh_host_ecdsa_key.pub", 0o644),
    ]
    assert files[0][2].startswith("-----BEGIN OPENSSH PRIVATE KEY") and files[1][2].startswith("ecdsa-sha2-nistp256 ")
    assert len(await stock.take(["/etc/ssh/ssh_host_dsa_key"])) == 4


async def test_never_twice_not_after_a_kill_either(tmp_path: Path) -> None:
    place = tmp_path / "host-keys"
    stock = HostKeys(tmp_path)
    async with filling(stock):
        await until_filled(stock, place)
    given = [(await stock.take([ED25519]))[0][2].replace("\n", "") for _ in range(1)]
    for _ in range(2):
        stored = len(list(place.glob("*.json")))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", TAKER, tmp_path, "3", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        said, errors = await process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        given += said.decode().split("\n")[:-1]
        assert len(list(place.glob("*.json"))) < max(stored, 1)
    # Those that the first one still had in memory, too.
    given += [(await stock.take([ED25519]))[0][2].replace("\n", "") for _ in range(4)]
    assert len(given) == len(set(given)) == 11
    (place / ".making.0").mkdir()
    (place / ".x.json.1.2").write_text("half")
    (place / "damaged.json").write_text("{")
    HostKeys(tmp_path).sweep()
    assert not list(place.glob(".*"))
    assert await HostKeys(tmp_path).take([ED25519])


async def test_without_ssh_keygen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def missing(argv: list[str], **_: object) -> None:
        raise HostError("tool_missing", f"{argv[0]} is not installed", "stoker doctor")

    monkeypatch.setattr(host_keys, "run", missing)
    with pytest.raises(HostError) as caught:
        await HostKeys(tmp_path).take([ED25519])
    assert caught.value.code == "tool_missing" and "openssh-client" in caught.value.hint
