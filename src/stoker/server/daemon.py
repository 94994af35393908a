"""``stoker serve``: one daemon for one run_dir, from its lock to its end.

Order: lock, sockets (clients may queue from here on), engine (adopts what lives), then answers, then readiness is told
(sd_notify, the starter's pipe). At SIGTERM the same backwards: no new clients, those there are get two seconds, the engine lets go
of the machines, which live on. A daemon that a client started ends by itself after ``settings.idle_exit`` seconds without
a connection, a sandbox and an operation.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import json
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import structlog
from uvicorn import Config, Server

from stoker.errors import StokerError, error_to_wire
from stoker.server import listen
from stoker.server.app import create_app
from stoker.server.auth import group_id
from stoker.server.log import configure_log
from stoker.server.protocol import Connections, DaemonProtocol
from stoker.server.signing import load_secret

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stoker.server.ports import EngineProtocol
    from stoker.settings import Settings

__all__ = ["make_server", "run_daemon", "serve"]

_log = structlog.get_logger("stoker.daemon")
GRACE = 2
KEEP_ALIVE = 75
MAX_MESSAGE = 1 << 20
PING_EVERY, PING_TIMEOUT = 30.0, 300.0
OpenEngine = Callable[["Settings"], AbstractAsyncContextManager["EngineProtocol"]]


class _Server(Server):
    """uvicorn's, without its ten ticks a second: an idle daemon does nothing at all."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.server_state: Connections = Connections()
        self._end = asyncio.Event()
        self.started_event = asyncio.Event()
        self.retire: Callable[[], None] = lambda: None

    async def main_loop(self) -> None:
        self.started_event.set()
        await self._end.wait()

    def stop(self) -> None:
        # First the engine is told: connections that close now (leases) are ours to close, not their clients'.
        self.retire()
        self.should_exit = True
        self._end.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_server(app: Any) -> _Server:
    config = Config(
        app,
        http=DaemonProtocol,
        ws="websockets-sansio",
        loop="asyncio",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
        ws_max_size=MAX_MESSAGE,
        ws_per_message_deflate=False,
        ws_ping_interval=PING_EVERY,
        ws_ping_timeout=PING_TIMEOUT,
    )
    return _Server(config)


async def _end_when_idle(server: _Server, engine: EngineProtocol, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(min(30.0, max(0.1, seconds / 10)))
        if server.server_state.connections or engine.busy():
            server.server_state.touch()
        elif loop.time() - server.server_state.used >= seconds:
            _log.info("idle", seconds=seconds)
            server.stop()
            return


def _open_real(settings: Settings) -> AbstractAsyncContextManager[EngineProtocol]:
    from stoker.engine.engine import Engine

    return Engine.open(settings, make_pool=True, keys_ahead=True)


def _sockets(settings: Settings, group: int | None, stack: AsyncExitStack) -> list[socket.socket]:
    """systemd's, or our own; TCP besides."""
    sockets = listen.activated_sockets(dict(os.environ), os.getpid())
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    if not sockets:
        unix = listen.bind_unix(settings.socket, group)
        stack.callback(listen.remove_unix, settings.socket, settings.socket.lstat().st_ino)
        sockets = [unix]
        _log.info("listening", address=str(settings.socket))
    if settings.listen:
        tcp = listen.bind_tcp(settings.listen)
        sockets.append(tcp)
        host, port = tcp.getsockname()[:2]
        _log.info("listening", address=f"{host}:{port}")
        if not ipaddress.ip_address(host).is_loopback:
            _log.warning("this address is not loopback: keys and data cross the network in the clear", address=f"{host}:{port}")
    for sock in sockets:
        stack.callback(sock.close)
    return sockets


async def _proxy(settings: Settings, engine: EngineProtocol, secret: bytes, stack: AsyncExitStack) -> str | None:
    """The reverse proxy. The daemon goes without, where its address is another's: everything else works."""
    if not settings.proxy:
        return None
    from stoker.server.proxy.router import Router
    from stoker.server.proxy.service import Proxy

    try:
        sock = listen.bind_tcp(settings.proxy)
    except StokerError as error:
        _log.warning("there is no reverse proxy", why=error.message)
        return None
    stack.callback(sock.close)
    domain = settings.proxy_domain.lower().strip(".")
    trusted = frozenset(word.strip() for word in settings.proxy_trusted.split(",") if word.strip())
    proxy = Proxy(Router(engine.connections, domain, secret), trusted=trusted)
    stack.push_async_callback(proxy.aclose, GRACE)
    await proxy.begin(sock)
    host, port = sock.getsockname()[:2]
    _log.info("proxying", address=f"{host}:{port}", domain=domain)
    return f"{domain}:{port}"


@asynccontextmanager
async def _signals(server: _Server) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def serve(
    settings: Settings,
    *,
    auto: bool = False,
    ready: Callable[[], None] = lambda: None,
    open_engine: OpenEngine = _open_real,
) -> None:
    """Until SIGTERM, SIGINT, or (``auto``) idleness. ``ready`` is called once the first request can be answered."""
    environ = dict(os.environ)
    listen.prepare_run_dir(settings.run_dir)
    async with AsyncExitStack() as stack:
        stack.callback(os.close, listen.take_lock(settings.run_dir / "daemon.lock", settings.socket))
        group = group_id()
        sockets = _sockets(settings, group, stack)
        engine = await stack.enter_async_context(open_engine(settings))
        secret = await asyncio.to_thread(load_secret, settings.data_dir / "url-secret")
        proxy = await _proxy(settings, engine, secret, stack)
        server = make_server(create_app(engine, secret=secret, group=group, auto_started=auto, proxy=proxy))
        server.retire = engine.retire
        await stack.enter_async_context(_signals(server))
        serving = asyncio.create_task(server.serve(sockets))
        await asyncio.wait({serving, asyncio.ensure_future(server.started_event.wait())}, return_when=asyncio.FIRST_COMPLETED)
        idle = asyncio.create_task(_end_when_idle(server, engine, settings.idle_exit)) if auto else None
        gc.collect()
        gc.freeze()
        ready()
        listen.notify(environ, f"READY=1\nMAINPID={os.getpid()}\nSTATUS=serving")
        _log.info("ready", pid=os.getpid(), auto=auto)
        try:
            await serving
        finally:
            listen.notify(environ, "STOPPING=1")
            if idle is not None:
                idle.cancel()
    _log.info("ended")


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(65536, hard) if hard != resource.RLIM_INFINITY else 65536
    if soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run_daemon(
    settings: Settings, *, auto: bool = False, ready_fd: int | None = None, open_engine: OpenEngine = _open_real
) -> None:
    """The whole life of a daemon process. What keeps it from starting is raised, and told on ``ready_fd`` as JSON."""
    os.umask(0o022)
    _raise_file_limit()

    def tell(line: str) -> None:
        nonlocal ready_fd
        if ready_fd is not None:
            fd, ready_fd = ready_fd, None
            with suppress(OSError):
                os.write(fd, line.encode() + b"\n")
            os.close(fd)

    try:
        listen.prepare_run_dir(settings.run_dir)
        configure_log(settings.run_dir / "daemon.log" if auto else None)
        asyncio.run(serve(settings, auto=auto, ready=lambda: tell("ready"), open_engine=open_engine))
    except StokerError as e:
        _log.error("cannot serve", code=e.code, message=e.message)
        tell(json.dumps(error_to_wire(e)))
        raise
    except Exception:
        _log.exception("the daemon failed")
        raise
    finally:
        tell("")
