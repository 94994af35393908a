"""The SDK and the words of the command line on a real guest, with the daemon that they start themselves."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pty
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from command_line import CommandLine
from engine_fixtures import own_data
from leaks import processes, wait_gone
from stoker import (
    AsyncClient,
    AsyncSandbox,
    Client,
    CommandNotExecutable,
    CommandNotFound,
    CommandTimeout,
    Conflict,
    DeadlineExceeded,
    NotFound,
    Sandbox,
    StokerError,
)
from stoker.settings import load_settings

pytestmark = [pytest.mark.timeout(600)]
MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(session_root: Path, data_dir: Path, accelerator: str) -> Iterator[CommandLine]:
    """A daemon's directories for all of this module; whoever comes first starts the daemon."""
    directory = Path(tempfile.mkdtemp(prefix="sdk", dir=session_root))
    (directory / "run").mkdir(mode=0o755)
    base = replace(load_settings({"STOKER_CONFIG": "/nonexistent"}, root=os.geteuid() == 0), data_dir=data_dir, parked=0)
    settings = replace(own_data(base, directory), run_dir=directory / "run", accel=accelerator)
    env = {
        "STOKER_DATA_DIR": str(settings.data_dir),
        "STOKER_RUN_DIR": str(settings.run_dir),
        "STOKER_ACCEL": accelerator,
        "STOKER_CONFIG": "/nonexistent/stoker.toml",
    }
    before = {name: os.environ.get(name) for name in (*env, "STOKER_URL", "STOKER_API_KEY")}
    os.environ.update(env)
    for name in ("STOKER_URL", "STOKER_API_KEY"):
        os.environ.pop(name, None)
    stoker = CommandLine(settings, env)
    yield stoker
    stoker("rm", "--all")
    assert stoker("daemon", "stop").code == 0
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    assert not wait_gone(lambda: [str(process) for process in processes(directory)])
    assert not list((settings.run_dir / "sandboxes").iterdir()) and not list((settings.data_dir / "pool" / "clones").iterdir())


@pytest.fixture(scope="module")
def box(home: CommandLine) -> Iterator[Sandbox]:
    with Sandbox.create("debian:12", name="web", memory="512M", env={"COLOUR": "green"}, labels={"team": "a"}) as box:
        yield box


@pytest.fixture
def stoker(home: CommandLine, box: Sandbox) -> CommandLine:
    return home


# -- the SDK ----------------------------------------------------------------------------------------------------------


def test_the_promise_of_the_issue(home: CommandLine) -> None:
    with Sandbox.create("debian:12", memory="512M") as box:
        box.files.write("/srv/a.py", "print(6*7)")
        assert box.commands.run("python3 /srv/a.py || perl -e 'print 42'").stdout.strip() == "42"
        server = box.commands.start("sleep 600", tag="server")
        with Client() as other:
            found = Sandbox.connect(box.id, client=other).commands.connect("server")
            assert found.id == server.id and found.info.running
    with pytest.raises(NotFound):
        Sandbox.connect(box.id)


def test_what_a_command_gets(box: Sandbox) -> None:
    done = box.commands.run("echo $COLOUR $SIZE; pwd; id -un; exit 3", env={"SIZE": "l"}, cwd="/tmp", user="nobody")
    assert (done.stdout, done.exit_code) == ("green l\n/tmp\nnobody\n", 3)
    assert 0 < done.duration < 60
    assert box.commands.run("kill -TERM $$").exit_code == 143
    assert box.commands.run(["cat"], input="grüße\n").stdout == "grüße\n"
    with pytest.raises(CommandNotFound):
        box.commands.run(["no-such-program"])
    with pytest.raises(CommandNotExecutable):
        box.commands.run(["/etc/passwd"])
    with pytest.raises(StokerError, match="nobody-knows"):
        box.commands.run("true", user="nobody-knows")
    with pytest.raises(StokerError, match="/no/where"):
        box.commands.run("true", cwd="/no/where")
    with pytest.raises(CommandTimeout) as caught:
        box.commands.run("echo begun; sleep 60", timeout=2)
    assert caught.value.result.stdout == "begun\n"
    assert not [p for p in box.commands.list() if p.running], "what ran out of time is gone"


