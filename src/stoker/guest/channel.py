"""The connection to a guest's agent: one Unix socket, one reader, no tasks.

:class:`Channel` reads the socket straight into the parser's buffer and hands on the frames of each read; it writes at once what the
socket takes and queues the rest. It knows nothing of processes or calls. :func:`connect` opens one and synchronises it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from stoker.errors import GuestError
from stoker.guest.agent import Agent
from stoker.guest.frames import ACK, HELLO, ZEROS, Frame, FrameParser, encode, encode_parts, preamble
from stoker.guest.messages import VERSION_MAX, VERSION_MIN, Hello, encode_map

__all__ = ["Channel", "connect"]

log = logging.getLogger(__name__)
HIGH_WATER: Final = 256 << 10
VECTORS: Final = 64
JOIN: Final = 8192
SUN_PATH: Final = 107


def unreachable(path: Path, why: str) -> GuestError:
    return GuestError(
        "agent_unreachable", f"the guest's agent does not answer on {path}: {why}", "look at the machine's console log"
    )


class Channel:
    """One connected socket. ``on_frames`` gets what was read, ``on_lost`` the reason, once, when it is over."""

    def __init__(self, sock: socket.socket, parser: FrameParser) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._parser = parser
        self._backlog: deque[bytes | memoryview] = deque()
        self._backlog_size = 0
        self._corked = 0
        self._writing = False
        self._drained: deque[asyncio.Future[None]] = deque()
        self._on_frames: Callable[[list[Frame]], None] | None = None
        self._on_lost: Callable[[GuestError], None] | None = None
        self.closed = False

    def start(self, on_frames: Callable[[list[Frame]], None], on_lost: Callable[[GuestError], None]) -> None:
        """Begins to read."""
        self._on_frames, self._on_lost = on_frames, on_lost
        self._loop.add_reader(self._sock, self._readable)

    def _readable(self) -> None:
        try:
            count = self._sock.recv_into(self._parser.writable())
            if count == 0:
                self.close(GuestError("agent_lost", "the connection to the guest's agent was closed"))
                return
            frames = self._parser.advance(count)
            if frames and self._on_frames is not None:
                self._on_frames(frames)
            if self._parser.failure is not None:
                self.close(self._parser.failure)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as e:
            self.close(GuestError("agent_lost", f"the connection to the guest's agent broke: {e.strerror}"))
        except GuestError as e:
            self.close(e)
        except Exception:
            log.exception("what the guest's agent sent could not be handled")
            self.close(GuestError("agent_lost", "what the guest's agent sent could not be handled"))

    def send(self, type: int, channel: int, offset: int = 0, payload: bytes | memoryview = b"") -> None:
        """Sends one frame, or queues it. ``payload`` is not copied and must not change."""
        if self.closed:
            return
        header, trailer = encode_parts(type, channel, offset, len(payload))
        if len(payload) <= JOIN:
            self.send_bytes(b"".join((header, payload, trailer)))
        else:
            self._queue(header, payload, trailer)
            self._flush_unless_corked()

    def send_ack(self, channel: int, offset: int) -> None:
        self.send_bytes(encode(ACK, channel, offset))

    def send_bytes(self, data: bytes) -> None:
        """Sends bytes that are whole frames already."""
        if self.closed:
            return
        if not self._backlog and not self._corked:
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as e:
                self._broken(e)
                return
            if sent == len(data):
                return
            data = data[sent:]
        self._queue(data)
        self._flush_unless_corked()

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """What is sent inside leaves in one write."""
        self._corked += 1
        try:
            yield
        finally:
            self._corked -= 1
            self._flush_unless_corked()

    async def drain(self) -> None:
        """Waits until little is queued. Returns, too, when the connection is over."""
        while self._backlog_size > HIGH_WATER and not self.closed:
            future = self._loop.create_future()
            self._drained.append(future)
            try:
                await future
            finally:
                if future in self._drained:
                    self._drained.remove(future)

    def _queue(self, *parts: bytes | memoryview) -> None:
        self._backlog.extend(parts)
        for part in parts:
            self._backlog_size += len(part)

    def _flush_unless_corked(self) -> None:
        if not self._corked and not self._writing and self._backlog:
            self._flush()

    def _flush(self) -> None:
        backlog = self._backlog
        try:
            while backlog:
                sent = self._sock.sendmsg(list(islice(backlog, VECTORS)))
                self._backlog_size -= sent
                while sent and sent >= len(backlog[0]):
                    sent -= len(backlog.popleft())
                if sent:
                    backlog[0] = memoryview(backlog[0])[sent:]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as e:
            self._broken(e)
            return
        if bool(backlog) != self._writing:
            self._writing = bool(backlog)
            if self._writing:
                self._loop.add_writer(self._sock, self._flush)
            else:
                self._loop.remove_writer(self._sock)
        if self._backlog_size <= HIGH_WATER:
            self._release()

    def _release(self) -> None:
        while self._drained:
            future = self._drained.popleft()
            if not future.done():
                future.set_result(None)

    def _broken(self, error: OSError) -> None:
        # Not from inside a send: whoever called it is in the middle of its own state.
        reason = GuestError("agent_lost", f"the connection to the guest's agent broke: {error.strerror}")
        self._loop.call_soon(self.close, reason)

    def close(self, reason: GuestError) -> None:
        """Ends the connection. Again is no error: the first reason counts."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._backlog.clear()
        self._backlog_size = 0
        self._release()
        if self._on_lost is not None:
            self._on_lost(reason)


async def _open(path: Path) -> socket.socket:
    """A connected, non-blocking socket. A full backlog is waited for; a path too long for an address goes by its directory."""
    address, directory = str(path), -1
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if len(os.fsencode(address)) > SUN_PATH:
            directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            address = f"/proc/self/fd/{directory}/{path.name}"
        while True:
            try:
                sock.connect(address)
            except OSError as e:
                if e.errno not in (errno.EAGAIN, errno.EINTR):
                    raise
                await asyncio.sleep(0.01)
            else:
                return sock
    except BaseException:
        sock.close()
        raise
    finally:
        if directory >= 0:
            os.close(directory)


async def connect(path: Path, *, fresh: bool, timeout: float) -> Agent:
    """Opens the machine's channel and synchronises with its agent.

    ``fresh`` says that nobody has ever spoken to this machine. Raises ``GuestError``: ``agent_unreachable`` when nobody answers in
    ``timeout`` seconds or the connection closes, ``agent_too_old``, ``protocol_error``.
    """
    path = Path(path)
    ours = preamble()
    try:
        async with asyncio.timeout(timeout):
            try:
                sock = await _open(path)
            except OSError as e:
                raise unreachable(path, e.strerror or str(e)) from None
            channel = Channel(sock, FrameParser(expect=ours))
            agent = Agent(channel)
            try:
                channel.start(agent.on_frames, agent.on_lost)
                hello = encode(HELLO, 0, 0, encode_map(Hello(VERSION_MIN, VERSION_MAX, "stoker")))
                channel.send_bytes((b"" if fresh else bytes(ZEROS)) + ours + hello)
                await agent.greeted()
            except BaseException:
                await agent.aclose()
                raise
            return agent
    except TimeoutError:
        raise unreachable(path, f"no answer within {timeout:g} s") from None
    except GuestError as e:
        if e.code != "agent_lost":
            raise
        raise unreachable(path, e.message) from None
