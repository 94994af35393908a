"""``stoker run`` with real guests: streams, codes, signals, the terminal, bad luck, and what is left behind."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import CommandLine
from leaks import processes

BASE = "debian:12"


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def machines(stoker: CommandLine) -> list[str]:
    """Command lines of the VMMs and supervisors of this test's sandboxes."""
    return [
        str(p)
        for p in processes(stoker.settings.run_dir / "sandboxes")
        if any("qemu" in word or "shim" in word for word in p.words[:1])
    ]


def sandboxes(stoker: CommandLine) -> list[str]:
    """What the daemon says there is."""
    return [box["id"] for box in json.loads(stoker("ls", "--json").out)]


def test_the_first_promise(stoker: CommandLine) -> None:
    done = stoker("run", BASE, "--", "sh", "-c", "uname -r; cat /etc/os-release; id; echo oops >&2; exit 7")
    assert done.code == 7, done.error
    assert "cloud-amd64" in done.text and "VERSION_CODENAME=bookworm" in done.text and "uid=0(root)" in done.text
    assert done.error == "oops\n"


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["no-such-command"], 127, "[no_such_command]"),
        (["/etc/passwd"], 126, "[not_executable]"),
        (["sh", "-c", "kill -9 $$"], 137, ""),
        (["sh", "-c", "kill -TERM $$"], 143, ""),
    ],
)
def test_exit_codes(stoker: CommandLine, command: list[str], code: int, said: str) -> None:
    done = stoker("run", "--network", "none", BASE, "--", *command)
    assert (done.code, done.out) == (code, b"")
    assert said in done.error and "Traceback" not in done.error


def test_options_reach_the_guest(stoker: CommandLine, tmp_path: Path) -> None:
    env_file = tmp_path / "env"
    env_file.write_text("FROM_FILE=1\nBOTH=file\n")
    words = [
        "--cpus",
        "2",
        "--memory",
        "300M",
        "--disk",
        "3G",
        "--env-file",
        str(env_file),
        "--env",
        "BOTH=word",
        "--user",
        "nobody",
    ]
    words += ["--workdir", "/usr/lib", "--hostname", "ember"]
    script = "echo $FROM_FILE $BOTH; pwd; id -un; uname -n; nproc; grep MemTotal /proc/meminfo; df -k / | tail -1; cat </dev/stdin"
    done = stoker("run", *words, BASE, "--", "sh", "-c", script)
    assert done.code == 0, done.error
    lines = done.text.splitlines()
    assert lines[:5] == ["1 word", "/usr/lib", "nobody", "ember", "2"]
    assert 200_000 < int(lines[5].split()[1]) < 300 * 1024
    assert int(lines[6].split()[1]) > 2_500_000


def test_time_up_is_124(stoker: CommandLine) -> None:
    done = stoker(
        "run", "--network", "none", "--timeout", "1", BASE, "--", "sh", "-c", "trap '' TERM; echo in; while :; do sleep 1; done"
    )
    assert (done.code, done.out) == (124, b"in\n")


@pytest.mark.timeout(1800)
def test_a_pipe_through_the_guest_loses_nothing(stoker: CommandLine, request: pytest.FixtureRequest) -> None:
    """1 GiB with --full. The process that carries it stays small, however much passes."""
    size = (1 << 30) if request.config.getoption("--full") else 48 << 20
    block = os.urandom(1 << 20)
    with stoker.popen("run", "--network", "none", BASE, "--", "cat", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        feeder = concurrent.futures.ThreadPoolExecutor(1)

        def feed() -> str:
            assert process.stdin is not None
            sent = hashlib.sha256()
            for _ in range(size // len(block)):
                process.stdin.write(block)
                sent.update(block)
            process.stdin.close()
            return sent.hexdigest()

        sent = feeder.submit(feed)
        seen, count, peak = hashlib.sha256(), 0, 0
        while data := process.stdout.read(1 << 20):
            seen.update(data)
            count += len(data)
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM:" in status else 0)
        assert process.wait(60) == 0
        assert (count, seen.hexdigest()) == (size, sent.result())
        assert peak < 120 * 1024, f"{peak} KiB resident"
        assert process.stderr is not None
        process.stderr.close()


def test_a_reader_that_goes_ends_the_command(stoker: CommandLine) -> None:
    with stoker.popen("run", "--network", "none", BASE, "--", "yes") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(2) == b"y\n"
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == b""


def test_signals_go_to_the_command(stoker: CommandLine) -> None:
    script = "trap 'echo got it; exit 5' INT; echo ready; while :; do sleep 0.1; done"
    with stoker.popen("run", "--network", "none", BASE, "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b"got it\n"
        assert process.wait(30) == 5


class Terminal:
    """A command line on a terminal of its own."""

    def __init__(self, stoker: CommandLine, *words: str) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (33, 99))
        self.before = termios.tcgetattr(self.slave)
        streams = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave, "start_new_session": True}
        self.process = stoker.popen(*words, env={"TERM": "xterm-256color"}, **streams)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def until(self, wanted: bytes, seconds: float = 120.0) -> bytes:
        seen, deadline = b"", time.monotonic() + seconds
        while wanted not in seen:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.master], [], [], left)[0], f"{wanted!r} did not come, only {seen!r}"
            seen += os.read(self.master, 65536)
        return seen

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_a_real_terminal(stoker: CommandLine) -> None:
    with Terminal(stoker, "run", "--quiet", "-it", BASE, "--", "bash", "--norc") as terminal:
        terminal.until(b"# ")
        terminal.type("tty; stty size; echo $TERM; sleep 100\r")
        seen = terminal.until(b"xterm-256color\r\n")
        assert b"/dev/pts/" in seen and b"33 99" in seen
        # A shell that is just starting its command may keep an interrupt for itself.
        time.sleep(1.0)
        terminal.type("\x03")
        terminal.until(b"# ")
        termios.tcsetwinsize(terminal.slave, (44, 111))
        os.kill(terminal.process.pid, signal.SIGWINCH)
        terminal.type("sleep 0.5; stty size\r")
        terminal.until(b"44 111")
        terminal.type("exit 9\r")
        assert terminal.process.wait(60) == 9
        assert termios.tcgetattr(terminal.slave) == terminal.before


