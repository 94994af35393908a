"""Tools that fetch and build end with us, and their failures carry their own names."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from stoker.errors import HostError
from stoker.images.tools import run_tied

pytestmark = pytest.mark.anyio
KILLED = """
import asyncio, sys
from stoker.images.tools import run_tied
asyncio.run(run_tied(["sh", "-c", 'echo $$ > "$1"; sleep 60 & sleep 60', "sh", sys.argv[1]]))
"""


async def test_output_and_success() -> None:
    seen: list[str] = []
    done = await run_tied(["sh", "-c", "echo out; echo err >&2"], on_line=seen.append)
    assert (done.code, done.stdout, done.stderr) == (0, b"out\n", b"err\n")
    assert sorted(seen) == ["err", "out"]


async def test_a_failure_names_the_tool_and_not_what_is_in_between() -> None:
    with pytest.raises(HostError) as caught:
        await run_tied(["sh", "-c", "echo went wrong >&2; exit 7"])
    assert (caught.value.code, caught.value.message) == ("tool_failed", "sh exited with 7: went wrong")
    assert caught.value.details["code"] == 7
    assert caught.value.details["argv"][0] == "sh"


async def test_a_missing_tool_comes_with_its_package() -> None:
    with pytest.raises(HostError) as caught:
        await run_tied(["/nonexistent/mke2fs", "x"])
    assert (caught.value.code, caught.value.hint) == ("tool_missing", "apt-get install e2fsprogs")


def test_a_kill_takes_the_tools_children_too(tmp_path: Path) -> None:
    said = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(said)]) as process:
        wait(lambda: said.exists() and said.read_text().strip() != "")
        group = members(int(said.read_text()))
        assert len(group) >= 3, "the shell, and both that sleep"
        process.kill()
    wait(lambda: not any(alive(pid) for pid in group))


def wait(condition: object, seconds: float = 10.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["X"]


def alive(pid: int) -> bool:
    return stat(pid)[0] not in "XZ"


def members(pid: int) -> list[int]:
    """The process group of a process, once its children have started."""
    group = stat(pid)[2]
    deadline = time.monotonic() + 5
    while True:
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        found = [one for one in found if stat(one)[2:3] == [group]]
        if len(found) >= 4 or time.monotonic() > deadline:
            return found
        time.sleep(0.02)