class Zeros:
    """So many zeros, as an open file."""

    def __init__(self, size: int) -> None:
        self.left = size

    def read(self, size: int = -1) -> bytes:
        size = min(size, self.left)
        self.left -= size
        return bytes(size)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def through(box: Sandbox, size: int) -> tuple[float, float]:
    """Megabytes a second into a command and out of one; nothing is lost, and this process does not grow with it."""
    before = peak()
    began = time.monotonic()
    wanted = hashlib.sha256()
    for _ in range(size // MIB):
        wanted.update(bytes(MIB))
    hashing = time.monotonic() - began
    began = time.monotonic()
    assert box.commands.run("wc -c", input=Zeros(size)).stdout.strip() == str(size)  # type: ignore[arg-type]
    into = size / 1e6 / (time.monotonic() - began)
    process = box.commands.start(["head", "-c", str(size), "/dev/zero"])
    began = time.monotonic()
    found, end = hashlib.sha256(), 0
    for piece in process.pieces():
        assert piece.lost == 0 or end == 0
        end = piece.offset + len(piece.data)
        found.update(piece.data)
    assert end == size
    assert peak() - before < 64 * MIB
    return into, size / 1e6 / max(0.001, time.monotonic() - began - hashing)


def test_streams_lose_nothing(box: Sandbox) -> None:
    through(box, 32 * MIB)


@pytest.mark.full
def test_a_gibibyte_through_a_command_and_through_files(box: Sandbox, tmp_path: Path) -> None:
    through(box, 1024 * MIB)
    before = peak()
    big = tmp_path / "big"
    with open(big, "wb") as file:
        file.truncate(1024 * MIB)
    with Sandbox.create("debian:12", disk="4G") as large:
        large.files.upload(big, "/root/big")
        large.files.download("/root/big", tmp_path / "back")
    assert (tmp_path / "back").stat().st_size == 1024 * MIB
    assert peak() - before < 64 * MIB


def test_many_at_once(box: Sandbox, request: pytest.FixtureRequest) -> None:
    many = 200 if request.config.getoption("--full") else 40

    async def main() -> list[str]:
        async with AsyncClient() as client:
            there = await AsyncSandbox.connect("web", client=client)
            results = await asyncio.gather(
                *(there.commands.run(f"echo {i}; sleep 0.1; echo {i}", on_stdout=lambda text: None) for i in range(many))
            )
        return [result.stdout for result in results]

    assert asyncio.run(main()) == [f"{i}\n{i}\n" for i in range(many)]


def test_a_process_outlives_the_daemon_and_its_reader_goes_on(home: CommandLine, box: Sandbox) -> None:
    process = box.commands.start("i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo line $i; sleep 0.1; done", tag="lines")
    client = Client()
    first = client.version().pid
    seen = bytearray()
    killed = False
    for piece in process:
        assert piece.lost == 0
        seen += piece.data
        if not killed and b"line 5\n" in seen:
            os.kill(first, signal.SIGKILL)
            killed = True
    assert killed and bytes(seen) == b"".join(b"line %d\n" % n for n in range(1, 61))
    assert process.wait().stdout_bytes == bytes(seen)
    assert client.version().pid != first
    client.close()


def test_a_terminal(box: Sandbox) -> None:
    shell = box.pty.create(["/bin/sh"], rows=30, cols=90)
    text = bytearray()
    shell.send_stdin("stty size; stty -echo; echo rea''dy\n")
    resized = False
    for piece in shell:
        text += piece.data
        if b"ready\r\n" in text and not resized:
            resized = True
            shell.resize(40, 100)
            shell.send_stdin("stty size; exit 5\n")
    assert b"30 90" in text and b"40 100" in text
    assert shell.wait().exit_code == 5


def tree(top: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        status = path.lstat()
        content: object = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(top))] = (content, status.st_mode & 0o777 if not path.is_symlink() else 0)
    return found


def make_tree(top: Path) -> None:
    (top / "a/b").mkdir(parents=True)
    (top / "a/b/file").write_bytes(os.urandom(300_000))
    (top / "a/run").write_text("#!/bin/sh\n")
    (top / "a/run").chmod(0o755)
    (top / "link").symlink_to("a/run")
    (top / "empty").mkdir()
    (top / "naïve name").write_text("x")


def test_trees_there_and_back(box: Sandbox, tmp_path: Path) -> None:
    make_tree(tmp_path / "up")
    seen: list[int] = []
    box.files.upload(tmp_path / "up", "/srv/tree", on_progress=seen.append)
    box.files.download("/srv/tree", tmp_path / "down")
    assert tree(tmp_path / "down") == tree(tmp_path / "up") and seen[-1] > 300_000
    assert box.commands.run(["/srv/tree/a/run"]).exit_code == 0
    entries = {entry.path: entry for entry in box.files.list("/srv/tree", depth=5)}
    assert entries["/srv/tree/link"].target == "a/run" and entries["/srv/tree/a/run"].mode == 0o755


def test_a_hostile_tree_writes_nothing_outside(box: Sandbox, tmp_path: Path) -> None:
    box.commands.run(f"mkdir -p /srv/evil && ln -s {tmp_path} /srv/evil/out", check=True)
    with pytest.raises(StokerError) as caught:
        box.files.download("/srv/evil", tmp_path / "down")
    assert caught.value.code == "unsafe_archive"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["down"]


def test_a_watch(box: Sandbox) -> None:
    box.files.mkdir("/srv/w/deep")
    with box.files.watch("/srv/w", recursive=True) as changes:
        box.commands.run("echo 1 > /srv/w/deep/new", check=True)
        assert any(change.path == "/srv/w/deep/new" for change, _ in zip(changes, range(8), strict=False))


def test_states_and_what_each_allows(box: Sandbox) -> None:
    assert box.freeze().state == "frozen"
    with pytest.raises(Conflict) as caught:
        box.commands.run("true")
    assert caught.value.code == "wrong_state" and "thaw" in caught.value.hint
    assert box.thaw().state == "running"
    assert box.commands.run("echo on").stdout == "on\n"
    assert box.ping() < 10
    with pytest.raises(DeadlineExceeded):
        box.wait("stopped", timeout=0.2)


