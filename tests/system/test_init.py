"""``--init image``: process 1 is the image's own init, the agent lives on beside it. With an init of our own (guest/init.c)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import anyio
import pytest

from command_line import CommandLine
from stoker.engine.boot import LiveMachine, MachineRequest, boot
from stoker.engine.pools import MakeDisk
from stoker.engine.run import overlay_at
from stoker.errors import InvalidRequest
from stoker.guest.agent import MakeKeys
from stoker.guest.files import Files
from stoker.guest.messages import ExecRequest
from stoker.settings import Settings
from stoker.storage.strategy import Base, Clone, Strategy

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

SOURCE = Path(__file__).parent / "guest/init.c"
Boot = Callable[..., Awaitable[LiveMachine]]


def make_image(directory: Path, change: Callable[[Path], None] | None = None) -> Path:
    """An ext4 image with nothing but /sbin/init, after ``change`` to its tree."""
    tree = directory / "tree"
    for name in ("sbin", "dev", "proc", "sys", "run", "tmp", "etc"):
        (tree / name).mkdir(parents=True)
    compiler = "musl-gcc" if shutil.which("musl-gcc") else "cc"
    subprocess.run([compiler, "-Os", "-static", "-s", "-o", tree / "sbin/init", SOURCE], check=True, capture_output=True)
    if change is not None:
        change(tree)
    image = directory / "image.ext4"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, image, "16M"], check=True, capture_output=True)
    return image


def the_same(path: Path) -> MakeDisk:
    """The disk that an earlier machine had."""

    async def find(base: Base, size: int) -> Clone:
        return Clone(path.stem, Strategy.QCOW2, path, "qcow2", (base.path,), size)

    return find


@pytest.fixture
async def booted(settings: Settings, short_dir: Path) -> AsyncIterator[Boot]:
    """Boots the image; a second time from the same disk, whatever is process 1 then."""
    machines: list[LiveMachine] = []
    image = short_dir / "image.ext4"

    async def start(init: str = "image", change: Callable[[Path], None] | None = None, keys: MakeKeys | None = None) -> LiveMachine:
        again = image.exists()
        if not again:
            make_image(short_dir, change)
        directory = short_dir / f"machine{len(machines)}"
        directory.mkdir(mode=0o700)
        request = MachineRequest("init", f"ext4:{image}", network="none", init=init, keys=keys)
        disk = the_same(short_dir / "disk.qcow2") if again else overlay_at(short_dir / "disk.qcow2")
        live = await boot(request, settings, directory, disk, detached=False)
        machines.append(live)
        return live

    yield start
    for live in machines:
        await live.end()


def _lines(text: str, key: str) -> list[str]:
    return [line.removeprefix(key).strip() for line in text.splitlines() if line.startswith(key)]


async def _report(live: LiveMachine) -> str:
    """What init said of itself."""
    files = Files(live.agent)
    while not await files.exists("/report"):
        await anyio.sleep(0.02)
    return (await files.read("/report")).decode()


async def test_init_starts_as_the_kernel_would_have_started_it(booted: Boot) -> None:
    live = await booted()
    report = await _report(live)
    assert _lines(report, "pid") == ["1"] and _lines(report, "argv") == ["/sbin/init"]
    assert sorted(_lines(report, "env")) == ["HOME=/", "TERM=linux"]
    assert _lines(report, "fd") == ["0", "1", "2"]
    assert _lines(report, "SigBlk:") == _lines(report, "SigIgn:") == ["0000000000000000"]
    assert int(_lines(report, "files")[0]) <= 4096
    assert _lines(report, "0::") == ["/"]


@pytest.mark.parametrize("init", ["image", "agent"])
async def test_the_disk_of_another_gets_keys_before_anything_of_it_runs(booted: Boot, init: str) -> None:
    asked: list[list[str]] = []

    def with_sshd(tree: Path) -> None:
        for path, text, mode in (
            ("usr/sbin/sshd", "", 0o755),
            ("etc/ssh/ssh_host_rsa_key", "old", 0o600),
            ("etc/ssh/ssh_host_rsa_key.pub", "old", 0o644),
            ("etc/ssh/ssh_host_dsa_key", "old", 0o600),
            ("etc/machine-id", f"{'0' * 32}\n", 0o644),
        ):
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
            (tree / path).chmod(mode)

    async def make(paths: Sequence[str]) -> list[tuple[str, int, str]]:
        asked.append(sorted(paths))
        return [("/etc/ssh/ssh_host_rsa_key", 0o600, "new")]

    live = await booted(init, with_sshd, make)
    files = Files(live.agent)
    assert asked == [["/etc/ssh/ssh_host_dsa_key", "/etc/ssh/ssh_host_rsa_key"]]
    assert await files.read("/etc/ssh/ssh_host_rsa_key") == b"new"
    assert not await files.exists("/etc/ssh/ssh_host_rsa_key.pub") and not await files.exists("/etc/ssh/ssh_host_dsa_key")
    machine_id = await files.read("/etc/machine-id")
    assert len(machine_id) == 33 and machine_id != b"0" * 32 + b"\n"
    assert live.report is not None and not live.report.unhandled
    if init == "image":
        assert _lines(await _report(live), "pid") == ["1"]


async def test_the_agent_lives_on_in_a_group_of_its_own(booted: Boot) -> None:
    live = await booted()
    assert live.agent.welcome.pid == 1  # when it greeted
    done = await live.agent.run(ExecRequest(["/sbin/init", "child"], tag="child"))
    said = done.stdout.decode()
    assert done.status.code == 0
    assert _lines(said, "0::") == ["/stoker-agent"]
    assert said.splitlines()[-1] == "0", "what it starts must not be protected from the kernel's killer"
    assert _lines(said, "SigBlk:") == _lines(said, "SigIgn:") == ["0000000000000000"]
    files = Files(live.agent)
    parent = (await files.read("/proc/self/stat")).decode().rpartition(")")[2].split()[1]
    assert (await files.read(f"/proc/{parent}/cmdline")).startswith(b"@init")
    assert (await files.read(f"/proc/{parent}/oom_score_adj")).strip() == b"-1000"
    assert (await files.read(f"/proc/{parent}/stat")).decode().rpartition(")")[2].split()[1] == "1"


@pytest.mark.parametrize(("how", "trace"), [("poweroff", "/asked-poweroff"), ("reboot", "/asked-reboot")])
async def test_a_shutdown_asks_init(booted: Boot, how: str, trace: str) -> None:
    live = await booted()
    await _report(live)
    await live.agent.shutdown(how, 60.0)
    with anyio.fail_after(60):
        exit = await live.machine.wait()
    assert exit.code == 0 and not exit.requested
    again = await booted(init="agent")
    assert await Files(again.agent).exists(trace)


async def test_an_init_that_does_not_obey_is_not_waited_for(booted: Boot) -> None:
    live = await booted(change=lambda tree: (tree / "deaf").touch())
    await _report(live)
    await live.agent.shutdown("poweroff", 1.0)
    with anyio.fail_after(60):
        assert (await live.machine.wait()).code == 0
    again = await booted(init="agent")
    assert await Files(again.agent).exists("/asked-poweroff"), "what was written before the end was lost"


def _directory(tree: Path) -> None:
    (tree / "sbin/init").unlink()
    (tree / "sbin/init").mkdir()


def _damaged(tree: Path) -> None:
    (tree / "sbin/init").write_bytes(b"\x7fELF and nothing that follows")


CASES = {
    "is not there": (lambda tree: (tree / "sbin/init").unlink(), "the image has no /sbin/init: No such file or directory"),
    "is a directory": (_directory, "the image's /sbin/init is a directory"),
    "may not be run": (lambda tree: (tree / "sbin/init").chmod(0o644), "the image's /sbin/init cannot be run: Permission denied"),
    "is no program": (_damaged, "the image's /sbin/init cannot be run: Exec format error"),
}


@pytest.mark.parametrize("case", CASES)
async def test_an_init_that_cannot_be_is_said(booted: Boot, case: str) -> None:
    change, message = CASES[case]
    with pytest.raises(InvalidRequest) as caught:
        await booted(change=change)
    assert (caught.value.code, caught.value.message) == ("no_init", message)
    assert "--init agent" in caught.value.hint


def test_the_command_line_says_what_an_image_lacks(stoker: CommandLine) -> None:
    """The base has no init of its own."""
    done = stoker("run", "--init", "image", "--network", "none", "debian:12", "--", "true")
    assert done.code == 125 and "the image has no /sbin/init" in done.error and "[no_init]" in done.error
    assert "Traceback" not in done.error


def test_a_sandbox_remembers_its_init(stoker: CommandLine, short_dir: Path) -> None:
    image = make_image(short_dir)
    created = stoker("create", "--init", "image", "--network", "none", "--json", f"ext4:{image}")
    assert created.code == 0, created.error
    sandbox = json.loads(created.text)
    assert sandbox["init"] == "image"
    done = stoker("exec", sandbox["id"], "/sbin/init", "child")
    assert done.code == 0 and "0::/stoker-agent" in done.text
    assert stoker("stop", sandbox["id"]).code == 0
    assert stoker("start", sandbox["id"]).code == 0
    assert "0::/stoker-agent" in stoker("exec", sandbox["id"], "/sbin/init", "child").text
