"""Sandboxes on the wire: what is asked for, what is answered, events and metrics of one."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from msgspec import Meta, field

from stoker.api.errors import ErrorBody
from stoker.api.network import Interface
from stoker.api.types import (
    END,
    ConnectionCount,
    Cpus,
    DiskSize,
    EgressPolicy,
    Environment,
    GatewayAddress,
    GuestUser,
    Hostname,
    HostPath,
    ImageReference,
    InitMode,
    InterfaceAddress,
    InterfaceName,
    KernelReference,
    Labels,
    MemorySize,
    Model,
    Name,
    NetworkMode,
    OperationId,
    Origin,
    ProcessId,
    PublishedPort,
    RangeName,
    Rate,
    RunId,
    SandboxId,
    SandboxState,
    Seconds,
    UnixTime,
)
from stoker.api.volumes import Digest, VolumeMount

__all__ = [
    "Certificate",
    "ConsoleLog",
    "CopySandbox",
    "CreateSandbox",
    "Event",
    "EventPage",
    "ForkResult",
    "ForkSandbox",
    "Forked",
    "Hazard",
    "Metrics",
    "MetricsSample",
    "PingResult",
    "ResizeSandbox",
    "Resources",
    "Sandbox",
    "SandboxPage",
    "SetNetwork",
    "SetTimeout",
    "StopSandbox",
    "Timeout",
    "TimeoutAction",
    "TimeoutMode",
    "Versions",
]


class TimeoutMode(StrEnum):
    """``idle`` counts from the last use (a call or an attached client), ``absolute`` from when it was set."""

    IDLE = "idle"
    ABSOLUTE = "absolute"


class TimeoutAction(StrEnum):
    """What happens when it passes."""

    DESTROY = "destroy"
    PAUSE = "pause"


class Timeout(Model, frozen=True):
    """When a sandbox ends, or is paused, by itself. At least a second, at most a year.

    Without an action an idle sandbox is paused, and one whose absolute time is over destroyed.
    """

    seconds: Annotated[float, Meta(ge=1.0, le=366 * 86400.0)]
    mode: TimeoutMode = TimeoutMode.ABSOLUTE
    action: TimeoutAction | None = None


class CreateSandbox(Model, frozen=True):
    """What a sandbox is made from. The image's environment, user and directory are the defaults.

    ``image`` may be a template (its name, or ``template:NAME``); then what is null is as the template has it, and another shape
    than its machine's (``cpus``, ``memory``, ``network``...) needs ``cold``.
    """

    image: ImageReference
    name: Name | None = None
    kernel: KernelReference = ""
    initrd: HostPath = ""
    cpus: Cpus | None = None
    """1, where it is not a template's."""
    memory: MemorySize | None = None
    """512 MiB, where it is not a template's."""
    disk: DiskSize = 0
    env: Environment = field(default_factory=dict)
    labels: Labels = field(default_factory=dict)
    hostname: Hostname | None = None
    user: GuestUser | None = None
    workdir: Annotated[str, Meta(max_length=4096, pattern=r"^/[^\x00]*" + END)] | None = None
    network: NetworkMode | None = None
    """The setting ``network`` says, where it is not a template's: ``nat`` for root on a host that is prepared, else ``user``."""
    egress: EgressPolicy | None = None
    """Where it may connect to, with ``nat``: ``all`` (public addresses; so it is without), ``none``, or rules."""
    learn: bool = False
    """What the policy denies of the public is let through and recorded, with ``nat``."""
    publish: Annotated[list[PublishedPort], Meta(max_length=64)] = field(default_factory=list)
    """Ports of the host that lead into it, with ``nat``."""
    host_access: bool = False
    """Whether it may connect to the host itself, with ``nat``."""
    rate_in: Rate = 0
    rate_out: Rate = 0
    """What it may get and send, with an interface on the host."""
    connections: ConnectionCount = 0
    """How many it may have open outwards at once, with ``nat``."""
    ipv6: bool = False
    """A unique local address of IPv6 besides, translated as the other is, under the same policy, with ``nat``."""
    bridge: InterfaceName | None = None
    """Of which bridge of the host its interface is a port, with the network ``bridge``."""
    address: InterfaceAddress | None = None
    gateway: GatewayAddress | None = None
    """Its own there; without, the image asks for one by DHCP."""
    run_id: RunId | None = None
    """With a name, and ``nat``: its interface and addresses follow from both, and are its own while it exists."""
    address_range: RangeName | None = None
    """Which of the host's ranges its addresses are from: ``default``, or one of the setting ``ranges``. They are its own, as with a
    run id."""
    tap: InterfaceName | None = None
    """The name of its interface on the host; its addresses are its own, as with a run id."""
    interfaces: Annotated[list[Interface], Meta(max_length=7)] = field(default_factory=list)
    """Further interfaces, whatever the first one is."""
    init: InitMode | None = None
    """``agent``, where it is not a template's."""
    volumes: Annotated[list[VolumeMount], Meta(max_length=16)] = field(default_factory=list)
    app: Digest | None = None
    """An app archive that was uploaded (``/v1/apps``): its content is in ``/app``, this sandbox's own and writable."""
    timeout: Timeout | None = None
    lease: bool = False
    """The sandbox ends within a second when the lease's connection goes; it must be taken within 10 s (``/lease``)."""
    cold: bool = False
    """Boot, even where a prepared machine would do."""
    start: bool = False
    """Run the image's own command as a background process tagged ``main``."""


