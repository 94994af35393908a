"""Looking after a host that has real machines: the store's users, the check, and what it does about a machine nobody knows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import CommandLine
from crashing import machines
from engine_fixtures import own_data
from stoker.images.inventory import KINDS, find
from stoker.images.store import Store
from stoker.settings import Settings

pytestmark = pytest.mark.timeout(600)
IMAGE = "debian:12"


@pytest.fixture
def own(settings: Settings, short_dir: Path) -> Settings:
    """A store of the test's own: removing from it takes nothing from the session's."""
    own = own_data(settings, short_dir)
    store, theirs = Store(own), Store(settings)
    for name in ("images", "kernels", "staging"):
        (own.data_dir / name).unlink()
    for kind in KINDS:
        found, _ = find(theirs, kind, IMAGE)
        # Not by hard links: those change the times of the session's files, and all of them would be hashed again.
        subprocess.run(["cp", "-a", "--sparse=always", theirs.entry(kind, found.digest), store.directory(kind)], check=True)
        store.point(kind, "debian-bookworm", found.digest)
    return own


@pytest.fixture
def stoker(own: Settings) -> Iterator[CommandLine]:
    directories = {"STOKER_DATA_DIR": str(own.data_dir), "STOKER_RUN_DIR": str(own.run_dir), "STOKER_CONFIG": str(own.config_file)}
    command = CommandLine(own, {**directories, "STOKER_ACCEL": own.accel})
    yield command
    if command("daemon", "status").code == 0:
        command("rm", "--all")
        command("daemon", "stop")


def test_a_host_with_a_machine(own: Settings, stoker: CommandLine) -> None:
    made = stoker("create", IMAGE, "--name", "box", "--memory", "256M")
    assert made.code == 0, made.error
    [image] = json.loads(stoker("image", "ls", "--json").out)
    [kernel] = json.loads(stoker("kernel", "ls", "--json").out)
    assert image["used_by"] == kernel["used_by"] == ["box"]
    assert 0 < image["disk"] < image["size"] and kernel["release"] in stoker("exec", "box", "--", "uname", "-r").text
    for word in ("image", "kernel"):
        refused = stoker(word, "rm", IMAGE)
        assert refused.code == 125 and f"{word}_in_use" in refused.error and "box" in refused.error
    assert json.loads(stoker("gc", "--dry-run", "--json").out)["items"] == []
    clean = stoker("fsck", "--json")
    assert clean.code == 0, clean.text
    report = json.loads(clean.out)
    assert report["differences"] == [] and report["checked"]["process"] == 2
    # The daemon is gone for good, and takes its knowledge of the sandbox along: a machine that nobody knows.
    sandbox = json.loads(stoker("inspect", "box").out)[0]["id"]
    os.kill(json.loads(stoker("daemon", "status", "--json").out)["pid"], signal.SIGKILL)
    for database in own.data_dir.glob("stoker.db*"):
        database.unlink()
    assert machines(own.run_dir) == {sandbox}
    told = stoker("fsck", "--offline", "--json")
    report = json.loads(told.out)
    assert told.code == 1 and machines(own.run_dir) == {sandbox}
    assert sorted(one["kind"] for one in report["differences"]) == ["clone", "directory", "process"], report
    assert {one["sandbox"] for one in report["differences"]} == {sandbox}
    mended = stoker("fsck", "--offline", "--repair")
    assert mended.code == 0, mended.text
    assert machines(own.run_dir) == set() and list((own.data_dir / "pool/clones").iterdir()) == []
    assert stoker("fsck", "--json").code == 0
    # Nobody uses them any more.
    for word in ("image", "kernel"):
        done = stoker(word, "rm", IMAGE)
        assert done.code == 0, done.error
    assert stoker("image", "ls").text == stoker("kernel", "ls").text == ""
