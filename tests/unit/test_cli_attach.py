"""The pumps between a process and our own standard streams, with processes of this host in the guest's place."""

from __future__ import annotations

import hashlib
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

HELPER = [sys.executable, str(Path(__file__).with_name("local_attach.py"))]
READY = 20.0


def run(*words: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*HELPER, *words], timeout=60, **{"capture_output": True, "stdin": subprocess.DEVNULL, **options})  # type: ignore[call-overload,no-any-return]


def read_until(fd: int, wanted: bytes) -> bytes:
    seen, deadline = b"", time.monotonic() + READY
    while wanted not in seen:
        left = deadline - time.monotonic()
        assert left > 0 and select.select([fd], [], [], left)[0], f"{wanted!r} did not come, only {seen!r}"
        seen += os.read(fd, 65536)
    return seen


def test_streams_stay_apart_and_the_code_comes_back() -> None:
    done = run("sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_death_by_signal_is_128_and_its_number() -> None:
    assert run("sh", "-c", "kill -9 $$").returncode == 137


@pytest.mark.parametrize("kind", ["pipe", "file", "socket"])
def test_megabytes_pass_through_unchanged(kind: str, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 24
    if kind == "pipe":
        done = run("-i", "cat", stdin=None, input=data)
        result = done.stdout
    elif kind == "file":
        source, target = tmp_path / "in", tmp_path / "out"
        source.write_bytes(data)
        with open(source, "rb") as reader, open(target, "wb") as writer:
            done = run("-i", "cat", stdin=reader, stdout=writer, stderr=subprocess.PIPE, capture_output=False)
        result = target.read_bytes()
    else:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen([*HELPER, "cat", "/dev/stdin"], stdin=subprocess.DEVNULL, stdout=theirs)
            theirs.close()
            process.wait(30)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(
                [*HELPER, "head", "-c", str(len(data)), "/dev/zero"], stdin=subprocess.DEVNULL, stdout=theirs
            )
            theirs.close()
            result = b""
            while chunk := ours.recv(1 << 20):
                result += chunk
            assert process.wait(30) == 0
        assert result == bytes(len(data))
        return
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(result).digest() == hashlib.sha256(data).digest()


def test_what_we_were_given_is_not_made_non_blocking() -> None:
    """A shell reads the same terminal after us: a stray O_NONBLOCK there makes it quit."""
    reader, writer = os.pipe()
    try:
        assert run("-i", "true", stdin=reader, stdout=writer, stderr=writer, capture_output=False).returncode == 0
        assert os.get_blocking(reader) and os.get_blocking(writer)
    finally:
        os.close(reader)
        os.close(writer)


def test_closed_stdin_is_an_empty_one() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 0<&-', "sh", *HELPER, "wc", "-c"], capture_output=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert done.stdout.strip() == b"0"


def test_a_reader_that_goes_ends_the_command() -> None:
    process = subprocess.Popen([*HELPER, "yes"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(2) == b"y\n"
    process.stdout.close()
    assert process.wait(READY) == 128 + signal.SIGPIPE


def test_a_command_that_ignores_sigpipe_is_given_up() -> None:
    process = subprocess.Popen(
        [*HELPER, "sh", "-c", "trap '' PIPE; while :; do echo y; done"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(2)
    process.stdout.close()
    assert process.wait(READY) == 128 + signal.SIGPIPE


def test_a_slow_reader_makes_the_command_wait() -> None:
    """Memory stays bounded because nothing is read ahead of what our own reader takes."""
    with subprocess.Popen([*HELPER, "cat", "/dev/zero"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.read(1)
            time.sleep(1.0)
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident = int(status.split("VmRSS:")[1].split()[0])
            assert resident < 80 * 1024, f"{resident} KiB resident"
        finally:
            process.terminate()
            # The reader is still slow, and yet we end: the user asked for it.
            assert process.wait(READY) == 143


def test_a_full_disk_is_an_error_of_ours() -> None:
    with open("/dev/full", "wb") as full:
        done = run("echo", "x", stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert (done.returncode, done.stderr) == (125, b"output_failed\n")


def test_a_stdin_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as write_only:
        done = run("-i", "cat", stdin=write_only)
    assert (done.returncode, done.stderr) == (125, b"input_failed\n")


def test_time_up_is_124_even_for_who_does_not_listen() -> None:
    began = time.monotonic()
    assert run("--timeout", "0.5", "sleep", "60").returncode == 124
    assert run("--timeout", "0.5", "sh", "-c", "trap '' TERM; while :; do sleep 1; done").returncode == 124
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_passed_on(number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    script = f"trap 'echo got {name}; exit 3' {name}; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen([*HELPER, "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        read_until(process.stdout.fileno(), b"ready")
        process.send_signal(number)
        assert f"got {name}".encode() in process.stdout.read()
        assert process.wait(READY) == 3


def test_the_third_interrupt_gives_up() -> None:
    script = "trap '' INT; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen([*HELPER, "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        read_until(process.stdout.fileno(), b"ready")
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert process.wait(READY) == 130


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (31, 101))
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [*HELPER, *words], stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


def test_a_terminal_is_passed_through_and_restored() -> None:
    terminal = Terminal(
        "-i", "-t", "sh", "-c", "stty size; trap 'echo int' INT; echo ready; until read line; do :; done; echo got $line; stty size"
    )
    try:
        seen = read_until(terminal.master, b"ready")
        assert b"31 101" in seen
        assert not termios.tcgetattr(terminal.slave)[3] & termios.ICANON
        os.write(terminal.master, b"\x03")
        read_until(terminal.master, b"int")
        termios.tcsetwinsize(terminal.slave, (40, 120))
        os.kill(terminal.process.pid, signal.SIGWINCH)
        time.sleep(0.3)
        os.write(terminal.master, b"hello\r")
        seen = read_until(terminal.master, b"got hello")
        if b"40 120" not in seen:
            read_until(terminal.master, b"40 120")
        assert terminal.process.wait(READY) == 0
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()


def test_a_terminal_is_restored_when_we_are_terminated() -> None:
    terminal = Terminal("-i", "-t", "sh", "-c", "echo ready; sleep 60")
    try:
        read_until(terminal.master, b"ready")
        terminal.process.terminate()
        assert terminal.process.wait(READY) == 143
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()
