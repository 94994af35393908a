"""The maps of the agent protocol as msgspec Structs (msgpack), and the translation of the agent's errors.

What the guest sends is checked for type and bounds and may carry keys we do not know; what does not fit is a
``GuestError("protocol_error")``. What we send leaves out every field that has its default, so an older agent sees nothing new.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from stoker.errors import (
    CapacityExhausted,
    CommandNotExecutable,
    CommandNotFound,
    Conflict,
    GuestError,
    InvalidRequest,
    NotFound,
    StokerError,
    TooLarge,
)
from stoker.guest.frames import MAX_PAYLOAD, protocol_error

__all__ = [
    "Configuration",
    "ExecRequest",
    "ExitStatus",
    "GuestInfo",
    "Mount",
    "NetworkConfiguration",
    "Preparation",
    "ProcessInfo",
    "Resolver",
    "RootMount",
    "Welcome",
    "call",
    "decode",
    "encode_map",
    "reply",
    "wire_error",
]

VERSION_MIN = 1
VERSION_MAX = 1
MAX_PROCESS = (1 << 28) - 1
DEFAULT_RING = 1 << 20
MAX_RING = 8 << 20
STDIN_WINDOW = 256 << 10

Text = str | bytes
"""What the system calls text: a path, an argument, a value of the environment."""
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Id = Annotated[int, Meta(ge=1, le=MAX_PROCESS)]
Pid = Annotated[int, Meta(ge=0, le=1 << 22)]
Short = Annotated[str, Meta(max_length=4096)]
HostKeys = Annotated[list[Short], Meta(max_length=32)]
"""Paths of private keys."""


class RootMount(Struct, frozen=True, omit_defaults=True):
    """The root file system the agent mounts; with ``grow`` it is enlarged to its device."""

    device: str
    fstype: str = "ext4"
    flags: Sequence[str] = ()
    options: str = ""
    grow: bool = False


class Mount(Struct, frozen=True, omit_defaults=True):
    """A further disk, found by its serial number, mounted at ``path`` after the root."""

    serial: str
    path: str
    fstype: str = "ext4"
    flags: Sequence[str] = ()
    options: str = ""
    grow: bool = False


class Resolver(Struct, frozen=True, omit_defaults=True):
    """What goes into the guest's resolv.conf."""

    nameservers: Sequence[str] = ()
    search: Sequence[str] = ()


class NetworkConfiguration(Struct, frozen=True, omit_defaults=True):
    """One interface of the guest's. ``address`` (and ``address6``, of IPv6) is in prefix notation."""

    interface: str
    address: str = ""
    gateway: str = ""
    mac: str = ""
    mtu: int = 0
    address6: str = ""
    gateway6: str = ""
    ipv6: bool = True
    """False: it has no address of IPv6 at all."""


class Configuration(Struct, frozen=True, omit_defaults=True, tag_field="m", tag="configure"):
    """What a machine is told once, right after it booted. Without ``root`` it stays in its initramfs."""

    root: RootMount | None = None
    hostname: str = ""
    hosts: Sequence[tuple[str, str]] = ()
    resolv: Resolver | None = None
    network: NetworkConfiguration | None = None
    interfaces: Sequence[NetworkConfiguration] = ()
    """Further ones, after that of ``network``."""
    env: Mapping[str, Text] = {}
    entropy: bytes = b""
    realtime: int = 0
    user: str = ""
    workdir: Text = ""
    modules: Sequence[str] = ()
    tmpfs_tmp: bool = False
    mounts: Sequence[Mount] = ()
    boot_id: str = ""
    """A UUID for a machine out of golden memory; one that booted has its own."""
    machine_id: str = ""
    """32 hexadecimal digits for /etc/machine-id; without them it stays as the image has it."""
    ssh_host_keys: Sequence[tuple[str, int, Text]] = ()
    """(path, mode, content) of each file, where an sshd is installed. Another host key of the image's is removed then."""
    ask_keys: bool = False
    """Where the disk has host keys and none are given, say which, and wait to be told again with others."""
    init: str = ""
    """Who is process 1 from here on: ``agent`` (the same as nothing) or ``image``, the image's own ``/sbin/init``."""


class Preparation(Struct, frozen=True, omit_defaults=True, tag_field="m", tag="prepare"):
    """What may be done before it is known whose machine this will be; see :class:`Configuration` for what comes then."""

    root: RootMount | None = None
    network: NetworkConfiguration | bool = False
    """Set, or only its modules loaded. Should ``configure`` want another one, it is changed."""
    tmpfs_tmp: bool = False


