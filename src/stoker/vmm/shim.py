"""Starting a VMM under its supervisor, and finding it again.

``stoker-shim`` (``agent/shim.c``) is the parent of every VMM. Files in the machine's directory:

==================  ==============================================================================================
``shim.json``       who runs: boot id, pid and start time of shim and VMM. Written by rename when the VMM has started
``exit.json``       how the VMM ended. Written by rename; absent while it runs, and when the shim was killed
``console.log``     the serial console; ``console.log.1`` is the older half of what is kept
``vmm.log``         the VMM's own output, with ``vmm.log.1``
``net.deny``        the rules of the network filter
==================  ==============================================================================================

A crash of ours leaves either a running pair, which the owner's pipe ends (attached) or :func:`find` finds (detached), or the
files above and no process. Nothing else exists outside the directory.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stoker.errors import HostError
from stoker.host.process import ProcessIdentity, boot_id
from stoker.vmm.machine import Gate, MachineExit, UserNetwork
from stoker.vmm.zygote import Zygote

__all__ = ["ShimOptions", "Supervised", "exit_of", "filter_rules", "find", "read_exit", "shim_command", "start"]

START_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class ShimOptions:
    """What the shim is told. Descriptors are those of this process; ``passed`` go on to the VMM."""

    directory: Path
    console: int
    console_bytes: int
    owner: int | None = None
    passed: tuple[int, ...] = ()
    user: int | None = None
    groups: tuple[int, ...] = ()
    device: Path | None = None
    cgroup: Path | None = None
    net_out: int | None = None
    net_in: int | None = None
    net_deny: Path | None = None
    gate: Gate | None = None
    journal: str = ""
    """What its lines in the host's journal are marked with; empty: none go there."""

    def descriptors(self) -> tuple[int, ...]:
        named = (self.console, self.owner, self.net_out, self.net_in)
        return (*(fd for fd in named if fd is not None), *self.passed)


@dataclass(frozen=True, slots=True)
class Supervised:
    """A shim and its VMM."""

    shim: ProcessIdentity
    vmm: ProcessIdentity
    descriptor: int | None = None
    """Of the shim, where it is no child of ours: the caller's to close."""


def shim_command(shim: Path, options: ShimOptions, status: int, vmm: Sequence[str], go: int | None = None) -> list[str]:
    """The supervisor's command line; ``vmm`` is the VMM's, with the full path of the program first. It waits for ``go``."""
    argv = [str(shim), "--dir", str(options.directory), "--status-fd", str(status)]
    argv += ["--console-fd", str(options.console), "--console-bytes", str(options.console_bytes)]
    if options.owner is not None:
        argv += ["--owner-fd", str(options.owner)]
    if options.user is not None:
        argv += ["--uid", str(options.user), "--gid", str(options.user)]
        if options.groups:
            argv += ["--groups", ",".join(map(str, options.groups))]
    if options.device is not None:
        argv += ["--device", str(options.device)]
    if options.cgroup is not None:
        argv += ["--cgroup", str(options.cgroup / "cgroup.procs")]
    if options.net_deny is not None:
        argv += ["--net-out", str(options.net_out), "--net-in", str(options.net_in), "--net-deny", str(options.net_deny)]
    if go is not None:
        argv += ["--go-fd", str(go)]
    if options.journal:
        argv += ["--journal", options.journal]
    for fd in options.passed:
        argv += ["--pass-fd", str(fd)]
    return [*argv, "--", *vmm]


def filter_rules(network: UserNetwork) -> str:
    """The network filter's rules, as the shim reads them."""
    return "".join([f"nameserver {network.nameserver}\n", *(f"deny {cidr}\n" for cidr in network.denied)])


async def start(
    shim: Path, options: ShimOptions, vmm: Sequence[str], environment: Mapping[str, str], zygote: Zygote | None = None
) -> Supervised:
    """Starts the pair and returns when the VMM's program runs. The caller closes its copies of the descriptors.

    A VMM that cannot be executed is :class:`HostError` ``vmm_not_started``. On any failure the pair is ended before this returns.
    With a gate the VMM starts when that returns, in whatever it has put the shim into.
    """
    status, theirs = os.pipe2(os.O_CLOEXEC)
    with ExitStack() as undo:
        undo.callback(os.close, status)
        waits = go = None
        with ExitStack() as ends:
            ends.callback(os.close, theirs)
            if options.gate is not None:
                waits, go = os.pipe2(os.O_CLOEXEC)
                ends.callback(os.close, waits)
                undo.callback(os.close, go)
            through = (theirs, *options.descriptors(), *(() if waits is None else (waits,)))
            descriptor = None
            if zygote is not None:
                descriptor = await _forked(zygote, shim_command(shim, options, theirs, vmm), environment, through, waits)
            if descriptor is not None:
                pid = _pid_of(descriptor)
            else:
                pid = _spawned(shim_command(shim, options, theirs, vmm, waits), environment, through)
        with ExitStack() as failed:
            failed.callback(_end, pid, descriptor)
            if options.gate is not None and go is not None:
                if pid:  # else it has ended: its status pipe says why
                    await options.gate(pid)
                with suppress(BrokenPipeError):
                    os.write(go, b"g")  # gone already: its status pipe says why
            try:
                async with asyncio.timeout(START_TIMEOUT):
                    line = await _read_line(status)
            except TimeoutError:
                raise HostError("vmm_not_started", f"stoker-shim did not start {vmm[0]} within {START_TIMEOUT:g} s") from None
            supervised = replace(_parse_status(line, vmm[0]), descriptor=descriptor)
            failed.pop_all()
        return supervised


