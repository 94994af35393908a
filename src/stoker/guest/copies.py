"""What a machine is told before its memory is taken and after it came back, and what it reports: docs/agent-protocol.md, Copies."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from stoker.guest.messages import Count, HostKeys, NetworkConfiguration, Resolver, Short, Text, call, printable

__all__ = ["AfterRestore", "BeforeSnapshot", "Hazard", "Report", "booted_copy"]


class BeforeSnapshot(Struct, frozen=True):
    """What is done in a machine before its memory is taken: hooks, then its file systems are written out.

    ``hook_timeout`` is seconds for each hook; ``freeze`` keeps the file systems as they are until ``after_snapshot`` (or 10 s of
    the guest's time); with ``drop_caches`` free memory is filled with zeros, so that a capture can leave it out.
    """

    hooks: bool = True
    hook_timeout: float = 10.0
    freeze: bool = False
    drop_caches: bool = False

    def wire(self) -> bytes:
        """The payload of the call: the protocol has no fractions."""
        hook_ms = round(self.hook_timeout * 1000)
        return call("before_snapshot", hooks=self.hooks, hook_ms=hook_ms, freeze=self.freeze, drop_caches=self.drop_caches)


class AfterRestore(Struct, frozen=True):
    """What a machine is told first after its memory came back, before any other call.

    With ``copy`` it is another machine than the one whose memory it has: its boot id, ssh host keys and connections are not left as
    they were, and every hazard that stays is reported. Without, it is the same machine that goes on: only what is named is changed.
    ``None`` (an empty list) leaves a thing as it is.
    """

    entropy: bytes
    """64 random bytes, new for each restore."""
    generation: int
    """How many restores lie between the first boot and this machine: /run/stoker/generation in the guest."""
    copy: bool = True
    realtime: int = 0
    """Nanoseconds of the epoch; 0: the host's clock when this is sent."""
    hostname: str | None = None
    machine_id: str | None = None
    """32 hexadecimal digits."""
    boot_id: str | None = None
    """A UUID; a copy without one makes its own."""
    network: NetworkConfiguration | None = None
    drop_connections: bool = True
    """End every TCP connection with another machine. Nothing is sent to the peer."""
    resolv: Resolver | None = None
    hosts: Sequence[tuple[str, str]] | None = None
    """All of /etc/hosts; without it, the old host name in it is replaced by the new one."""
    ssh_host_keys: Sequence[tuple[str, int, Text]] = ()
    """(path, mode, content) of each file; a host key that is not among them is removed."""
    ask_keys: bool = False
    """Where there are host keys and none are given, say which, do nothing, and wait to be told again with others."""
    env: Mapping[str, Text] | None = None
    """All of the default environment; it and the next two are for what is started from then on."""
    user: str | None = None
    workdir: str | None = None
    hooks: bool = True
    hook_timeout: float = 10.0
    """Seconds for each hook."""

    def wire(self) -> bytes:
        """The payload of the call: the protocol has no fractions."""
        arguments = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        arguments["hook_ms"] = round(arguments.pop("hook_timeout") * 1000)
        return call("after_restore", **arguments)


class Hazard(Struct, frozen=True):
    """One thing that makes a copy unsafe, and what became of it. ``at`` is the guest's clock in nanoseconds.

    ``beyond``: nobody but the guest's own programs can handle it (the random state inside a process); it is told and is no failure.
    """

    name: Short
    handled: bool
    detail: Short = ""
    at: Count = 0
    beyond: bool = False


class Report(Struct, frozen=True):
    """What the agent did before a snapshot or after a restore. ``steps`` are microseconds by name, in their order."""

    hazards: Annotated[list[Hazard], Meta(max_length=256)] = []
    steps: Annotated[dict[Short, Count], Meta(max_length=64)] = {}
    ssh_host_keys: HostKeys | None = None
    """Nothing was done; it wants to be told again with others in place of these."""

    @property
    def unhandled(self) -> list[Hazard]:
        """What should have been handled, and was not."""
        return [hazard for hazard in self.hazards if not hazard.handled and not hazard.beyond]

    @property
    def seconds(self) -> dict[str, float]:
        """The steps in seconds."""
        return {name: us / 1e6 for name, us in self.steps.items()}

    def clean(self) -> Report:
        """The same with text that may go to a terminal."""
        hazards = [
            msgspec.structs.replace(hazard, name=printable(hazard.name, 200), detail=printable(hazard.detail, 1000))
            for hazard in self.hazards
        ]
        return Report(hazards, {printable(name, 40): us for name, us in self.steps.items()})


def booted_copy(keys: Sequence[str]) -> Report:
    """What a machine that booted from another's disk has been told by `configure`, in the words of a restore.

    ``keys``: the files of its new ssh host keys.
    """
    done = {
        "random": "seeded at its boot",
        "clock": "set",
        "boot_id": "of a boot of its own",
        "hostname": "set",
        "machine_id": "set",
        "ssh_host_keys": f"{len(keys)} files written, the original's are removed" if keys else "none on its disk",
        "network": "set",
        "connections": "none: it booted",
        "processes": "none was running",
        "kernel_secrets": "chosen at its boot",
    }
    now = time.time_ns()
    hazards = [Hazard(name, handled=True, detail=detail, at=now) for name, detail in done.items()]
    kept = "what programs keep on the disk (ids, keys, tokens) is the same in every copy"
    return Report([*hazards, Hazard("files", handled=False, detail=kept, at=now, beyond=True)])
