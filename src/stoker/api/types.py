"""The bounded types every model is made of: what a name, a label, a path or a size may be on the wire.

Every string, list and map that a client sends has an upper bound here, so that no request makes the daemon hold more than a
known amount. The patterns are anchored, and use nothing beyond what both Python's ``re`` and JSON Schema understand.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

__all__ = [
    "Argv",
    "Cpus",
    "DiskSize",
    "EgressPolicy",
    "Environment",
    "FileMode",
    "FilePath",
    "GuestUser",
    "Hostname",
    "IdempotencyKey",
    "ImageReference",
    "KernelReference",
    "Labels",
    "MemorySize",
    "Model",
    "Name",
    "InitMode",
    "NetworkMode",
    "OperationId",
    "ProcessId",
    "InterfaceName",
    "PublishedPort",
    "RangeName",
    "Rate",
    "ConnectionCount",
    "GatewayAddress",
    "InterfaceAddress",
    "RunId",
    "SandboxId",
    "SandboxState",
    "Seconds",
    "Signal",
    "Tag",
    "Terminal",
    "UnixTime",
]

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

# A NUL ends a C string early, in the guest as on the host: no string that becomes one may hold it.
_NO_NUL = r"^[^\x00]*$"
END = r"$(?!\n)"
"""The end of an anchored pattern: Python's ``$`` alone also matches before a final newline (JSON Schema's does not)."""


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """The base of everything on the wire. Unknown fields are refused: a misspelt option must not be ignored.

    A client reads answers leniently (:func:`stoker.api.codec.decode_answer`), so that a newer daemon may add fields.
    """


SandboxId: TypeAlias = Annotated[
    str, Meta(pattern=r"^sb-[a-z2-7]{20}" + END, description="A sandbox: `sb-` and 20 base32 characters.")
]
OperationId: TypeAlias = Annotated[
    str, Meta(pattern=r"^op-[a-z2-7]{20}" + END, description="An operation: `op-` and 20 base32 characters.")
]
KeyId: TypeAlias = Annotated[str, Meta(pattern=r"^key-[a-z2-7]{12}" + END, description="An API key's public name.")]
Name: TypeAlias = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}" + END, max_length=64, description="Unique among the owner's sandboxes.")
]
Hostname: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?" + END, max_length=63)]
LabelKey: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?" + END, max_length=63)]
LabelValue: TypeAlias = Annotated[str, Meta(max_length=256, pattern=_NO_NUL)]
Labels: TypeAlias = Annotated[dict[LabelKey, LabelValue], Meta(max_length=64, description="For finding sandboxes again.")]

EnvName: TypeAlias = Annotated[str, Meta(pattern=r"^[^=\x00]+" + END, min_length=1, max_length=256)]
EnvValue: TypeAlias = Annotated[str, Meta(max_length=128 * KIB, pattern=_NO_NUL)]
Environment: TypeAlias = Annotated[dict[EnvName, EnvValue], Meta(max_length=1024)]
Argument: TypeAlias = Annotated[str, Meta(max_length=128 * KIB - 1, pattern=_NO_NUL)]
Argv: TypeAlias = Annotated[
    list[Argument], Meta(min_length=1, max_length=4096, description="The program and its arguments; no shell is involved.")
]
FilePath: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=4096,
        pattern=r"^[^\x00]+" + END,
        description="Absolute, `~`, `~user`, or relative to the default directory.",
    ),
]
GuestUser: TypeAlias = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\$?(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\$?)?" + END,
        max_length=66,
        description="`name`, `uid`, `name:group` or `uid:gid` in the guest.",
    ),
]
Tag: TypeAlias = Annotated[
    str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9._-]{0,63}" + END, max_length=64, description="A name for a process.")
]
ImageReference: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1, max_length=1024, pattern=r"^[^\x00-\x20]+" + END, description="`[TRANSPORT:]REFERENCE`, such as `debian:12`."
    ),
]
KernelReference: TypeAlias = Annotated[
    str,
    Meta(
        max_length=4096, pattern=_NO_NUL, description="`debian:12`, a digest, or a path on the daemon's host; empty: the default."
    ),
]
EgressPolicy: TypeAlias = Annotated[
    str, Meta(max_length=16384, pattern=_NO_NUL, description="`all`, `none`, or rules: `allow: 10.1.0.0/16, *.example.org:443`.")
]
RunId: TypeAlias = Annotated[
    str, Meta(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*" + END, description="What the machines of one test run share.")
]
RangeName: TypeAlias = Annotated[str, Meta(max_length=32, pattern=r"^[A-Za-z0-9][a-z0-9-]*" + END)]
InterfaceName: TypeAlias = Annotated[str, Meta(max_length=15, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*" + END)]
Rate: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 40, description="Bytes a second; 0: no limit.")]
ConnectionCount: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 20, description="0: no limit.")]
InterfaceAddress: TypeAlias = Annotated[str, Meta(max_length=18, pattern=r"^[0-9.]+/[0-9]{1,2}" + END)]
GatewayAddress: TypeAlias = Annotated[str, Meta(max_length=15, pattern=r"^[0-9.]+" + END)]
PublishedPort: TypeAlias = Annotated[
    str, Meta(max_length=64, pattern=r"^[0-9.:]+(/tcp|/udp)?" + END, description="`[IP:]HOST:GUEST[/udp]`, such as `8080:80`.")
]
HostPath: TypeAlias = Annotated[
    str, Meta(max_length=4096, pattern=_NO_NUL, description="A path on the daemon's host (Unix socket only).")
]
IdempotencyKey: TypeAlias = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[!-~]+" + END)]

Cpus: TypeAlias = Annotated[int, Meta(ge=1, le=256)]
MemorySize: TypeAlias = Annotated[int, Meta(ge=16 * MIB, le=16 * TIB, description="Bytes; rounded up to whole MiB.")]
DiskSize: TypeAlias = Annotated[int, Meta(ge=0, le=64 * TIB, description="Bytes; 0: the image's own size and some room.")]
ByteCount: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 62)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0.0, le=366 * 86400.0, description="Seconds.")]
UnixTime: TypeAlias = Annotated[float, Meta(description="Seconds since 1970-01-01 00:00 UTC.")]
ProcessId: TypeAlias = Annotated[
    int, Meta(ge=1, le=(1 << 28) - 1, description="Unique in its sandbox, never used again; not the guest's PID.")
]
FileMode: TypeAlias = Annotated[int, Meta(ge=0, le=0o7777, description="Permission bits as a number (420 is 0644).")]
SignalNumber: TypeAlias = Annotated[int, Meta(ge=1, le=64)]
SignalName: TypeAlias = Annotated[str, Meta(pattern=r"^(SIG)?[A-Z][A-Z0-9+-]{1,11}" + END, max_length=15)]
Signal: TypeAlias = SignalNumber | SignalName
TerminalSize: TypeAlias = Annotated[int, Meta(ge=1, le=4096)]


class SandboxState(StrEnum):
    """Where a sandbox is in its life. ``stopped`` keeps the disk, ``paused`` memory as well; ``lost`` means its host is gone."""

    CREATING = "creating"
    RUNNING = "running"
    FROZEN = "frozen"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESUMING = "resuming"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    LOST = "lost"


class InitMode(StrEnum):
    """Process 1 of the guest: ``agent``: ours, ready at once; ``image``: the image's own ``/sbin/init``, the agent beside it."""

    AGENT = "agent"
    IMAGE = "image"


class Origin(StrEnum):
    """What a machine began as: ``boot``: its own kernel's start; ``golden``: memory of a machine that was told nothing yet;
    ``fork``: the memory of a running one; ``snapshot``: the memory of one that was kept; ``template``: that of a template;
    ``warm``: it was up, and waited."""

    BOOT = "boot"
    GOLDEN = "golden"
    FORK = "fork"
    SNAPSHOT = "snapshot"
    TEMPLATE = "template"
    WARM = "warm"


class NetworkMode(StrEnum):
    """``user``: outgoing connections, no private networks; ``nat``: an interface on the host, isolated by its firewall, with a
    policy and published ports of its own; ``bridge``: an interface that is a port of a bridge of the operator's; ``none``: no
    interface but ``lo``."""

    NONE = "none"
    USER = "user"
    NAT = "nat"
    BRIDGE = "bridge"


class Terminal(Model, frozen=True):
    """The size of a terminal in characters."""

    rows: TerminalSize = 24
    cols: TerminalSize = 80
