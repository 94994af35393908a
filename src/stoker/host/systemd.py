"""systemd and its machined over D-Bus: transient scopes, machines. Thin: names and properties are the caller's.

A *scope* is a unit made around processes that run already: one call (``StartTransientUnit`` with their numbers), one signal when
that is done. It is gone when its last process is, or fails and then is collected (``CollectMode``); stopping one sends SIGTERM,
later SIGKILL, to everything in it. Nothing here outlives the connection but the units themselves, which are systemd's.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stoker.errors import HostError
from stoker.host.durable import write_atomically

if TYPE_CHECKING:
    from dbus_fast import Message
    from dbus_fast.aio import MessageBus

__all__ = ["NO_SUCH_UNIT", "Property", "Systemd", "connect", "refused", "unit_of"]

SYSTEMD: Final = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
MACHINED: Final = ("org.freedesktop.machine1", "/org/freedesktop/machine1", "org.freedesktop.machine1.Manager")
PROPERTIES: Final = "org.freedesktop.DBus.Properties"
NO_SUCH_UNIT: Final = "org.freedesktop.systemd1.NoSuchUnit"
TIMEOUT: Final = 10.0
"""Seconds that a call or a job may take. A loaded host is slow; a systemd that answers later than this is as good as none."""

Property = tuple[str, Any]
"""D-Bus signature and value."""


def refused() -> str:
    """Why systemd cannot be asked for units here; empty when it can be tried."""
    if not Path("/run/systemd/system").is_dir():
        return "systemd is not PID 1"
    if os.geteuid() == 0:
        return "" if Path("/run/dbus/system_bus_socket").is_socket() else "there is no system bus (package dbus)"
    if os.environ.get("DBUS_SESSION_BUS_ADDRESS") or _user_bus().is_socket():
        return ""
    return "this user has no systemd of their own (loginctl enable-linger, and a session bus)"


def _user_bus() -> Path:
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}") / "bus"


def unit_of(pid: int, proc: Path = Path("/proc")) -> tuple[str, Path] | None:
    """The last unit (scope or service) that a process is in, and its cgroup below the version 2 hierarchy."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    path = next((line[3:] for line in lines if line.startswith("0::")), "")
    parts = path.strip("/").split("/")
    for depth in range(len(parts), 0, -1):
        if parts[depth - 1].endswith((".scope", ".service")):
            return parts[depth - 1], Path("/sys/fs/cgroup", *parts[:depth])
    return None


