"""The daemon around the application: sockets, lock, bounds before a body, its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
import time
from pathlib import Path

import pytest

from server_running import LOCAL, running
from stoker.errors import HostError, InvalidRequest, StokerError
from stoker.server import listen, protocol
from stoker.server.log import configure_log

pytestmark = pytest.mark.anyio


async def _raw(path: Path, data: bytes, *, hold: bool = False) -> bytes:
    """Everything the daemon answers to bytes that a client library would not send."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(data)
    try:
        async with asyncio.timeout(10):
            return await reader.read(1 << 20) if not hold else await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_the_socket_goes_with_its_daemon_and_the_lock_stays(short_dir: Path) -> None:
    async with running(short_dir) as daemon:
        assert stat.S_ISSOCK(daemon.settings.socket.stat().st_mode)
        assert (daemon.settings.run_dir / "daemon.lock").read_text().strip() == str(os.getpid())
        assert sorted(entry.name for entry in daemon.settings.run_dir.iterdir()) == ["daemon.lock", "stoker.sock"]
    assert sorted(entry.name for entry in daemon.settings.run_dir.iterdir()) == ["daemon.lock"]


async def test_a_second_daemon_is_refused_and_changes_nothing(short_dir: Path) -> None:
    async with running(short_dir) as daemon:
        with pytest.raises(HostError) as refused:
            listen.take_lock(daemon.settings.run_dir / "daemon.lock", daemon.settings.socket)
        assert refused.value.code == "daemon_running" and str(os.getpid()) in refused.value.message
        assert (await daemon.http.get("/v1/health")).status_code == 200


async def test_what_a_dead_daemon_left_is_replaced(short_dir: Path) -> None:
    run = short_dir / "run"
    run.mkdir(mode=0o700)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(run / "stoker.sock"))
    dead.close()
    (run / ".stoker.sock.12345").touch()
    async with running(short_dir) as daemon:
        assert (await daemon.http.get("/v1/health")).status_code == 200
        assert not (run / ".stoker.sock.12345").exists()


async def test_it_waits_for_one_that_is_just_ending(short_dir: Path) -> None:
    path = short_dir / "daemon.lock"
    first = listen.take_lock(path, short_dir / "none.sock")
    with pytest.raises(HostError):
        await asyncio.to_thread(listen.take_lock, path, short_dir / "none.sock", 0.2)
    waiting = asyncio.create_task(asyncio.to_thread(listen.take_lock, path, short_dir / "none.sock"))
    await asyncio.sleep(0.1)
    os.close(first)
    os.close(await asyncio.wait_for(waiting, 5))


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_run_dir_that_others_may_write_to_is_refused(short_dir: Path, mode: int) -> None:
    run = short_dir / "run"
    run.mkdir()
    run.chmod(mode)
    with pytest.raises(HostError) as refused:
        listen.prepare_run_dir(run)
    assert refused.value.code == "directory_refused"
    link = short_dir / "link"
    link.symlink_to(short_dir)
    with pytest.raises(HostError):
        listen.prepare_run_dir(link)


def test_a_path_that_is_too_long_for_a_socket_says_so(short_dir: Path) -> None:
    deep = short_dir / ("x" * 100)
    deep.mkdir()
    with pytest.raises(HostError) as refused:
        listen.bind_unix(deep / "stoker.sock", None)
    assert refused.value.code == "path_too_long"