class SetNetwork(Model, frozen=True):
    """What changes of a sandbox's network; null leaves it as it is."""

    egress: EgressPolicy | None = None
    publish: Annotated[list[PublishedPort], Meta(max_length=64)] | None = None
    host_access: bool | None = None
    rate_in: Rate | None = None
    rate_out: Rate | None = None
    connections: ConnectionCount | None = None
    learn: bool | None = None


class CopySandbox(Model, frozen=True):
    """What a copy has of its own; the rest is its original's."""

    name: Name | None = None
    hostname: Hostname | None = None
    """Its name's, or its id, where none is given: never the original's."""
    labels: Labels | None = None
    timeout: Timeout | None = None
    cold: bool = False
    """Boot from the disk, and leave memory and processes alone."""


class Hazard(Model, frozen=True):
    """One thing that would make a machine that came back from memory another's twin, and what became of it.

    ``beyond``: only the guest's own programs can handle it (the random state inside a process); hooks are there for them.
    """

    name: str
    handled: bool
    beyond: bool = False
    detail: str = ""
    at: UnixTime = 0.0
    """By the guest's clock."""


class Certificate(Model, frozen=True):
    """What was done when the machine last came back from memory. ``generation``: how often it, or what it is a copy of, did."""

    generation: int = 0
    restored_at: UnixTime | None = None
    hazards: list[Hazard] = field(default_factory=list)
    steps: dict[str, float] = field(default_factory=dict)
    """Milliseconds that each part took inside the guest."""


class ForkSandbox(Model, frozen=True):
    """How many copies of the running machine. With a name they are NAME, or NAME-1, NAME-2 and so on where there are several."""

    count: Annotated[int, Meta(ge=1, le=100)] = 1
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}" + END, max_length=60)] | None = None
    labels: Labels | None = None
    timeout: Timeout | None = None


class Versions(Model, frozen=True):
    """What a sandbox was made by and runs on."""

    daemon: str = ""
    agent: str = ""
    protocol: int = 0
    kernel: str = ""
    vmm: str = ""
    accelerator: str = ""


class Resources(Model, frozen=True):
    """What a sandbox has. ``memory`` and ``disk`` are bytes."""

    cpus: int = 1
    memory: int = 0
    disk: int = 0


