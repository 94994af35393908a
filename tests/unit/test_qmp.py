"""The QMP client against a monitor that follows a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from stoker.errors import GuestError
from stoker.vmm.qemu.qmp import Qmp

pytestmark = pytest.mark.anyio

GREETING = b'{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}\r\n'
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def monitor(path: Path, script: Script) -> AsyncIterator[Path]:
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await script(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield path
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GREETING)
    await answer(reader, writer, {"return": {}})


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *bodies: dict[str, object]) -> dict[str, object]:
    request = json.loads(await reader.readuntil(b"\n"))
    assert isinstance(request, dict)
    for body in bodies:
        identity = {} if "event" in body else {"id": request["id"]}
        writer.write(json.dumps({**identity, **body}).encode() + b"\r\n")
    await writer.drain()
    return request


async def test_commands_events_and_errors(short_dir: Path) -> None:
    requests = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        requests.append(await answer(reader, writer, {"event": "STOP"}, {"return": {"status": "paused"}}))
        requests.append(await answer(reader, writer, {"error": {"class": "GenericError", "desc": "no such thing"}}))
        requests.append(await answer(reader, writer, {"return": {}, "id": 12345}, {"return": "after a stray answer"}))

    # A path longer than a socket's name may be.
    directory = short_dir / ("d" * 120)
    directory.mkdir()
    short = short_dir / "s"
    async with monitor(short, script):
        short.rename(directory / "qmp.sock")
        qmp = await Qmp.connect(directory / "qmp.sock", "sb-1")
        assert await qmp.execute("query-status") == {"status": "paused"}
        assert [event["event"] for event in qmp.events] == ["STOP"]
        with pytest.raises(GuestError) as caught:
            await qmp.execute("blockdev-add", node_name="x", read_only=True)
        assert caught.value.code == "vmm_refused" and "no such thing" in caught.value.message
        assert await qmp.execute("stop") == "after a stray answer"
        await qmp.close()
    assert requests[1]["arguments"] == {"node-name": "x", "read-only": True}
    (directory / "qmp.sock").unlink()


async def test_commands_take_turns(short_dir: Path) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        while True:
            request = json.loads(await reader.readuntil(b"\n"))
            await asyncio.sleep(0.01)
            writer.write(json.dumps({"id": request["id"], "return": request["execute"]}).encode() + b"\r\n")

    async with monitor(short_dir / "s", script) as path:
        qmp = await Qmp.connect(path, "sb-1")
        names = [f"query-{number}" for number in range(5)]
        assert await asyncio.gather(*(qmp.execute(name) for name in names)) == names
        await qmp.close()


async def test_no_answer_breaks_the_connection(short_dir: Path) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        await asyncio.sleep(60)

    async with monitor(short_dir / "s", script) as path:
        qmp = await Qmp.connect(path, "sb-1")
        with pytest.raises(GuestError) as caught:
            await qmp.execute("stop", timeout=0.05)
        assert caught.value.code == "vmm_unresponsive" and qmp.broken
        with pytest.raises(GuestError) as caught:
            await qmp.execute("cont")
        assert caught.value.code == "vmm_gone"
        await qmp.close()


async def test_a_monitor_that_is_silent_gone_or_talks_nonsense(short_dir: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)

    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello\n")

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        except ConnectionError:
            pass

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'["not", "QMP"]\n')

    cases: tuple[tuple[Script, str], ...] = (
        (silent, "vmm_unresponsive"), (closes, "vmm_gone"), (nonsense, "vmm_gone"), (endless, "vmm_gone"), (other, "vmm_gone")
    )  # fmt: skip
    for number, (script, code) in enumerate(cases):
        async with monitor(short_dir / str(number), script) as path:
            with pytest.raises(GuestError) as caught:
                await Qmp.connect(path, "sb-1", timeout=0.3 if script is silent else 10)
            assert caught.value.code == code, script
    with pytest.raises(GuestError) as caught:
        await Qmp.connect(short_dir / "nothing", "sb-1")
    assert caught.value.code == "vmm_gone"
