"""Processes on the wire: run and wait, start, list, signal, terminal size."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, field

from stoker.api.types import (
    END,
    KIB,
    MIB,
    Argv,
    Environment,
    FilePath,
    GuestUser,
    Model,
    ProcessId,
    Signal,
    Tag,
    Terminal,
    UnixTime,
)

__all__ = [
    "ExecRequest",
    "ExecResult",
    "OutputMode",
    "ProcessInfo",
    "ProcessList",
    "ResizeRequest",
    "SignalRequest",
    "StartProcess",
    "WriteStdin",
]

RlimitValue = Annotated[int, Meta(ge=-1, le=(1 << 63) - 1)]
MAX_INLINE = 16 * MIB
"""Most bytes of standard input or of one output that a JSON message carries."""


class OutputMode(StrEnum):
    """What happens when nobody reads: ``discard`` keeps the last bytes of the ring, ``block`` makes the process wait."""

    DISCARD = "discard"
    BLOCK = "block"


class _Command(Model, frozen=True):
    argv: Argv
    env: Environment = field(default_factory=dict)
    """On top of the sandbox's."""
    clear_env: bool = False
    cwd: FilePath | None = None
    user: GuestUser | None = None
    tag: Tag | None = None
    umask: Annotated[int, Meta(ge=0, le=0o777)] | None = None
    rlimits: Annotated[
        dict[Annotated[str, Meta(pattern=r"^[A-Z]{2,12}" + END)], tuple[RlimitValue, RlimitValue]], Meta(max_length=16)
    ] = field(default_factory=dict)
    """``{"NOFILE": [soft, hard]}``; -1 is unlimited."""


class ExecRequest(_Command, frozen=True):
    """Run and wait. After ``timeout`` seconds the process group is killed and ``timed_out`` set."""

    stdin: Annotated[str, Meta(max_length=MAX_INLINE * 4 // 3 + 4)] | None = None
    stdin_base64: bool = False
    timeout: Annotated[float, Meta(gt=0.0, le=86400.0)] | None = None
    max_output: Annotated[int, Meta(ge=0, le=MAX_INLINE)] = MIB
    """Bytes of stdout, and of stderr, that the answer holds: the first so many. The process is never blocked by more."""


class ExecResult(Model, frozen=True):
    """How it ended: ``exit_code`` or ``signal``, one of them null. Output that is not UTF-8 is base64, and says so."""

    id: ProcessId
    exit_code: int | None = None
    signal: int | None = None
    stdout: str = ""
    stderr: str = ""
    stdout_base64: bool = False
    stderr_base64: bool = False
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    timed_out: bool = False
    duration_ms: float = 0.0


class StartProcess(_Command, frozen=True):
    """Start in the background. It ends with its sandbox only, whoever looks on."""

    stdin: bool = False
    """Whether stdin stays open for writers; otherwise it is ``/dev/null``."""
    terminal: Terminal | None = None
    """A pseudo terminal of this size: stdin, stdout and stderr in one."""
    mode: OutputMode = OutputMode.DISCARD
    ring: Annotated[int, Meta(ge=4 * KIB, le=8 * MIB)] = MIB
    """Bytes of output kept in the guest for those who attach later; rounded up to a power of two."""
    timeout: Annotated[float, Meta(gt=0.0, le=366 * 86400.0)] | None = None


class ProcessInfo(Model, frozen=True):
    """A process that runs, or ended and is still remembered. Offsets count all bytes ever written."""

    id: ProcessId
    pid: int
    running: bool
    argv: list[str] = field(default_factory=list)
    tag: str | None = None
    cwd: str | None = None
    user: str | None = None
    terminal: bool = False
    stdin: bool = False
    started_at: UnixTime | None = None
    ended_at: UnixTime | None = None
    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdout_oldest: int = 0
    stderr_oldest: int = 0
    cpu_seconds: float | None = None
    max_rss: int | None = None
    duration_ms: float | None = None


class ProcessList(Model, frozen=True):
    """All of one sandbox."""

    items: list[ProcessInfo]


class SignalRequest(Model, frozen=True):
    """``SIGTERM``, ``TERM`` or 15; ``group``: the whole process group."""

    signal: Signal = "SIGTERM"
    group: bool = True


class ResizeRequest(Terminal, frozen=True):
    """The terminal's new size."""


class WriteStdin(Model, frozen=True):
    """Bytes for a process's stdin, and whether it is closed after them."""

    data: Annotated[str, Meta(max_length=MAX_INLINE * 4 // 3 + 4)] = ""
    base64: bool = False
    close: bool = False