class ExecRequest(Struct, frozen=True, omit_defaults=True, tag_field="m", tag="exec"):
    """A process to start. ``id`` 0 lets the :class:`~stoker.guest.agent.Agent` choose one; without ``stdin`` it reads /dev/null.

    ``rlimits`` are (resource number, soft, hard); ``ring`` is a power of two from 4 KiB to 8 MiB. With
    ``builtin``, ``argv`` names one of the agent's applets and ``args`` has its arguments (docs/files.md).
    """

    argv: Sequence[Text]
    id: int = 0
    env: Mapping[str, Text] = {}
    clear_env: bool = False
    cwd: Text | None = None
    user: str | None = None
    groups: Sequence[int] | None = None
    tty: bool = False
    rows: int = 0
    cols: int = 0
    stdin: bool = False
    mode: Literal["block", "discard"] = "block"
    ring: int = DEFAULT_RING
    tag: str = ""
    rlimits: Sequence[tuple[int, int, int]] = ()
    umask: int | None = None
    attach: bool = True
    builtin: bool = False
    args: Mapping[str, Any] | None = None


class ExitStatus(Struct, frozen=True):
    """How a process ended, and what it used. ``out`` and ``err`` are the final offsets of its output streams."""

    code: Annotated[int, Meta(ge=0, le=255)] | None = None
    signal: Annotated[int, Meta(ge=1, le=127)] | None = None
    core: bool = False
    out: Count = 0
    err: Count = 0
    user_us: Count = 0
    sys_us: Count = 0
    max_rss_kb: Count = 0
    duration_us: Count = 0

    @property
    def shell_code(self) -> int:
        """The number a shell would give: the code, or 128 and the signal."""
        if self.signal is not None:
            return 128 + self.signal
        return self.code if self.code is not None else 255


class ProcessInfo(Struct, frozen=True):
    """A process of the guest, as ``attach``, ``processes`` and ``WELCOME`` describe it (the latter two leave offsets out)."""

    id: Id
    pid: Pid = 0
    tag: Short = ""
    running: bool = False
    pty: bool = False
    stdin: Count = 0
    out: Count = 0
    err: Count = 0
    out_oldest: Count = 0
    err_oldest: Count = 0
    exit: ExitStatus | None = None


class Hello(Struct, frozen=True):
    min: int
    max: int
    host: str


class Welcome(Struct, frozen=True):
    """The agent's first words."""

    version: Annotated[int, Meta(ge=0, le=1 << 16)]
    agent: Short = ""
    state: Literal["initramfs", "prepared", "ready"] = "ready"
    kernel: Short = ""
    boot_id: Short = ""
    pid: Pid = 0
    started_us: Count = 0
    ready_us: Count = 0
    generation: Count = 0
    processes: Annotated[list[ProcessInfo], Meta(max_length=256)] = []
    more: bool = False


class Configured(Struct, frozen=True):
    """``steps`` are microseconds by name."""

    pid1: bool = False
    steps: Annotated[dict[Short, Count], Meta(max_length=64)] = {}
    ssh_host_keys: HostKeys | None = None
    """It is not done, but wants to be told again with others in place of these."""


class Started(Struct, frozen=True):
    pid: Pid
    started: Count = 0


class Processes(Struct, frozen=True):
    """One page of the answer to ``processes``, by ascending id."""

    processes: Annotated[list[ProcessInfo], Meta(max_length=1024)] = []
    more: bool = False


class Nothing(Struct, frozen=True):
    """An empty answer."""


class Clock(Struct, frozen=True):
    """The guest's CLOCK_REALTIME in nanoseconds, before it was set."""

    realtime: Count = 0


class Grown(Struct, frozen=True):
    """What a file system was grown to: its device's bytes."""

    device: Count


class Memory(Struct, frozen=True):
    """Bytes."""

    total: Count = 0
    free: Count = 0
    available: Count = 0
    buffers: Count = 0
    cached: Count = 0
    swap_total: Count = 0
    swap_free: Count = 0


class CpuCounters(Struct, frozen=True):
    """Ticks of 10 ms since the boot, all CPUs together."""

    user: Count = 0
    nice: Count = 0
    system: Count = 0
    idle: Count = 0
    iowait: Count = 0
    irq: Count = 0
    softirq: Count = 0
    steal: Count = 0
    cpus: Count = 0

    @property
    def busy(self) -> int:
        """Ticks in which something ran."""
        return self.user + self.nice + self.system + self.irq + self.softirq


class DiskCounters(Struct, frozen=True):
    name: Short
    reads: Count = 0
    read_bytes: Count = 0
    read_ms: Count = 0
    writes: Count = 0
    written_bytes: Count = 0
    write_ms: Count = 0


class NetworkCounters(Struct, frozen=True):
    name: Short
    rx_bytes: Count = 0
    rx_packets: Count = 0
    rx_errors: Count = 0
    rx_drops: Count = 0
    tx_bytes: Count = 0
    tx_packets: Count = 0
    tx_errors: Count = 0
    tx_drops: Count = 0