class Systemd:
    """A connection to the manager: the system's for root, the user's own otherwise."""

    units = Path("/run/systemd/system")
    """Of root's. What is in ``/etc`` goes before it."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus
        self._jobs: dict[str, asyncio.Future[str]] = {}
        bus.add_message_handler(self._heard)

    @property
    def connected(self) -> bool:
        return bool(self._bus.connected)

    def _heard(self, message: Message) -> None:
        if message.member == "JobRemoved" and message.interface == SYSTEMD[2] and len(message.body) == 4:
            waiting = self._jobs.get(str(message.body[2]))
            if waiting is not None and not waiting.done():
                waiting.set_result(str(message.body[3]))

    async def call(self, where: tuple[str, str, str], member: str, signature: str = "", *words: Any) -> list[Any]:
        """One method call. An error is :class:`HostError` ``systemd_refused`` with the error's D-Bus name in ``details``."""
        from dbus_fast import Message, MessageType

        destination, path, interface = where
        message = Message(
            destination=destination, path=path, interface=interface, member=member, signature=signature, body=list(words)
        )
        try:
            async with asyncio.timeout(TIMEOUT):
                reply = await self._bus.call(message)
        except TimeoutError:
            raise HostError("systemd_silent", f"{destination} did not answer {member} within {TIMEOUT:g} s") from None
        except (OSError, EOFError) as error:
            raise _unreachable(str(error)) from None
        if reply is None:
            raise _unreachable("the connection ended")
        if reply.message_type is MessageType.ERROR:
            text = str(reply.body[0]) if reply.body else str(reply.error_name)
            raise HostError(
                "systemd_refused",
                f"{member}: {text}",
                "journalctl -b -u dbus -u systemd-machined",
                details={"error": reply.error_name},
            )
        return list(reply.body)

    async def start_scope(self, name: str, pids: Sequence[int], properties: Mapping[str, Property]) -> None:
        """Makes a scope around processes; returns when they are in it."""
        from dbus_fast import Variant

        words = [[key, Variant(signature, value)] for key, (signature, value) in properties.items()]
        words.append(["PIDs", Variant("au", list(pids))])
        result = await self._job(name, "StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail", words, [])
        if result != "done":
            raise HostError("unit_not_started", f"systemd could not start {name}: {result}", f"systemctl status {name}")

    async def start_unit(self, name: str, template: tuple[str, str] | None = None) -> None:
        """Starts a unit; ``template``: the file it is of, by name and text, which is put to systemd's others of this boot where it
        is not there as that."""
        if template is not None:
            file, text = self.units / template[0], template[1]
            if not file.exists() or file.read_text() != text:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, text.encode(), 0o644)
                await self.call(SYSTEMD, "Reload")
        result = await self._job(name, "StartUnit", "ss", name, "replace")
        if result != "done":
            raise HostError("unit_not_started", f"systemd could not start {name}: {result}", f"systemctl status {name}")

    async def stop_unit(self, name: str) -> None:
        """Ends everything in a unit; returns when it has stopped. No error when there is no such unit."""
        try:
            await self._job(name, "StopUnit", "ss", name, "replace")
        except HostError as error:
            if error.details.get("error") != NO_SUCH_UNIT:
                raise

    async def _job(self, name: str, member: str, signature: str, *words: Any) -> str:
        waiting = self._jobs[name] = asyncio.get_running_loop().create_future()
        try:
            await self.call(SYSTEMD, member, signature, *words)
            async with asyncio.timeout(TIMEOUT):
                result: str = await waiting
            return result
        except TimeoutError:
            raise HostError("systemd_silent", f"systemd's job for {name} did not end within {TIMEOUT:g} s") from None
        finally:
            self._jobs.pop(name, None)

    async def unit_properties(self, name: str, interface: str = "Scope") -> dict[str, Any]:
        """What systemd says of a loaded unit; empty when there is none."""
        try:
            [path] = await self.call(SYSTEMD, "GetUnit", "s", name)
        except HostError as error:
            if error.details.get("error") == NO_SUCH_UNIT:
                return {}
            raise
        where = (SYSTEMD[0], str(path), PROPERTIES)
        [found] = await self.call(where, "GetAll", "s", f"org.freedesktop.systemd1.{interface}")
        return {name: variant.value for name, variant in found.items()}

    async def register_machine(self, name: str, leader: int, identity: bytes, service: str) -> None:
        """Tells machined of a virtual machine whose process is ``leader``. It forgets it when the leader's unit ends."""
        await self.call(MACHINED, "RegisterMachine", "sayssus", name, identity, service, "vm", leader, "")


def _unreachable(why: str) -> HostError:
    return HostError("systemd_unreachable", f"systemd cannot be reached over D-Bus: {why}", "systemctl status dbus")


@asynccontextmanager
async def connect() -> AsyncIterator[Systemd]:
    """Connects and asks to hear of jobs. Errors: ``systemd_unreachable``, ``systemd_refused``, ``systemd_silent``."""
    if why := refused():
        raise _unreachable(why)
    from dbus_fast import BusType
    from dbus_fast.aio import MessageBus
    from dbus_fast.errors import AuthError, InvalidAddressError

    root = os.geteuid() == 0
    address = None if root or os.environ.get("DBUS_SESSION_BUS_ADDRESS") else f"unix:path={_user_bus()}"
    try:
        bus = MessageBus(bus_address=address, bus_type=BusType.SYSTEM if root else BusType.SESSION)
        async with asyncio.timeout(TIMEOUT):
            await bus.connect()
    except (OSError, EOFError, AuthError, InvalidAddressError, TimeoutError) as error:
        raise _unreachable(str(error) or "no answer") from None
    try:
        systemd = Systemd(bus)
        rule = f"type='signal',sender='{SYSTEMD[0]}',interface='{SYSTEMD[2]}',member='JobRemoved'"
        await systemd.call(("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus"), "AddMatch", "s", rule)
        await systemd.call(SYSTEMD, "Subscribe")
        yield systemd
    finally:
        bus.disconnect()
        await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]
