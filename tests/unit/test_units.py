"""Units without a systemd: what goes over the bus, and what is made of a systemd that refuses, is silent or goes away."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dbus_fast import Message, MessageType

from stoker.engine.units import Units, properties, unit_name
from stoker.errors import HostError
from stoker.host import systemd
from stoker.host.binaries import shim_path
from stoker.host.cgroups import Limits
from stoker.host.systemd import Systemd, unit_of
from stoker.vmm.shim import ShimOptions, start

pytestmark = pytest.mark.anyio
NAME = "stoker-sb-a.scope"


class FakeBus:
    """Answers each call with what ``answers`` has for its member: a body, an error's name, an exception, or nothing at all."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[Message] = []
        self.connected = True
        self.handlers: list[Callable[[Message], Any]] = []
        self.result = "done"

    def add_message_handler(self, handler: Callable[[Message], Any]) -> None:
        self.handlers.append(handler)

    async def call(self, message: Message) -> Any:
        self.calls.append(message)
        answer = self.answers.get(str(message.member), ["/job/1"])
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            self.connected = False
            raise answer
        if isinstance(answer, str):
            return SimpleNamespace(message_type=MessageType.ERROR, error_name=answer, body=["it says why"])
        if message.member in ("StartTransientUnit", "StopUnit") and self.result:
            # Another's job first: each waits for its own.
            for unit, result in (("other.scope", "failed"), (str(message.body[0]), self.result)):
                told = SimpleNamespace(member="JobRemoved", interface=systemd.SYSTEMD[2], body=[1, "/job/1", unit, result])
                for handler in self.handlers:
                    handler(told)  # type: ignore[arg-type]
        return SimpleNamespace(message_type=MessageType.METHOD_RETURN, body=answer)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "TIMEOUT", 0.05)


def test_a_machines_scope() -> None:
    assert unit_name("sb-a") == NAME
    assert properties("a box", Limits(memory=640 << 20, pids=512, cpus=2)) == {
        "Description": ("s", "a box"),
        "Slice": ("s", "stoker.slice"),
        "Delegate": ("b", True),
        "CollectMode": ("s", "inactive-or-failed"),
        "TimeoutStopUSec": ("t", 10_000_000),
        "CPUAccounting": ("b", True),
        "MemoryAccounting": ("b", True),
        "TasksAccounting": ("b", True),
        "CPUWeight": ("t", 100),
        "MemoryMax": ("t", 640 << 20),
        "MemorySwapMax": ("t", 0),
        "TasksMax": ("t", 512),
        "CPUQuotaPerSecUSec": ("t", 2_000_000),
    }
    assert "MemoryMax" not in properties("", Limits()) and "TasksMax" not in properties("", Limits())


async def test_what_is_said_to_systemd() -> None:
    bus = FakeBus()
    await Systemd(bus).start_scope(NAME, [7, 8], {"Slice": ("s", "stoker.slice")})  # type: ignore[arg-type]
    [call] = bus.calls
    assert (call.member, call.signature) == ("StartTransientUnit", "ssa(sv)a(sa(sv))")
    name, mode, words, aux = call.body
    assert (name, mode, aux) == (NAME, "fail", [])
    assert [(key, variant.signature, variant.value) for key, variant in words] == [
        ("Slice", "s", "stoker.slice"),
        ("PIDs", "au", [7, 8]),
    ]
    # The library itself can put it on the wire.
    assert call._marshall(False)


async def test_a_job_that_fails() -> None:
    bus = FakeBus()
    bus.result = "failed"
    with pytest.raises(HostError) as error:
        await Systemd(bus).start_scope(NAME, [7], {})  # type: ignore[arg-type]
    assert error.value.code == "unit_not_started" and NAME in error.value.message


async def test_stopping_what_is_not_there() -> None:
    await Systemd(FakeBus(StopUnit=systemd.NO_SUCH_UNIT)).stop_unit(NAME)  # type: ignore[arg-type]
    with pytest.raises(HostError) as error:
        await Systemd(FakeBus(StopUnit="org.freedesktop.DBus.Error.AccessDenied")).stop_unit(NAME)  # type: ignore[arg-type]
    assert error.value.code == "systemd_refused" and "it says why" in error.value.message


@pytest.mark.parametrize(
    ("answer", "code"), [(None, "systemd_silent"), (EOFError(), "systemd_unreachable"), (OSError(32, "x"), "systemd_unreachable")]
)
async def test_a_systemd_that_does_not_answer(impatient: None, answer: Any, code: str) -> None:
    with pytest.raises(HostError) as error:
        await Systemd(FakeBus(StartTransientUnit=answer)).start_scope(NAME, [7], {})  # type: ignore[arg-type]
    assert error.value.code == code