class AgentCounters(Struct, frozen=True):
    """The agent itself: resident bytes, processes that run, and all it remembers."""

    resident: Count = 0
    running: Count = 0
    remembered: Count = 0


class GuestInfo(Struct, frozen=True):
    """Counters for metrics. ``load`` is in hundredths: the protocol has no fractions."""

    uptime_ms: Count = 0
    load: Annotated[list[Count], Meta(max_length=3)] = []
    cpu: CpuCounters = CpuCounters()
    memory: Memory = Memory()
    disks: Annotated[list[DiskCounters], Meta(max_length=256)] = []
    networks: Annotated[list[NetworkCounters], Meta(max_length=256)] = []
    agent: AgentCounters = AgentCounters()

    @property
    def uptime(self) -> float:
        """Seconds since the boot."""
        return self.uptime_ms / 1000


class Event(Struct, frozen=True):
    """Any event: the keys of all kinds, as ``e`` says which of them count."""

    e: Annotated[str, Meta(max_length=64)]
    level: Annotated[str, Meta(max_length=64)] = ""
    text: str = ""


class WireError(Struct, frozen=True):
    code: Annotated[str, Meta(max_length=64)] = "io"
    message: str = ""
    errno: int = 0


class _Head(Struct, frozen=True):
    error: WireError | None = None


S = TypeVar("S", bound=Struct)

_encoder = msgspec.msgpack.Encoder()
_head = msgspec.msgpack.Decoder(_Head)
_decoders: dict[type[Struct], msgspec.msgpack.Decoder[Any]] = {}

_FAMILIES: dict[str, type[StokerError]] = {
    "bad_request": InvalidRequest,
    "not_found": NotFound,
    "exists": Conflict,
    "no_such_command": CommandNotFound,
    "not_executable": CommandNotExecutable,
    "no_such_directory": InvalidRequest,
    "no_such_user": InvalidRequest,
    "no_such_group": InvalidRequest,
    "too_many": CapacityExhausted,
    "already_configured": Conflict,
    "no_init": InvalidRequest,
}


def printable(text: str, limit: int = 500) -> str:
    """Text from the guest that may go to a terminal or a log line: bounded, without control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:limit])


def wire_error(error: WireError, what: str) -> StokerError:
    """The exception for an error reply; ``what`` names the call, or the command, for an error without a message."""
    message = printable(error.message) or f"the guest refused {what}: {printable(error.code, 64)}"
    details = {"errno": error.errno} if error.errno else None
    code = error.code if error.code.replace("_", "").isalnum() and error.code.isascii() else "io"
    return _FAMILIES.get(code, GuestError)(code, message, details=details)


def decode(kind: type[S], payload: bytes) -> S:
    """A map of the guest's, checked."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        return decoder.decode(payload)  # type: ignore[no-any-return]
    except (msgspec.DecodeError, ValueError, RecursionError) as e:
        raise protocol_error(f"{kind.__name__.lower()}: {printable(str(e), 200)}") from None


def reply(kind: type[S], payload: bytes, what: str) -> S:
    """The result in a REPLY; raises the error it carries instead."""
    try:
        error = _head.decode(payload).error
    except (msgspec.DecodeError, ValueError, RecursionError) as e:
        raise protocol_error(f"reply to {what}: {printable(str(e), 200)}") from None
    if error is not None:
        raise wire_error(error, what)
    return decode(kind, payload)


def _native(value: Any) -> Any:
    """``value`` with every string that is not Unicode (surrogates from the file system's encoding) as the bytes it stands for."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return os.fsencode(value)
        return value
    if isinstance(value, dict):
        return {key: _native(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_native(item) for item in value]
    return value


def encode_map(value: Any) -> bytes:
    """``value`` (a Struct or a dict) as msgpack of at most one payload."""
    try:
        data = _encoder.encode(value)
    except UnicodeEncodeError:
        try:
            data = _encoder.encode(_native(msgspec.to_builtins(value, builtin_types=(bytes,))))
        except UnicodeEncodeError:
            raise InvalidRequest("bad_name", "the name of an environment variable is not text") from None
    except OverflowError as e:
        raise InvalidRequest("bad_request", f"a number is out of range: {e}") from None
    if len(data) > MAX_PAYLOAD:
        raise TooLarge(
            "request_too_large",
            f"a command with its arguments and environment takes {len(data):,} bytes; {MAX_PAYLOAD:,} are the most",
            "pass large data through standard input or a file",
        )
    return data


def call(method: str, **arguments: Any) -> bytes:
    """The payload of a CALL whose arguments are plain values (``exec`` and ``configure`` are Structs that know their method)."""
    return encode_map({"m": method, **arguments})
