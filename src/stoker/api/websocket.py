"""What goes over the API's WebSockets. Control messages are JSON text, streams are binary frames.

A binary frame is one byte that names the stream, eight bytes (big-endian) of offset, and the bytes themselves::

    0 stdin   client to daemon; the offset is not looked at
    1 stdout  daemon to client; the offset of the first byte in all that the process ever wrote
    2 stderr

The first text message may be :class:`Auth` (browsers cannot set headers), within 5 s; then comes :class:`Attach`, and the
daemon answers with :class:`Attached`. From there on:

* **Output** flows while fewer than ``window`` bytes (both streams together, frames' headers not counted) are unacknowledged.
  The client sends :class:`Ack` with the number of bytes it has consumed since its last one. A gap in the offsets is output
  that was overwritten in the ring before it could be sent.
* **Input** flows while fewer than :attr:`Attached.stdin_window` bytes are unacknowledged; the daemon acknowledges with
  :class:`Ack` what the guest took.
* :class:`Exit` is the daemon's last message; then it closes with 1000. A failure is :class:`Failure` and close code 4000 + HTTP
  status (4404: no such process). Closing a WebSocket leaves the process as it is.

A client that starts the process it attaches to sends :class:`Start` in the place of :class:`Attach`, one that wants to speak ssh
:class:`Ssh`.

The lease's WebSocket uses :class:`Auth` the same way; the daemon says :class:`Leased`, and then nothing more until it closes.
"""

from __future__ import annotations

import struct
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from stoker.api.errors import ErrorBody
from stoker.api.processes import ProcessInfo, StartProcess
from stoker.api.types import KIB, MIB, ByteCount, Signal, TerminalSize

__all__ = [
    "AUTH_TIMEOUT",
    "CLOSE_BASE",
    "HEADER",
    "LEASE_SECONDS",
    "MAX_PAYLOAD",
    "STDERR",
    "STDIN",
    "STDIN_WINDOW",
    "STDOUT",
    "Ack",
    "Attach",
    "Attached",
    "Auth",
    "ClientMessage",
    "CloseStdin",
    "DaemonMessage",
    "Exit",
    "Failure",
    "Leased",
    "Resize",
    "SendSignal",
    "Ssh",
    "Start",
    "StdinClosed",
    "decode_client",
    "decode_daemon",
    "decode_data",
    "encode_data",
    "encode_message",
]

STDIN, STDOUT, STDERR = 0, 1, 2
HEADER = struct.Struct(">BQ")
MAX_PAYLOAD = 256 * KIB
"""Most bytes in one binary frame, header not counted."""
STDIN_WINDOW = 512 * KIB
AUTH_TIMEOUT = 5.0
CLOSE_BASE = 4000
LEASE_SECONDS = 10.0
"""A sandbox created with ``lease`` waits so long for somebody to hold it."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    pass


class Auth(_Message, frozen=True, tag="auth"):
    """``key`` is an API key. Not needed over the Unix socket, or with the key in a header."""

    key: Annotated[str, Meta(min_length=1, max_length=256)]


class Attach(_Message, frozen=True, tag="attach"):
    """``stdout`` and ``stderr`` are the offsets to begin at; null is the oldest byte held."""

    stdout: Annotated[int, Meta(ge=0, le=1 << 62)] | None = None
    stderr: Annotated[int, Meta(ge=0, le=1 << 62)] | None = None
    window: Annotated[int, Meta(ge=64 * KIB, le=16 * MIB)] = MIB
    lossless: bool = True
    """The process waits for this client rather than lose a byte of output; without, the oldest bytes go."""


class Start(_Message, frozen=True, tag="start"):
    """Start this process and attach to all of its output."""

    process: StartProcess
    window: Annotated[int, Meta(ge=64 * KIB, le=16 * MIB)] = MIB
    lossless: bool = True
    """The process waits for this client rather than lose a byte of output; without, the oldest bytes go."""


class Ssh(_Message, frozen=True, tag="ssh"):
    """Speak ssh over this connection's streams: stdin is what the client sends, stdout what the server does.

    ``key`` is the public key (as in an authorized_keys file) that may log in on it, and no other.
    """

    key: Annotated[str, Meta(min_length=1, max_length=4096)]
    window: Annotated[int, Meta(ge=64 * KIB, le=16 * MIB)] = MIB


class Ack(_Message, frozen=True, tag="ack"):
    """So many bytes more have been consumed."""

    bytes: ByteCount


class CloseStdin(_Message, frozen=True, tag="eof"):
    """End of input."""


class Resize(_Message, frozen=True, tag="resize"):
    rows: TerminalSize
    cols: TerminalSize


class SendSignal(_Message, frozen=True, tag="signal"):
    signal: Signal
    group: bool = True


class Attached(_Message, frozen=True, tag="attached"):
    """The process as it was then. The first frame's offset says where each output really begins."""

    process: ProcessInfo
    stdin_window: int = STDIN_WINDOW


class StdinClosed(_Message, frozen=True, tag="stdin_closed"):
    """Nobody reads the process's stdin any more; what is sent is dropped."""


class Exit(_Message, frozen=True, tag="exit"):
    """All output has been sent, and the process has ended."""

    process: ProcessInfo


class Failure(_Message, frozen=True, tag="error"):
    """What went wrong. The connection closes after it, unless it answers a message that can be repeated (``fatal`` false)."""

    error: ErrorBody
    fatal: bool = True


class Leased(_Message, frozen=True, tag="leased"):
    """The lease is held: the sandbox ends within a second after this connection."""

    sandbox: str


ClientMessage = Auth | Attach | Start | Ssh | Ack | CloseStdin | Resize | SendSignal
DaemonMessage = Attached | Ack | StdinClosed | Exit | Failure | Leased

_encoder = msgspec.json.Encoder()
_client = msgspec.json.Decoder(ClientMessage)
_daemon = msgspec.json.Decoder(DaemonMessage)


def encode_message(message: Any) -> str:
    return _encoder.encode(message).decode()


def decode_client(text: str | bytes) -> ClientMessage:
    """Raises :class:`msgspec.DecodeError` (``ValidationError`` is one) for anything else."""
    message: ClientMessage = _client.decode(text)
    return message


def decode_daemon(text: str | bytes) -> DaemonMessage:
    message: DaemonMessage = _daemon.decode(text)
    return message


def encode_data(stream: int, offset: int, data: bytes | memoryview) -> bytes:
    return b"".join((HEADER.pack(stream, offset), data))


def decode_data(frame: bytes) -> tuple[int, int, memoryview]:
    """Stream, offset, bytes. Raises ValueError for a frame without a whole header, or of an unknown stream."""
    if len(frame) < HEADER.size:
        raise ValueError("a binary frame is shorter than its header")
    stream, offset = HEADER.unpack_from(frame)
    if stream > STDERR:
        raise ValueError(f"there is no stream {stream}")
    return stream, offset, memoryview(frame)[HEADER.size :]