async def test_a_job_that_never_ends(impatient: None) -> None:
    bus = FakeBus()
    bus.result = ""
    with pytest.raises(HostError) as error:
        await Systemd(bus).start_scope(NAME, [7], {})  # type: ignore[arg-type]
    assert error.value.code == "systemd_silent"


async def test_a_connection_that_broke_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    buses = [FakeBus(StartTransientUnit=EOFError()), FakeBus()]
    made: list[FakeBus] = []

    @asynccontextmanager
    async def connect() -> AsyncIterator[Systemd]:
        made.append(buses[len(made)])
        yield Systemd(made[-1])  # type: ignore[arg-type]

    monkeypatch.setattr(systemd, "connect", connect)
    async with Units() as units:
        assert units.usable
        with pytest.raises(HostError):
            await units.enter("sb-a", [7], "", Limits())
        await units.enter("sb-a", [7], "", Limits())
    assert len(made) == 2


async def test_a_host_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "refused", lambda: "it is not PID 1")
    async with Units() as units:
        assert not units.usable and "it is not PID 1" in units.problem
        with pytest.raises(HostError) as error:
            await units.enter("sb-a", [os.getpid()], "", Limits())
        assert error.value.code == "systemd_unreachable"
        await units.release(NAME)
        await units.register("sb-a", os.getpid())


async def test_a_machined_that_refuses_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def connect() -> AsyncIterator[Systemd]:
        yield Systemd(FakeBus(RegisterMachine="org.freedesktop.DBus.Error.ServiceUnknown"))  # type: ignore[arg-type]

    monkeypatch.setattr(systemd, "connect", connect)
    async with Units() as units:
        await units.register("sb-a", 7)
        assert units.usable


@pytest.mark.parametrize(
    ("text", "unit", "path"),
    [
        ("0::/stoker.slice/stoker-sb-a.scope\n", NAME, "/sys/fs/cgroup/stoker.slice/stoker-sb-a.scope"),
        ("0::/stoker.slice/stoker-sb-a.scope/inner/most\n", NAME, "/sys/fs/cgroup/stoker.slice/stoker-sb-a.scope"),
        (
            "4:memory:/x\n0::/user.slice/user@0.service/app.slice/a.scope\n",
            "a.scope",
            "/sys/fs/cgroup/user.slice/user@0.service/app.slice/a.scope",
        ),
        ("0::/\n", None, ""),
        ("1:name=systemd:/a.scope\n", None, ""),
    ],
)
def test_which_unit_a_process_is_in(tmp_path: Path, text: str, unit: str | None, path: str) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cgroup").write_text(text)
    assert unit_of(7, tmp_path) == ((unit, Path(path)) if unit else None)
    assert unit_of(8, tmp_path) is None


def _options(directory: Path, gate: Callable[[int], Any]) -> ShimOptions:
    console = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    return ShimOptions(directory=directory, console=console, console_bytes=4096, gate=gate, journal="sb-a")


async def test_a_vmm_is_born_when_the_gate_opens(short_dir: Path) -> None:
    seen: list[tuple[int, list[str]]] = []

    async def gate(pid: int) -> None:
        await asyncio.sleep(0.2)
        seen.append((pid, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    options = _options(short_dir, gate)
    pair = await start(shim_path(), options, ["/bin/sleep", "100"], {})
    os.close(options.console)
    try:
        assert seen == [(pair.shim.pid, [])] and pair.vmm.alive()
    finally:
        os.kill(pair.shim.pid, 9)
        await asyncio.to_thread(os.waitpid, pair.shim.pid, 0)


async def test_a_gate_that_fails_leaves_nothing(short_dir: Path) -> None:
    pids = []

    async def gate(pid: int) -> None:
        pids.append(pid)
        raise HostError("a_test", "no")

    options = _options(short_dir, gate)
    with pytest.raises(HostError, match="no"):
        await start(shim_path(), options, ["/bin/sleep", "100"], {})
    os.close(options.console)
    assert not Path(f"/proc/{pids[0]}").exists() and not (short_dir / "shim.json").exists()


async def test_a_shim_that_is_never_told_to_begin_does_not(short_dir: Path) -> None:
    """Its starter was killed at the gate."""
    waits, go = os.pipe2(os.O_CLOEXEC)
    argv = [shim_path(), "--dir", short_dir, "--go-fd", str(waits), "--", "/bin/sleep", "100"]
    process = await asyncio.create_subprocess_exec(*argv, pass_fds=(waits,))
    os.close(waits)
    await asyncio.sleep(0.1)
    assert process.returncode is None and not (short_dir / "shim.json").exists()
    os.close(go)
    assert await process.wait() == 0 and not (short_dir / "shim.json").exists()
