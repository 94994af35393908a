"""What a guest reaches through the user network: the internet and the resolver, and nothing that is the host's.

In namespaces of the test's own (``tests/network_lab.py``).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from network_lab import PORT
from stoker.settings import Settings
from vmm_guest import build_probe, probe_initrd, probe_kernel

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and ip to make network namespaces"),
]

LAB = Path(__file__).parent.parent / "network_lab.py"
ALLOWED = {
    f"tcp:1.1.1.1:{PORT}": "internet/tcp",
    f"udp:1.1.1.1:{PORT}": "internet/udp",
    "tcp:10.0.2.3:53": "resolver/tcp",
    "udp:10.0.2.3:53": "resolver/udp",
}
LOOPBACK = (
    "tcp:10.0.2.2:8080",
    "udp:10.0.2.2:8080",
    "tcp:10.0.2.77:8080",
    "tcp:10.0.2.3:8080",
    "udp:10.0.2.3:8080",
    "tcp:10.0.2.2:53",
)
"""Each of these is, or has been, the host's 127.0.0.1 to some libslirp."""
OWN = ("tcp:5.5.5.5:8080", "udp:5.5.5.5:8080", "tcp:7.7.7.7:8080")
PRIVATE = tuple(
    f"tcp:{address}:8080" for address in ("10.77.0.1", "192.168.77.1", "172.20.0.1", "100.64.3.1", "169.254.169.254", "10.99.0.1")
)


async def _reach(settings: Settings, directory: Path, kind: str, targets: tuple[str, ...]) -> dict[str, str]:
    """What the guest got from each target, in the little world; with the filter as it is, or ``open``."""
    kernel = await probe_kernel(settings)
    initrd = probe_initrd(kernel, build_probe(directory), directory)
    plan = {
        "kernel": str(kernel.vmlinux),
        "initrd": str(initrd),
        "words": f"probe=reach wait=4000 targets={','.join(targets)}",
        "filter": kind,
    }
    env = {**os.environ, "STOKER_RUN_DIR": str(settings.run_dir), "STOKER_DATA_DIR": str(settings.data_dir)}
    # In a chroot the root is no mount point, and its propagation cannot be changed.
    tried = await asyncio.to_thread(subprocess.run, ["unshare", "--mount", "true"], stderr=subprocess.DEVNULL)
    mount = ["--mount"] if tried.returncode == 0 else ["--mount", "--propagation", "unchanged"]
    argv = ["unshare", "--net", *mount, "--fork", "--kill-child", sys.executable, LAB, directory, json.dumps(plan)]
    done = await asyncio.to_thread(subprocess.run, argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    said = json.loads(done.stdout)
    answers = {}
    for line in said["console"]:
        if line.startswith("reach "):
            _, target, yes, *rest = line.split()
            answers[target] = rest[0] if yes == "yes" else ""
    assert set(answers) == set(targets), said
    return answers


async def test_the_guest_reaches_the_internet_and_nothing_of_the_host(settings: Settings, short_dir: Path) -> None:
    found = await _reach(settings, short_dir, "closed", (*ALLOWED, *LOOPBACK, *OWN, *PRIVATE))
    assert found == {**ALLOWED, **dict.fromkeys((*LOOPBACK, *OWN, *PRIVATE), "")}


async def test_without_the_filter_all_of_it_would_be_open(settings: Settings, short_dir: Path) -> None:
    """The other test's proof: the services are there, the probe finds them, and it is the filter that makes the difference."""
    found = await _reach(settings, short_dir, "open", (*ALLOWED, "tcp:10.0.2.2:8080", *OWN, *PRIVATE))
    assert found["tcp:10.0.2.2:8080"] == found["tcp:5.5.5.5:8080"] == "host/tcp"
    assert found["tcp:10.99.0.1:8080"] == "private/tcp"
    assert [found[target] for target in PRIVATE[:-1]] == ["host/tcp"] * (len(PRIVATE) - 1)
