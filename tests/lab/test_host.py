"""The lab is what the tests there take it for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

BOTH = pytest.mark.lab("stable", "next")

NEEDED = "dm_mod dm_snapshot loop xfs btrfs wireguard 8021q kvm_amd vhost_vsock".split()


def _say(*argv: str) -> str:
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout


@BOTH
def test_systemd_is_process_1_and_the_agent_lives_beside_it() -> None:
    assert os.readlink("/proc/1/exe").endswith("/systemd")
    assert Path("/proc/self/cgroup").read_text().strip() == "0::/stoker-agent"
    assert _say("systemctl", "is-system-running").strip() == "running", _say("systemctl", "--failed", "--no-pager")


@BOTH
def test_systemd_is_as_new_as_the_flavour_promises(flavour: str) -> None:
    version = int(_say("systemctl", "--version").split()[1].partition(".")[0].partition("~")[0])
    assert version >= (258 if flavour == "next" else 257)


@BOTH
@pytest.mark.parametrize("module", NEEDED)
def test_the_kernel_has(module: str) -> None:
    assert subprocess.run(["modprobe", module], check=False).returncode == 0


@BOTH
def test_there_is_kvm() -> None:
    assert os.access("/dev/kvm", os.R_OK | os.W_OK)


@pytest.mark.lab("next")
def test_systemd_can_start_machines_itself() -> None:
    assert _say("systemd-vmspawn", "--version").startswith("systemd ")