def test_stopped_and_started_it_has_its_disk(home: CommandLine) -> None:
    with Sandbox.create("debian:12") as box:
        box.files.write("/root/kept", "still here")
        assert box.stop(grace=5).state == "stopped"
        assert box.start().state == "running"
        assert box.files.read_text("/root/kept") == "still here"


def test_a_timeout_ends_a_sandbox(home: CommandLine) -> None:
    box = Sandbox.create("debian:12")
    box.set_timeout("1s")
    began = time.monotonic()
    box.wait(timeout=60)
    assert time.monotonic() - began < 30
    assert not box.kill()


def test_metrics_logs_events(box: Sandbox) -> None:
    deadline = time.monotonic() + 20
    while not (samples := box.metrics(window=60).samples) or samples[-1].memory_guest_used is None:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert samples[-1].memory_host > 0 and samples[-1].memory_guest_total
    with box.events(after=0) as events:
        assert next(iter(events)).sandbox == box.id
    box.commands.run("echo hello > /dev/console", check=True)
    deadline = time.monotonic() + 10
    while "hello" not in box.logs():
        assert time.monotonic() < deadline
        time.sleep(0.2)


# -- the command line -------------------------------------------------------------------------------------------------


def test_words_on_a_real_sandbox(stoker: CommandLine, tmp_path: Path) -> None:
    row = stoker("ls", "--label", "team=a").text.split("\t")
    assert row[0] == "web" and row[2] == "running"
    done = stoker("exec", "web", "--", "sh", "-c", "cat; echo err >&2; exit 9", input=b"in\n")
    assert (done.code, done.text, done.error) == (9, "in\n", "err\n")
    make_tree(tmp_path / "src")
    assert stoker("cp", str(tmp_path / "src"), "web:/srv").code == 0
    assert stoker("cp", "web:/srv/src", str(tmp_path / "back")).code == 0
    assert tree(tmp_path / "back") == tree(tmp_path / "src")
    assert stoker("cp", "web:/etc/hostname", "-").text == "web\n"
    done = stoker("exec", "-d", "--tag", "job", "web", "--", "sh", "-c", "echo begun; sleep 300")
    assert done.code == 0
    found = json.loads(stoker("ps", "--json", "web").text)
    assert [p["tag"] for p in found if p["running"]] == ["job"]
    assert stoker("kill", "web", "job").code == 0
    assert stoker("wait", "web", "--process", "job").code == 143
    assert "begun" in stoker("logs", "web", "--process", "job").text
    assert json.loads(stoker("top", "--json").text)[0]["name"] == "web"
    assert json.loads(stoker("inspect", "web").text)[0]["versions"]["agent"]
    done = stoker("create", "debian:12", "--name", "web")
    assert done.code == 125 and "name_taken" in done.error


def test_a_terminal_on_the_command_line(stoker: CommandLine) -> None:
    master, slave = pty.openpty()
    process = stoker.popen("exec", "-it", "web", "sh", stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    seen = bytearray()

    def read() -> None:
        try:
            while data := os.read(master, 65536):
                seen.extend(data)
        except OSError:
            pass  # the other side has closed

    reader = threading.Thread(target=read)
    reader.start()

    def until(text: bytes) -> None:
        deadline = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline, bytes(seen)
            time.sleep(0.05)

    until(b"# ")
    os.write(master, b"tty && stty -echo && echo rea''dy\n")
    until(b"ready\r\n")
    os.write(master, b"sleep 100\n")
    time.sleep(0.5)
    os.write(master, b"\x03")
    os.write(master, b"echo after $?; exit 6\n")
    until(b"after 130")
    assert process.wait(60) == 6
    os.close(master)
    reader.join(10)


def test_following_a_console(stoker: CommandLine, box: Sandbox) -> None:
    process = stoker.popen("logs", "-f", "web")
    assert process.stdout is not None
    time.sleep(1)
    box.commands.run("echo marker-on-console > /dev/console", check=True)
    deadline = time.monotonic() + 30
    seen = b""
    while b"marker-on-console" not in seen:
        assert time.monotonic() < deadline
        seen += os.read(process.stdout.fileno(), 65536)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_a_run_that_is_killed_leaves_nothing(stoker: CommandLine) -> None:
    process = stoker.popen("run", "debian:12", "--", "sh", "-c", "echo up; sleep 600")
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    assert len(json.loads(stoker("ls", "--json").text)) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while len(json.loads(stoker("ls", "--json").text)) != 1:
        assert time.monotonic() < deadline


def test_ls_is_quick(stoker: CommandLine) -> None:
    times = []
    for _ in range(5):
        began = time.monotonic()
        assert stoker("ls", env={"PYTHONDONTWRITEBYTECODE": ""}).code == 0
        times.append(time.monotonic() - began)
    # 0.2 s is the goal; a busy host with two processors gets a little more before this fails.
    assert min(times) < 0.5, times
