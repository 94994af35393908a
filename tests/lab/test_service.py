"""The daemon as a service of systemd, with the units of contrib/systemd: started by its first client, away and back again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import CommandLine, Done
from stoker.settings import load_settings

pytestmark = pytest.mark.timeout(900)

UNITS = Path(__file__).resolve().parents[2] / "contrib/systemd"
INSTALLED = Path("/run/systemd/system")
SOCKET = Path("/run/stoker/stoker.sock")
COUNT = 'i=0; while :; do echo "line $i"; i=$((i + 1)); sleep 0.2; done'


def systemctl(*words: str, check: bool = True) -> str:
    done = subprocess.run(["systemctl", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"systemctl {' '.join(words)}: {done.stderr}"
    return done.stdout.strip()


def shown(unit: str, name: str) -> str:
    return systemctl("show", "--value", "-p", name, unit)


def patiently(service: CommandLine, *words: str) -> Done:
    """Asks again while the daemon that the first question starts does not answer in the client's time."""
    done = service(*words)
    while done.code == 124 and systemctl("is-active", "stoker.service", check=False) == "activating":
        done = service(*words)
    return done


@pytest.fixture
def service() -> Iterator[CommandLine]:
    """The socket is there, the daemon is not; the command line of its clients (root's default directories)."""
    INSTALLED.mkdir(exist_ok=True)
    for unit in UNITS.iterdir():
        shutil.copy(unit, INSTALLED)
    drop_in = INSTALLED / "stoker.service.d"
    drop_in.mkdir(exist_ok=True)
    (drop_in / "lab.conf").write_text("[Service]\nEnvironment=STOKER_ACCEL=kvm STOKER_BOOT_TIMEOUT=280\nTimeoutStartSec=280\n")
    systemctl("daemon-reload")
    systemctl("start", "stoker.socket")
    client = CommandLine(load_settings({}), {})
    yield client
    client("rm", "--all")
    systemctl("stop", "stoker.socket", "stoker.service", "stoker.slice")
    shutil.rmtree(drop_in)
    for unit in UNITS.iterdir():
        (INSTALLED / unit.name).unlink()
    systemctl("daemon-reload")
    systemctl("reset-failed")


def test_the_first_client_starts_the_daemon(service: CommandLine) -> None:
    assert systemctl("is-active", "stoker.service", check=False) == "inactive"
    listed = patiently(service, "ls")
    assert (listed.code, listed.text) == (0, ""), listed.error
    assert systemctl("is-active", "stoker.service") == "active"
    status = service("daemon", "status")
    assert status.code == 0 and shown("stoker.service", "MainPID") in status.text


def test_who_may_use_the_socket(service: CommandLine) -> None:
    """Members of group stoker may, nobody else."""
    assert patiently(service, "ls").code == 0
    status = SOCKET.stat()
    assert (status.st_mode & 0o777, status.st_gid) == (0o660, 990)
    environment = {"STOKER_URL": f"unix://{SOCKET}", "HOME": "/nonexistent", "PATH": os.environ["PATH"]}

    def as_nobody(groups: str) -> subprocess.CompletedProcess[str]:
        argv = ["setpriv", "--reuid", "65534", "--regid", "65534", groups, "stoker", "ls"]
        return subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)

    assert as_nobody("--groups=990").returncode == 0
    refused = as_nobody("--clear-groups")
    assert refused.returncode == 125 and "Permission denied" in refused.stderr and "Traceback" not in refused.stderr


def _lines(service: CommandLine, sandbox: str, process: str) -> list[str]:
    done = service("logs", "-p", process, sandbox)
    assert done.code == 0, done.error
    return done.text.splitlines()


def _vmm(service: CommandLine, sandbox: str) -> int:
    """The machine's process."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"qemu-system" in words[0] and sandbox.encode() in b" ".join(words):
                return int(entry.name)
    raise AssertionError(f"no machine of {sandbox}")


def test_a_machine_survives_the_daemon(service: CommandLine) -> None:
    assert patiently(service, "ls").code == 0
    created = service("create", "--json", "--network", "none", "debian:12")
    assert created.code == 0, created.error
    sandbox = json.loads(created.text)["id"]
    started = service("exec", "-d", sandbox, "--", "sh", "-c", COUNT)
    assert started.code == 0, started.error
    process, machine, daemon = started.text.strip(), _vmm(service, sandbox), shown("stoker.service", "MainPID")

    systemctl("restart", "stoker.service")
    assert shown("stoker.service", "MainPID") != daemon
    assert patiently(service, "ls").code == 0
    _goes_on(service, sandbox, process, machine)

    systemctl("stop", "stoker.service")  # its socket listens on: the next client starts it again
    assert systemctl("is-active", "stoker.service", check=False) == "inactive"
    assert _vmm(service, sandbox) == machine
    assert patiently(service, "ls").code == 0
    _goes_on(service, sandbox, process, machine)

    assert service("rm", sandbox).code == 0
    assert not Path(f"/proc/{machine}").exists()


def _goes_on(service: CommandLine, sandbox: str, process: str, machine: int) -> None:
    """The machine is the same, and its process lost no line and writes more."""
    assert json.loads(service("inspect", sandbox).text)[0]["state"] == "running"
    assert _vmm(service, sandbox) == machine
    before = _lines(service, sandbox, process)
    deadline = time.monotonic() + 60
    while len(after := _lines(service, sandbox, process)) <= len(before):
        assert time.monotonic() < deadline, "the process writes no more"
        time.sleep(0.5)
    assert after == [f"line {number}" for number in range(len(after))]