@pytest.mark.parametrize("address", ["", "x", "1.2.3.4", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:-1", "127.0.0.1:http"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(InvalidRequest):
        listen.bind_tcp(address)


def test_tcp_is_loopback_unless_told_otherwise_and_a_taken_port_is_named() -> None:
    with listen.bind_tcp(":0") as sock:
        host, port = sock.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(HostError) as refused:
            listen.bind_tcp(f"127.0.0.1:{port}")
        assert refused.value.code == "cannot_listen" and str(port) in refused.value.message
    with pytest.raises(StokerError):
        listen.bind_tcp("no.such.host.invalid:1")


async def test_it_ends_by_itself_when_nobody_needs_it(short_dir: Path) -> None:
    async with running(short_dir, auto=True, idle_exit=0.6) as daemon:
        box = await daemon.sandbox()
        await asyncio.sleep(1.2)
        assert not daemon.task.done()  # a sandbox keeps it
        await daemon.engine.destroy(LOCAL, box.id)
        reader, writer = await asyncio.open_unix_connection(str(daemon.settings.socket))
        await asyncio.sleep(1.2)
        assert not daemon.task.done()  # a client keeps it
        writer.close()
        del reader
        await asyncio.wait_for(asyncio.shield(daemon.task), 10)
        assert not daemon.settings.socket.exists()


async def test_sigterm_ends_it_although_streams_are_open(short_dir: Path) -> None:
    async with running(short_dir) as daemon:
        async with daemon.http.stream("GET", "/v1/events/stream") as stream:
            assert stream.status_code == 200
            began = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(asyncio.shield(daemon.task), 10)
            assert time.monotonic() - began < 6
        assert daemon.engine.retired


async def test_bounds_before_a_body(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT", 0.5)
    async with running(short_dir) as daemon:
        path = daemon.settings.socket
        for bad in (
            b"GET /v1/health HTTP/1.1\r\nX: " + b"a" * 200_000,
            b"GET /v1/health HTTP/1.1\r\n" + b"X: a\r\n" * 300 + b"\r\n",
            b"GET /" + b"a" * 200_000,
            b"\x16\x03\x01\x02\x00\x01",
            b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        ):
            answer = await _raw(path, bad)
            assert answer.startswith(b"HTTP/1.1 400") and b'"bad_request"' in answer, bad[:40]
        began = time.monotonic()
        assert await _raw(path, b"GET /v1/health HTT", hold=True) == b""  # a head that never ends
        assert await _raw(path, b"", hold=True) == b""
        assert time.monotonic() - began < 8
        trailer = b"POST /v1/sandboxes HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: " + b"a" * 500_000
        assert b"HTTP/1.1 400" in await _raw(path, trailer)
        assert (await daemon.http.get("/v1/health")).status_code == 200


async def test_a_refused_upload_is_heard_out_but_not_for_ever(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_BYTES", 4 << 20)
    async with running(short_dir) as daemon:
        put = await daemon.http.put("/v1/sandboxes/nope/files", params={"path": "/x"}, content=b"x" * (2 << 20))
        assert put.status_code == 404  # the whole body was sent, and the answer read
        reader, writer = await asyncio.open_unix_connection(str(daemon.settings.socket))
        head = b"PUT /v1/sandboxes/nope/files?path=/x HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
        writer.write(head)
        sent = 0
        with pytest.raises(ConnectionError):
            while sent < 64 << 20:
                writer.write(b"x" * 65536)
                await writer.drain()
                sent += 65536
        assert sent < 32 << 20
        del reader


async def test_requests_may_follow_each_other_on_one_connection(short_dir: Path) -> None:
    async with running(short_dir) as daemon:
        one = b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n"
        last = b"GET /v1/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = await _raw(daemon.settings.socket, one * 3 + last, hold=True)
        assert answer.count(b"HTTP/1.1 200 OK") == 4 and answer.count(b"date: ") == 4


def test_sockets_of_systemd_are_taken_by_whom_they_are_for(short_dir: Path) -> None:
    assert listen.activated_sockets({}, 1) == []
    assert listen.activated_sockets({"LISTEN_PID": "2", "LISTEN_FDS": "1"}, 1) == []
    assert listen.activated_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "x"}, 1) == []
    path = short_dir / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(path))
        listen.notify({"NOTIFY_SOCKET": str(path)}, "READY=1")
        assert ear.recv(100) == b"READY=1"
    listen.notify({"NOTIFY_SOCKET": str(short_dir / "nobody")}, "READY=1")
    listen.notify({}, "READY=1")


def test_the_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stoker.server import log

    monkeypatch.setattr(log, "MAX_BYTES", 10_000)
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    try:
        configure_log(tmp_path / "daemon.log")
        for number in range(2000):
            logging.getLogger("stoker.test").warning("line %d\nwith a break", number)
        for handler in root.handlers:
            handler.close()
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        import structlog

        structlog.reset_defaults()
    assert sum(entry.stat().st_size for entry in tmp_path.iterdir()) <= 21_000
    last = (tmp_path / "daemon.log").read_text().splitlines()[-1]
    assert 'event="line 1999\\nwith a break"' in last and "level=warning" in last