def test_killed_at_once_it_leaves_no_machine(stoker: CommandLine) -> None:
    """SIGKILL while it boots, and while its command runs: within a second there is no VMM, and the daemon knows of none."""
    for moment in ("boot", "command"):
        process = stoker.popen("run", "--network", "none", BASE, "--", "sh", "-c", "echo in; sleep 600")
        assert process.stdout is not None and process.stderr is not None
        if moment == "boot":
            assert until(lambda: bool(machines(stoker)))
        else:
            assert process.stdout.readline() == b"in\n"
        process.kill()
        process.wait()
        assert until(lambda: not machines(stoker), 1.5), machines(stoker)
        process.stdout.close()
        process.stderr.close()
    assert until(lambda: sandboxes(stoker) == [], 5), sandboxes(stoker)


def test_terminated_while_it_boots(stoker: CommandLine) -> None:
    process = stoker.popen("run", "--network", "none", BASE, "--", "sleep", "600")
    assert until(lambda: bool(machines(stoker)))
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (143, b"", b"")
    assert until(lambda: not machines(stoker), 1.5), machines(stoker)
    assert until(lambda: sandboxes(stoker) == [], 5), sandboxes(stoker)


def test_two_at_once_share_no_disk(stoker: CommandLine) -> None:
    script = "test ! -e /root/mark; echo $0 >/root/mark; sync; sleep 2; cat /root/mark"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda name: stoker("run", "--network", "none", BASE, "--", "sh", "-ec", script, name), "ab"))
    assert [(done.code, done.out) for done in results] == [(0, b"a\n"), (0, b"b\n")]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["nosuchimage"], "image_unknown"),
        (["ext4:/nonexistent"], ""),
        (["--memory", "32M", BASE], "memory_too_small"),
        (["--disk", "1M", BASE], "disk_too_small"),
        (["--kernel", "/nonexistent", BASE], ""),
        (["--kernel", "/etc/passwd", BASE], ""),
    ],
)
def test_what_cannot_work_is_refused_at_once(stoker: CommandLine, words: list[str], code: str) -> None:
    began = time.monotonic()
    done = stoker("run", *words, "--", "true")
    assert (done.code, done.out) == (125, b"")
    # Work that began is told of in lines of its own; the error is one.
    [error] = [line for line in done.error.splitlines() if line.endswith("]")]
    assert error.startswith("stoker: ") and (code or "_") in error.rpartition("[")[2]
    assert time.monotonic() - began < 10


def test_without_qemu_it_says_what_to_install(stoker: CommandLine) -> None:
    done = stoker("run", BASE, "--", "true", env={"STOKER_QEMU": "/nonexistent/qemu"})
    assert done.code == 125
    assert "qemu" in done.error and "hint: " in done.error and "Traceback" not in done.error


def test_detached_it_goes_on(stoker: CommandLine) -> None:
    done = stoker("run", "-d", "--name", "left", BASE, "--", "sh", "-c", "echo begun; sleep 600")
    assert (done.code, done.text) == (0, "left\n"), done.error
    try:
        assert until(lambda: "begun" in stoker("logs", "-p", "main", "left").text)
        assert stoker("exec", "left", "--", "cat", "/proc/uptime").code == 0
    finally:
        assert stoker("rm", "left").code == 0
    for words, code in ((["--", "no-such-command"], "[no_such_command]"), (["-it", BASE], "without -i and -t")):
        image = [BASE] if words[0] == "--" else []
        done = stoker("run", "-d", *image, *words)
        assert done.code != 0 and code in done.error, done.error
    assert sandboxes(stoker) == []