class Sandbox(Model, frozen=True):
    """One sandbox as it is now. ``actions`` are the operations its state allows."""

    id: SandboxId
    state: SandboxState
    image: str
    created_at: UnixTime
    name: str | None = None
    owner: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    image_digest: str = ""
    kernel: str = ""
    resources: Resources = field(default_factory=Resources)
    env: dict[str, str] = field(default_factory=dict)
    hostname: str = ""
    user: str = ""
    workdir: str = ""
    command: list[str] = field(default_factory=list)
    """The image's own, once it is known."""
    template: str = ""
    """The template that it was made from, by the name that had then."""
    network: NetworkMode = NetworkMode.USER
    address: str = ""
    """By which the host reaches it, while it has an interface there."""
    egress: str = ""
    publish: list[str] = field(default_factory=list)
    interface: str = ""
    """On the host, with ``nat`` and ``bridge``."""
    rate_in: int = 0
    rate_out: int = 0
    connections: int = 0
    ipv6: bool = False
    bridge: str = ""
    interfaces: list[Interface] = field(default_factory=list)
    init: InitMode = InitMode.AGENT
    volumes: list[VolumeMount] = field(default_factory=list)
    app: str | None = None
    """The SHA-256 of the app archive in ``/app``."""
    lease: bool = False
    timeout: Timeout | None = None
    expires_at: UnixTime | None = None
    reason: str = ""
    """Why it is frozen when nobody asked for it: ``pool_full`` (it goes on when there is room again) or ``disk_error``."""
    pool: str = ""
    """The pool its disk is in; empty: the data directory."""
    started_at: UnixTime | None = None
    ended_at: UnixTime | None = None
    versions: Versions = field(default_factory=Versions)
    error: ErrorBody | None = None
    operation: OperationId | None = None
    main: ProcessId | None = None
    origin: Origin = Origin.BOOT
    timings: dict[str, float] = field(default_factory=dict)
    """Milliseconds each part of the start took."""
    actions: list[str] = field(default_factory=list)


class Forked(Model, frozen=True):
    """One copy, or why there is none."""

    sandbox: Sandbox | None = None
    error: ErrorBody | None = None


class ForkResult(Model, frozen=True):
    """The copies in their order. ``steps`` are milliseconds; ``stopped`` among them is how long the original stood."""

    items: list[Forked]
    operation: OperationId
    steps: dict[str, float] = field(default_factory=dict)


class SandboxPage(Model, frozen=True):
    """One page; ``next`` goes into ``cursor`` for the page after it, null on the last."""

    items: list[Sandbox]
    next: str | None = None


class SetTimeout(Model, frozen=True):
    """Replaces the timeout, counted from now; null takes it away."""

    timeout: Timeout | None


class StopSandbox(Model, frozen=True):
    """``grace`` seconds between the polite and the impolite end of the guest's processes."""

    grace: Annotated[float, Meta(ge=0.0, le=300.0)] = 10.0


class ResizeSandbox(Model, frozen=True):
    """``disk``: bytes that its root disk shall have, never fewer than it has."""

    disk: Annotated[int, Meta(ge=1 << 20, le=64 << 40)]


class PingResult(Model, frozen=True):
    """The agent answered, after so many milliseconds."""

    ms: float


class ConsoleLog(Model, frozen=True):
    """A part of the serial console. ``next`` is the offset to go on from; ``oldest`` the first byte still held."""

    text: str
    offset: int
    next: int
    oldest: int = 0


class Event(Model, frozen=True):
    """Something that happened. ``id`` grows; ``kind`` is ``sandbox.created``, ``sandbox.state``, ``process.started`` and so on."""

    id: int
    at: UnixTime
    kind: str
    sandbox: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


class EventPage(Model, frozen=True):
    """One page of events."""

    items: list[Event]
    next: str | None = None


class MetricsSample(Model, frozen=True):
    """One moment. Bytes; counters grow from the machine's start; a value the guest did not give is null."""

    at: UnixTime
    cpu_percent: float = 0.0
    """Of one CPU: two busy ones are 200."""
    cpu_seconds: float = 0.0
    memory_host: int = 0
    """Resident memory of the VMM."""
    memory_guest_used: int | None = None
    memory_guest_total: int | None = None
    disk_host: int = 0
    """What the sandbox's files hold on the host."""
    disk_read: int | None = None
    disk_written: int | None = None
    network_received: int | None = None
    network_sent: int | None = None


class Metrics(Model, frozen=True):
    """One ring: samples every ``step`` seconds over ``window`` seconds, oldest first."""

    sandbox: SandboxId
    step: Seconds
    window: Seconds
    samples: list[MetricsSample]
