"""The reverse proxy over real sockets: a service that says exactly what a test wants, and clients that do likewise."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from proxy_running import SECRET, Place, head_of, plain, running
from stoker.errors import GuestError
from stoker.server.proxy import exchange, front
from stoker.server.proxy.heads import BadHead, judge
from stoker.server.proxy.pool import Pool
from stoker.server.proxy.router import proxy_token

pytestmark = pytest.mark.anyio
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


GET = b"GET /a?b=c HTTP/1.1\r\nHost: svc.localhost\r\n"


async def test_a_request_goes_there_and_back() -> None:
    async with running(plain) as r:
        answer = await r.ask(
            GET + b"Connection: close, X-Mine\r\nX-Mine: 1\r\nKeep-Alive: 5\r\nTE: trailers\r\nX-Forwarded-For: 6.6.6.6\r\n"
            b"Proxy-Authorization: x\r\nCookie: a=b\r\nX-Other: \xc3\xa9\r\n\r\n"
        )
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"x-is: here" in head and b"connection: close" in head
        assert body == (
            b"GET /a?b=c HTTP/1.1\r\nhost: svc.localhost\r\ncookie: a=b\r\nx-other: \xc3\xa9\r\n"
            b"x-forwarded-for: 127.0.0.1\r\nx-forwarded-host: svc.localhost\r\nx-forwarded-proto: http\r\n\r\n"
        )
    async with running(plain, trusted=frozenset(("127.0.0.1",))) as r:
        answer = await r.ask(GET + b"Connection: close\r\nX-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Proto: https\r\n\r\n")
        assert b"x-forwarded-for: 6.6.6.6, 127.0.0.1\r\n" in answer and b"x-forwarded-proto: https" in answer


async def test_both_connections_are_kept() -> None:
    async with running(plain) as r:
        reader, writer = await r.dial()
        for number in range(50):
            body = b"x" * number
            writer.write(b"POST / HTTP/1.1\r\nHost: svc.localhost\r\nContent-Length: %d\r\n\r\n%b" % (number, body))
            head = await head_of(reader)
            size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            assert (await reader.readexactly(size)).endswith(b"\r\n\r\n" + body)
        writer.close()
        assert r.service.connections == 1


async def test_pipelined_requests_are_answered_in_their_order() -> None:
    async with running(plain) as r:
        wanted = b"".join(b"GET /%d HTTP/1.1\r\nHost: svc.localhost\r\n\r\n" % n for n in range(10))
        wanted += b"POST /last HTTP/1.1\r\nHost: svc.localhost\r\nConnection: close\r\nContent-Length: 200000\r\n\r\n" + bytes(
            200000
        )
        answer = await r.ask(wanted)
        at = [answer.index(b"GET /%d HTTP/1.1" % n) for n in range(10)]
        assert at == sorted(at) and answer.endswith(bytes(200000))


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: svc.localhost\r\nHost: svc.localhost\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: svc.localhost/x\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: svc.localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: svc.localhost\r\nTransfer-Encoding: gzip, chunked\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: svc.localhost\r\nTransfer-Encoding: xchunked\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: svc.localhost\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"POST / HTTP/1.0\r\nHost: svc.localhost\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: svc.localhost\r\nContent-Length: 3\r\nContent-Length: 3\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: svc.localhost\r\nContent-Length: +3\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: svc.localhost\r\nContent-Length: 3, 3\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: svc.localhost\r\nContent-Length : 3\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: svc.localhost\r\nX: a\r\n b\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: svc.localhost\r\nX: a\x00b\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: svc.localhost\r\nX: a\nY: b\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: svc.localhost\r\nX: a\rY: b\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: svc.localhost\r\n", 505),
        (b"CONNECT svc.localhost:80 HTTP/1.1\r\nHost: svc.localhost\r\n", 400),
        (b"GET /x#y HTTP/1.1\r\nHost: svc.localhost\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: svc.localhost\r\nExpect: 200-maybe\r\n", 417),
        (b"GET / HTTP/1.1\r\nHost: svc.localhost\r\n" + b"X: y\r\n" * 200, 431),
        (b"GET / HTTP/1.1\r\nHost: svc.localhost\r\nX: " + b"y" * 70000 + b"\r\n", 431),
        (b"GET /" + b"y" * 20000 + b" HTTP/1.1\r\nHost: svc.localhost\r\n", 414),
        (b"nonsense\r\n", 400),
    ],
)
async def test_what_two_could_read_in_two_ways_is_refused(head: bytes, status: int) -> None:
    """... and the connection is closed: nothing behind it is read as a request."""
    async with running(plain) as r:
        answer = await r.ask(head + b"\r\nabcGET /smuggled HTTP/1.1\r\nHost: svc.localhost\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
        assert answer.count(b"HTTP/1.1 ") == 1 and b"connection: close" in answer
        assert r.service.connections == 0


async def test_bodies_stream_both_ways() -> None:
    """More than anybody buffers, in both directions, chunked, with trailers; the service answers while it still reads."""
    size = 8 << 20
    got = bytearray()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await head_of(reader)
        assert b"transfer-encoding: chunked" in head and b"content-length" not in head
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while length := int(await reader.readline(), 16):
            data = await reader.readexactly(length + 2)
            got.extend(data[:-2])
            writer.write(b"%x\r\n%b" % (length, data))
            await writer.drain()
        got.extend(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"0\r\nX-Sum: 7\r\nSet-Cookie: a=b\r\n\r\n")
        await reader.read()

    async with running(echo) as r:
        reader, writer = await r.dial()
        writer.write(b"POST / HTTP/1.1\r\nHost: svc.localhost\r\nTransfer-Encoding: chunked\r\n\r\n")

        async def send() -> None:
            for _ in range(size >> 16):
                writer.write(b"10000\r\n" + b"z" * 65536 + b"\r\n")
                await writer.drain()
            writer.write(b"0\r\nX-Trail: 1\r\nHost: evil\r\n\r\n")

        task = asyncio.create_task(send())
        await head_of(reader)
        back = 0
        while length := int(await reader.readline(), 16):
            assert await reader.readexactly(length + 2) == b"z" * length + b"\r\n"
            back += length
        assert await reader.readuntil(b"\r\n\r\n") == b"x-sum: 7\r\n\r\n"
        await task
        assert back == size and bytes(got[size:]) == b"x-trail: 1\r\n\r\n"
        writer.close()


async def test_a_slow_client_holds_the_service_up() -> None:
    written = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await head_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(65536))
            await writer.drain()
            written += 65536

    async with running(flood) as r:
        reader, writer = await r.dial()
        writer.write(GET + b"\r\n")
        await head_of(reader)
        before = -1
        while written != before:  # until nothing moves any more
            before = written
            await asyncio.sleep(0.3)
        assert written < 24 << 20, written
        writer.transport.abort()


@pytest.mark.parametrize("keep", [True, False])
async def test_a_response_without_a_length(keep: bool) -> None:
    async def until_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(b"HTTP/1.0 200 Fine\r\n\r\nto the end")

    async with running(until_close) as r:
        if keep:
            answer = await r.ask(GET + b"\r\n" + GET + b"Connection: close\r\n\r\n")
            assert answer.count(b"transfer-encoding: chunked") == 2 and answer.endswith(b"a\r\nto the end\r\n0\r\n\r\n")
        else:
            answer = await r.ask(b"GET / HTTP/1.0\r\nHost: svc.localhost\r\nConnection: keep-alive\r\n\r\n")
            assert b"chunked" not in answer and b"connection: close" in answer and answer.endswith(b"\r\n\r\nto the end")


async def test_answers_without_a_body() -> None:
    async def some(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await head_of(reader)
            if head.startswith(b"HEAD"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            elif b"/304" in head:
                writer.write(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 1000\r\n\r\n")
            else:
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    async with running(some) as r:
        answer = await r.ask(
            b"".join(b"%b HTTP/1.1\r\nHost: svc.localhost\r\n\r\n" % what for what in (b"HEAD /", b"GET /304", b"GET /"))
            + GET
            + b"Connection: close\r\n\r\n"
        )
        assert answer.count(b"HTTP/1.1 204") == 2 and answer.count(b"content-length: 1000") == 2 and answer.endswith(b"\r\n\r\n")
        assert r.service.connections == 1


async def test_continue_is_the_services_word() -> None:
    async def careful(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await head_of(reader)
        assert b"expect: 100-continue" in head.lower()
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        assert await reader.readexactly(4) == b"body"
        writer.write(OK)

    async with running(careful) as r:
        reader, writer = await r.dial()
        writer.write(b"PUT / HTTP/1.1\r\nHost: svc.localhost\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        assert (await head_of(reader)).startswith(b"HTTP/1.1 103")
        assert (await head_of(reader)).startswith(b"HTTP/1.1 100")
        writer.write(b"body")
        assert (await head_of(reader)).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_websockets_and_other_upgrades() -> None:
    async def upgraded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await head_of(reader)
        assert b"connection: upgrade\r\nupgrade: chat\r\n" in head
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: chat\r\nX: y\r\n\r\nhello ")
        while data := await reader.read(65536):
            writer.write(data.upper())
            await writer.drain()
        writer.write(b" bye")

    async with running(upgraded) as r:
        reader, writer = await r.dial()
        writer.write(b"GET / HTTP/1.1\r\nHost: svc.localhost\r\nConnection: keep-alive, Upgrade\r\nUpgrade: chat\r\n\r\nearly ")
        head = await head_of(reader)
        assert head.startswith(b"HTTP/1.1 101") and b"upgrade: chat" in head and b"x: y" in head
        assert await reader.readexactly(12) == b"hello EARLY "
        writer.write(b"x" * 300000)
        assert await reader.readexactly(300000) == b"X" * 300000
        writer.write_eof()
        assert await reader.read() == b" bye"
        writer.close()


async def test_an_upgrade_that_nobody_wants() -> None:
    async with running(plain) as r:
        upgrade = b"Connection: Upgrade\r\nUpgrade: chat\r\n"
        answer = await r.ask(GET + upgrade + b"\r\n" + GET + b"Connection: close\r\n\r\n")
        assert answer.count(b"HTTP/1.1 200") == 2
        # h2c, and one with a body, are not passed on; the body is.
        h2c = b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\nContent-Length: 6\r\n\r\nabcdef"
        answer = await r.ask(b"POST / HTTP/1.1\r\nHost: svc.localhost\r\n" + h2c)
        assert b"upgrade" not in answer and answer.endswith(b"\r\n\r\nabcdef"), answer


async def test_a_service_that_answers_wrongly() -> None:
    answers = [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"",
    ]
    turn = iter(answers)

    async def wrong(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(next(turn))

    async with running(wrong) as r:
        for answer in answers:
            said = await r.ask(GET + b"Connection: close\r\nAccept: application/json\r\n\r\n")
            head, _, body = said.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 502 "), (answer[:100], said[:300])
            assert json.loads(body)["code"] == ("bad_response" if answer else "service_closed")


async def test_a_service_that_breaks_off() -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")

    async with running(half) as r:
        answer = await r.ask(GET + b"\r\n")
        assert b"content-length: 100\r\n" in answer and answer.endswith(b"\r\n\r\nhalf")


async def test_a_kept_connection_that_was_closed_meanwhile() -> None:
    """The request is sent again over a new one, if it may be."""

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(OK)
        await head_of(reader)

    async with running(once) as r:
        assert (await r.ask(GET + b"\r\n" + GET + b"Connection: close\r\n\r\n")).count(b"HTTP/1.1 200 OK") == 2
        assert r.service.connections == 2
    async with running(once) as r:
        answer = await r.ask(GET + b"\r\nPOST / HTTP/1.1\r\nHost: svc.localhost\r\nConnection: close\r\n\r\n")
        assert answer.count(b"HTTP/1.1 200 OK") == 1 and b"service_closed" in answer


async def test_time_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "RESPONSE", 0.5)
    monkeypatch.setattr(front, "HEAD_SECONDS", 0.5)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with running(silent) as r:
        assert (await r.ask(GET + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 504 ")
        assert (await r.ask(GET)).startswith(b"HTTP/1.1 408 ")
        assert await r.ask(b"") == b""


async def test_a_client_that_goes_takes_its_request_with_it() -> None:
    gone = asyncio.Event()

    async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        assert await reader.read() == b"abc"
        gone.set()

    async with running(waits) as r:
        _, writer = await r.dial()
        writer.write(b"POST / HTTP/1.1\r\nHost: svc.localhost\r\nContent-Length: 9\r\n\r\nabc")
        while not r.service.connections:
            await asyncio.sleep(0.01)
        writer.close()
        async with asyncio.timeout(10):
            await gone.wait()


async def test_who_may_use_a_sandbox() -> None:
    async with running(plain) as r:
        boxes = r.sandboxes
        boxes.known = {
            "web": Place("sb-1"),
            "theirs": Place("sb-2", local=False),
            "closed": Place("sb-3", policy="none"),
            "guarded": Place("sb-4", policy="token"),
            "shared": Place("sb-5", local=False, policy="open"),
        }
        boxes.error = GuestError("port_refused", "nothing listens on port 80 of web", "start it")

        async def status(host: str, *more: str) -> int:
            lines = "".join(f"{line}\r\n" for line in (f"Host: {host}", "Connection: close", *more))
            return int((await r.ask(f"GET / HTTP/1.1\r\n{lines}\r\n".encode()))[9:12])

        assert await status("80-web.localhost:7070") == 502
        assert await status("80-WEB.LocalHost.") == 502
        assert await status("80-shared.localhost") == 502
        for name in ("80-nobody", "80-theirs", "80-closed", "80-guarded", "0-web", "70000-web", "web", "080-web", "80-web.evil"):
            assert await status(f"{name}.localhost") == 404, name
        assert await status("80-web.example.org") == 404
        token = proxy_token(SECRET, "sb-4")
        assert await status("80-guarded.localhost", f"X-Stoker-Token: {token}") == 502
        assert await status("80-guarded.localhost", f"Cookie: a=b; stoker-token={token}; c=d") == 502
        assert await status("80-guarded.localhost", f"X-Stoker-Token: {proxy_token(SECRET, 'sb-2')}") == 404
        assert await status("80-theirs.localhost", f"X-Stoker-Token: {proxy_token(SECRET, 'sb-2')}") == 502
        # The two answers differ in nothing.
        asked = "GET / HTTP/1.1\r\nHost: 80-{}.localhost\r\nConnection: close\r\n\r\n"
        one, two = [await r.ask(asked.format(name).encode()) for name in ("nobody", "theirs")]
        assert one == two


async def test_the_proxys_own_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(plain) as r:
        r.sandboxes.known = {"web": Place("sb-1")}
        for error, status in (
            (GuestError("port_refused", "nothing listens on port 80 of web", "start it"), 502),
            (GuestError("port_timeout", "port 80 of web does not answer"), 504),
            (GuestError("agent_unreachable", "no agent"), 503),
        ):
            r.sandboxes.error = error
            answer = await r.ask(b"GET / HTTP/1.1\r\nHost: 80-web.localhost\r\nConnection: close\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 %d " % status) and error.message.encode() in answer
            assert (b"retry-after: " in answer) == (status == 503)
            if error.hint:
                assert f"hint: {error.hint}".encode() in answer
        # The connection is kept.
        answer = await r.ask(b"GET / HTTP/1.1\r\nHost: 80-web.localhost\r\n\r\n" * 2 + GET + b"Connection: close\r\n\r\n")
        assert answer.count(b"HTTP/1.1 503") == 2 and answer.count(b"HTTP/1.1 200") == 1
        # HEAD has no body.
        answer = await r.ask(b"HEAD / HTTP/1.1\r\nHost: 80-web.localhost\r\nConnection: close\r\n\r\n")
        assert answer.endswith(b"\r\n\r\n")


async def test_connections_to_one_service_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from stoker.server.proxy import pool

    monkeypatch.setattr(pool, "AT_A_TIME", 3)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with running(silent) as r:
        clients = [await r.dial() for _ in range(3)]
        for _, writer in clients:
            writer.write(GET + b"\r\n")
        while r.service.connections < 3:
            await asyncio.sleep(0.01)
        answer = await r.ask(GET + b"Connection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after" in answer
        for _, writer in clients:
            writer.close()


async def test_rested_connections_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(plain) as r:
        await r.ask(GET + b"Connection: close\r\n\r\n")
        (only,) = r.router.pools.values()
        assert isinstance(only, Pool) and len(only.idle) == 1
        r.router.sweep(asyncio.get_running_loop().time() + 1)
        assert not only.idle


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_million_requests_leave_nothing_behind() -> None:
    words = [sys.executable, "-m", "stoker.cli", "bench", "proxy", "--requests", "1000000", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=3500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(result)
    assert result["failures"] == 0 and result["n"] >= 1_000_000
    assert result["descriptors"]["after"] <= result["descriptors"]["before"]
    assert result["resident_kib"]["after"] <= result["resident_kib"]["before"] + 4096


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"3"), (b"content-length", b"3")],
        [(b"content-length", b"3"), (b"transfer-encoding", b"chunked")],
        [(b"content-length", b"\xb2")],
        [(b"transfer-encoding", b"")],
        [(b"transfer-encoding", b"chunked, chunked")],
        [(b"x y", b"")],
        [(b"x", b"a\rb")],
    ],
)
def test_heads_are_judged_whatever_the_parser_let_through(headers: list[tuple[bytes, bytes]]) -> None:
    assert judge([(b"host", b"a")], "1.1", request=True).length == 0
    for request in (True, False):
        with pytest.raises(BadHead):
            judge([(b"host", b"a"), *headers], "1.1", request=request)
