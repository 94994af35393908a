"""One connection of ssh: who may log in, and what may be opened on it."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import socket
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import asyncssh
import structlog

from stoker.errors import GuestError, InvalidRequest, StokerError
from stoker.server.port_stream import LineAttachment
from stoker.server.ssh.pump import WINDOW, Pump
from stoker.server.ssh.session import Environment, Guest, Session

if TYPE_CHECKING:
    from stoker.server.ports import Attachment

__all__ = ["Connection", "parse_key"]

_log = structlog.get_logger("stoker.ssh")
LOGIN = 20.0
"""Seconds that a client has to log in."""
CHANNELS = 64
"""Sessions and forwarded connections that may be open at a time on one connection."""
LONGEST_USER = 64
KEX = ("curve25519-sha256", "curve25519-sha256@libssh.org", "ecdh-sha2-nistp256")
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com", "aes128-ctr", "aes256-ctr")
# The library tells every command and variable; ours are nobody's business.
logging.getLogger("asyncssh").setLevel(logging.ERROR)


def parse_key(text: str) -> bytes:
    """The bytes of a public key in OpenSSH's form."""
    try:
        key: bytes = asyncssh.import_public_key(text).public_data
    except (asyncssh.KeyImportError, ValueError):
        raise InvalidRequest("bad_ssh_key", "it is not a public key of ssh", "such as: ssh-ed25519 AAAA...") from None
    return key


class _Forward(Pump, asyncssh.SSHTCPSession[bytes]):
    """A connection to a port in the guest (``ssh -L``)."""

    def __init__(self, attachment: Attachment, connection: Connection) -> None:
        super().__init__()
        self._attachment = attachment
        self._connection = connection
        self._task: asyncio.Task[None] | None = None
        connection.forwards.add(self)

    def session_started(self) -> None:
        self._task = self._connection.spawn(self._run())

    async def _run(self) -> None:
        feeding = asyncio.ensure_future(self.feed(self._attachment))
        try:
            await self.drain(self._attachment)
            self.chan.write_eof()
            await feeding  # the other direction may go on
            self.chan.close()
        except (StokerError, BrokenPipeError):
            self.chan.abort()  # it was reset, or the machine or the client is gone
        finally:
            feeding.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.channels -= 1
        if self._task is not None:
            self._task.cancel()
        self._connection.spawn(self.let_go())

    async def let_go(self) -> None:
        self._connection.forwards.discard(self)
        await self._attachment.aclose()


class _Counted(Session):
    """A session that counts against its connection's bound."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection.guest, connection.spawn)
        self._connection = connection

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.channels -= 1
        super().connection_lost(exc)


class Connection(asyncssh.SSHServer):
    """Fits what asyncssh wants of a server. ``key`` is the one that logs in."""

    def __init__(self, guest: Guest, key: bytes) -> None:
        self.guest = guest
        self.channels = 0
        self.forwards: set[_Forward] = set()
        self._closed = False
        self._key = key
        self._conn: asyncssh.SSHServerConnection | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a session failed", exc_info=error)

    async def run(self, sock: socket.socket, host_key: bytes) -> None:
        """Until the client is gone. Never raises for what a client does."""
        try:
            conn = await asyncssh.run_server(
                sock,
                server_factory=lambda: self,
                server_host_keys=[asyncssh.import_private_key(host_key)],
                server_version="Stoker",
                kex_algs=KEX,
                encryption_algs=CIPHERS,
                compression_algs=None,
                login_timeout=LOGIN,
                password_auth=False,
                kbdint_auth=False,
                host_based_auth=False,
                gss_host=None,
                agent_forwarding=False,
                x11_forwarding=False,
                line_editor=False,
                tcp_keepalive=False,
                encoding=None,
                window=WINDOW,
            )
        except (asyncssh.Error, OSError, TimeoutError) as error:
            _log.info("no login", sandbox=self.guest.sandbox, why=str(error))
            return
        _log.info("logged in", sandbox=self.guest.sandbox, user=self.guest.user)
        await conn.wait_closed()

    async def aclose(self) -> None:
        """Ends it, and waits until its sessions have let go."""
        self._closed = True
        if self._conn is not None:
            self._conn.abort()
            await self._conn.wait_closed()
        for forward in list(self.forwards):
            await forward.let_go()  # opened just then: the library does not tell it
        while self._tasks:
            await asyncio.wait(self._tasks)

    # -- logging in -------------------------------------------------------------------------------------------------------

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._conn = conn

    def begin_auth(self, username: str) -> bool:
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        if not 0 < len(username) <= LONGEST_USER or not username.isprintable():
            return False
        return hmac.compare_digest(key.public_data, self._key)

    def auth_completed(self) -> None:
        assert self._conn is not None
        self.guest.log_in(self._conn.get_extra_info("username"))

    # -- channels ---------------------------------------------------------------------------------------------------------

    def _count(self) -> None:
        if self.channels >= CHANNELS:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_RESOURCE_SHORTAGE, f"there are {CHANNELS} channels already")
        self.channels += 1

    def session_requested(self) -> Any:
        assert self._conn is not None
        self._count()
        chan = self._conn.create_server_channel(None, "strict", WINDOW)
        chan._env = Environment()  # the library's own takes whatever comes, without end
        return chan, _Counted(self)

    def connection_requested(self, dest_host: str, dest_port: int, orig_host: str, orig_port: int) -> Any:
        address = _address(dest_host)
        if not 0 < dest_port < 65536:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "that is no port")
        self._count()
        return self._connect(address, dest_port)

    async def _connect(self, address: str | None, port: int) -> _Forward:
        guest = self.guest
        try:
            await guest.check()
            line = await guest.engine.connections.open(guest.who, guest.sandbox, port, address=address)
        except StokerError as error:
            self.channels -= 1
            code = asyncssh.OPEN_CONNECT_FAILED if isinstance(error, GuestError) else asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED
            raise asyncssh.ChannelOpenError(code, error.message) from None
        except BaseException:
            self.channels -= 1
            raise
        forward = _Forward(LineAttachment(line), self)
        if self._closed:
            await forward.let_go()
        return forward


def _address(host: str) -> str | None:
    """None: the guest's loopback. Names are the guest's to resolve, which nobody in it does for us."""
    if host.lower() in ("localhost", "localhost.localdomain", ""):
        return None
    try:
        return str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        raise asyncssh.ChannelOpenError(
            asyncssh.OPEN_CONNECT_FAILED, f"{host[:64]!r} is not resolved here: give localhost or an address of the guest's"
        ) from None