async def _forked(
    zygote: Zygote, words: Sequence[str], environment: Mapping[str, str], through: Sequence[int], go: int | None
) -> int | None:
    """A descriptor of a shim that the zygote has begun; None: it has not. Not known: it raises, lest there be two."""
    try:
        return await zygote.start(words, environment, through, go)
    except HostError as error:
        if error.code != "zygote_failed":
            raise
        return None


def _spawned(words: list[str], environment: Mapping[str, str], through: Sequence[int]) -> int:
    # dup2 onto itself is posix_spawn's way to let a descriptor through; nothing becomes inheritable in this process.
    actions: list[tuple[object, ...]] = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in through]
    # A detached machine must not hold open the pipe that somebody reads our own output from.
    actions.append((os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0))
    actions += [(os.POSIX_SPAWN_DUP2, 0, fd) for fd in (1, 2)]
    return os.posix_spawn(words[0], words, environment, file_actions=actions)


def _pid_of(descriptor: int) -> int:
    """The number of the process that a descriptor is of; 0: it has ended."""
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
        return next((max(0, int(line.split()[1])) for line in file if line.startswith("Pid:")), 0)


def _parse_status(line: bytes, program: str) -> Supervised:
    try:
        status = json.loads(line)
        if "error" not in status:
            # The VMM may have ended since; that it ran is what counts, and exit.json tells the rest.
            return _identities(status)
        code, what = int(status["errno"]), str(status["error"])
    except (ValueError, TypeError, KeyError):
        raise HostError("vmm_not_started", f"the supervisor of {program} ended before it ran") from None
    reason = os.strerror(code) if code else "bad argument"
    raise HostError("vmm_not_started", f"{program} was not started: {what}: {reason}", details={"step": what, "errno": code})


def _end(pid: int, descriptor: int | None) -> None:
    """Takes a shim that failed to start out of the process table; SIGKILL takes its VMM along."""
    with ExitStack() as close, suppress(ProcessLookupError, ChildProcessError):
        if descriptor is not None:
            close.callback(os.close, descriptor)
            signal.pidfd_send_signal(descriptor, 9)
        else:
            os.kill(pid, 9)  # our own child, not waited for yet: the number cannot mean another
            os.waitpid(pid, 0)


async def _read_line(fd: int) -> bytes:
    """Everything up to the end of the pipe (the shim closes it after one line), at most 4 KiB."""
    loop = asyncio.get_running_loop()
    os.set_blocking(fd, False)
    done: asyncio.Future[bytes] = loop.create_future()
    line = bytearray()

    def readable() -> None:
        try:
            chunk = os.read(fd, 4096)
        except BlockingIOError:
            return
        line.extend(chunk)
        if (not chunk or chunk.endswith(b"\n") or len(line) > 4096) and not done.done():
            loop.remove_reader(fd)
            done.set_result(bytes(line))

    loop.add_reader(fd, readable)
    try:
        return await done
    finally:
        loop.remove_reader(fd)


def _identities(record: dict[str, Any]) -> Supervised:
    found = []
    for name in ("shim", "vmm"):
        identity = ProcessIdentity(int(record[name]["pid"]), int(record[name]["start"]))
        try:
            now = ProcessIdentity.of(identity.pid)
        except ProcessLookupError:
            now = identity
        found.append(now if now.start == identity.start else identity)
    return Supervised(found[0], found[1])


def find(directory: Path) -> Supervised | None:
    """The pair that runs in this directory; ``None`` when there is none (any more)."""
    try:
        record = json.loads((directory / "shim.json").read_bytes())
        if record["boot"] != boot_id():
            return None
        supervised = _identities(record)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return supervised if supervised.vmm.alive() and supervised.shim.alive() else None


def read_exit(directory: Path) -> dict[str, Any] | None:
    """``exit.json``; ``None`` when there is none, as after the shim itself was killed."""
    try:
        record = json.loads((directory / "exit.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def exit_of(record: dict[str, Any] | None, requested: bool) -> MachineExit:
    """The exit a record tells of. Without one the shim was killed, and SIGKILL came to the VMM with its death."""
    if record is None:
        return MachineExit(None, 9, requested)
    code, signal = record.get("code"), record.get("signal")
    return MachineExit(
        code if isinstance(code, int) else None,
        signal if isinstance(signal, int) else None,
        requested or record.get("cause") in ("owner", "term"),
        record.get("oom") is True,
    )
