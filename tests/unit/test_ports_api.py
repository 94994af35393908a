"""Ports of sandboxes by the daemon: the proxy's address, the stream, the SDK's forward. The fake engine's ports are this host's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server_running import free_port, running
from stoker.client.client import AsyncClient
from stoker.client.sandbox import AsyncSandbox
from stoker.errors import InvalidRequest, NotFound, StokerError

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def upper() -> AsyncIterator[int]:
    """Says in capitals what it hears, and ``.`` at the end."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data.upper())
            await writer.drain()
        writer.write(b".")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def test_a_forwarded_port(tmp_path: Path, short_dir: Path) -> None:
    async with running(tmp_path) as server, upper() as port, AsyncClient(settings=server.settings, start=False) as client:
        info = await server.sandbox(name="web")
        box = await AsyncSandbox.connect("web", client=client)
        data = b"abc" * 700_000
        for local in ("127.0.0.1:0", str(short_dir / "sock")):
            async with await box.forward(port, local) as forward:
                if "/" in local:
                    reader, writer = await asyncio.open_unix_connection(forward.address)
                else:
                    reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
                reading = asyncio.create_task(reader.read())
                writer.write(data)
                writer.write_eof()
                assert await reading == data.upper() + b"."
                writer.close()
        assert not (short_dir / "sock").exists()
        # Nobody listens: the connection is closed, and somebody is told why.
        told: list[StokerError] = []
        from stoker.client.forward import listen

        target = f"/v1/sandboxes/{info.id}/ports/{free_port()}/stream"
        async with await listen(client.api, target, "127.0.0.1:0", told.append) as forward:
            reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
            assert await reader.read() == b""
            writer.close()
        assert [error.code for error in told] == ["port_refused"]
        with pytest.raises(StokerError) as taken:
            await box.forward(80, "127.0.0.1:nonsense")
        assert taken.value.code == "cannot_listen"


async def test_where_the_proxy_is(tmp_path: Path) -> None:
    where = free_port()
    async with (
        running(tmp_path, proxy=f"127.0.0.1:{where}", proxy_domain="boxes.test") as server,
        upper() as port,
        AsyncClient(settings=server.settings, start=False) as client,
    ):
        await server.sandbox(name="Web")
        await server.sandbox(name="shy", labels={"stoker.proxy": "none"})
        await server.sandbox(name="safe", labels={"stoker.proxy": "token"})
        box = await AsyncSandbox.connect("Web", client=client)
        access = await box.port(port)
        assert access.url == f"http://{port}-web.boxes.test:{where}/" and not access.token_needed and len(access.token) == 40
        assert (await (await AsyncSandbox.connect("shy", client=client)).port(80)).url is None
        safe = await (await AsyncSandbox.connect("safe", client=client)).port(80)
        assert safe.token_needed and safe.token != access.token
        with pytest.raises(InvalidRequest):
            await box.port(70000)
        with pytest.raises(NotFound):
            await client.api.call("GET", "/v1/sandboxes/nobody/ports/80", type(access))
        # The proxy itself: the service does not speak HTTP, so that is what is told.
        reader, writer = await asyncio.open_connection("127.0.0.1", where)
        writer.write(b"GET / HTTP/1.1\r\nHost: %d-web.boxes.test\r\nConnection: close\r\n\r\n" % port)
        assert (await reader.read()).startswith(b"HTTP/1.1 502 ")
        writer.close()


async def test_a_daemon_whose_proxys_address_is_taken(tmp_path: Path) -> None:
    """It serves all the same."""
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    taken = server.sockets[0].getsockname()[1]
    async with (
        running(tmp_path, proxy=f"127.0.0.1:{taken}") as daemon,
        AsyncClient(settings=daemon.settings, start=False) as client,
    ):
        await daemon.sandbox(name="web")
        box = await AsyncSandbox.connect("web", client=client)
        assert (await box.port(80)).url is None
    server.close()
