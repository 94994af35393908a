"""Pools with a file system of their own, from the command line: made, used, mounted again, removed; and the one by itself."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import CommandLine
from engine_fixtures import own_data
from stoker.host import loop
from stoker.host.mounts import mounted_at, umount
from stoker.settings import Settings

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")]
IMAGE = "debian:12"


@pytest.fixture
def own(settings: Settings, short_dir: Path) -> Iterator[Settings]:
    found = own_data(settings, short_dir)
    yield found
    for point in (found.data_dir / "pools").glob("*/"):
        if mounted_at(point) is not None:
            umount(point, lazily=True)


def command_line(own: Settings, pool: str) -> CommandLine:
    words = {"STOKER_DATA_DIR": str(own.data_dir), "STOKER_RUN_DIR": str(own.run_dir), "STOKER_CONFIG": str(own.config_file)}
    return CommandLine(own, {**words, "STOKER_ACCEL": own.accel, "STOKER_POOL": pool})


def test_a_pool_from_its_making_to_its_end(own: Settings) -> None:
    stoker = command_line(own, "main")
    small = stoker("pool", "create", "--size", "1M")
    assert small.code == 125, small.error
    made = stoker("pool", "create", "--size", "2G")
    assert (made.code, made.text) == (0, "main\n"), made.error
    assert stoker("pool", "create", "--size", "2G").code == 125
    point, image = own.data_dir / "pools/main", own.data_dir / "pools/main.xfs"
    assert mounted_at(point) is not None and image.stat().st_blocks * 512 < 200 << 20
    box = stoker("create", IMAGE, "--name", "box", "--memory", "256M")
    assert box.code == 0, box.error
    assert stoker("exec", "box", "--", "sh", "-c", "echo kept > /root/kept; sync").code == 0
    [clone] = (point / "clones").iterdir()
    [info] = json.loads(stoker("inspect", "box").out)
    assert info["pool"] == "main" and clone.name == info["id"]
    told = json.loads(stoker("pool", "inspect").out)
    assert told["disks"] == 1 and told["default"] and told["strategy"] == "qcow2" and isinstance(told["trials"]["reflink"], float)
    refused = stoker("pool", "rm", "main")
    assert refused.code == 125 and b"box" in refused.error.encode(), refused.error
    # Everything goes but the files, as when the host is started anew.
    assert stoker("stop", "box").code == 0
    assert stoker("daemon", "stop").code == 0
    assert mounted_at(point) is None and loop.find(image) == []
    assert stoker("start", "box").code == 0
    assert mounted_at(point) is not None
    assert stoker("exec", "box", "--", "cat", "/root/kept").text == "kept\n"
    assert stoker("rm", "box").code == 0
    assert stoker("pool", "rm", "main").code == 0
    assert mounted_at(point) is None and not image.exists() and not point.exists()
    assert [row["name"] for row in json.loads(stoker("pool", "ls", "--json").out)] == [""]
    assert stoker("daemon", "stop").code == 0


def test_a_daemon_makes_a_pool_by_itself(own: Settings) -> None:
    stoker = command_line(own, "auto")
    deadline = time.monotonic() + 60
    while [row["name"] for row in json.loads(stoker("pool", "ls", "--json").out)] != ["", "main"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    point = own.data_dir / "pools/main"
    assert mounted_at(point) is not None
    # Unmounted underneath: told, and nothing is written below.
    umount(point, lazily=True)
    lost = stoker("create", IMAGE, "--memory", "256M")
    assert lost.code == 125 and "unmounted" in lost.error, lost.error
    assert list(point.iterdir()) == []
    assert "unmounted" in stoker("rm", "--all").error, "what cannot be removed now is not forgotten"
    assert stoker("daemon", "stop").code == 0
    assert [row["mounted"] for row in json.loads(stoker("pool", "ls", "--json").out)] == [True, True]
    assert json.loads(stoker("ls", "--json").out) == []
    assert stoker("pool", "rm", "main").code == 0
    assert stoker("daemon", "stop").code == 0
