"""What the agent's own tests stand on: an agent on this host, or the one in a guest, and the list of tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from wire import Failure, Host, unpack

TESTS: list[tuple[Callable[[Any], None], bool]] = []


def test(f: Callable[[Any], None]) -> Callable[[Any], None]:
    """For any agent."""
    TESTS.append((f, True))
    return f


def host_test(f: Callable[[Any], None]) -> Callable[[Any], None]:
    """Only for an agent whose files and processes are this host's."""
    TESTS.append((f, False))
    return f


class Target:
    """An agent, and a directory where it lives."""

    path: str
    directory: str
    slow = 1.0
    many = 2000
    sanitized = False

    def __init__(self) -> None:
        self.hosts: list[Host] = []

    def socket(self) -> socket.socket:
        deadline = time.monotonic() + 10
        while True:
            s = socket.socket(socket.AF_UNIX)
            try:
                s.connect(self.path)
                return s
            except OSError:
                s.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    def connect(self, *, fresh: bool = False) -> Host:
        for host in self.hosts:
            host.sock.close()
        self.hosts = [Host(self.socket(), fresh=fresh, timeout=20 * self.slow)]
        return self.hosts[0]

    def forget_all(self) -> None:
        host = self.connect()
        after = 0
        while True:
            page = host.call("processes", after=after)
            for info in page["processes"]:
                after = info["id"]
                if info["running"]:
                    host.call("signal", id=after, signal=9)
                    host.exit_of(after)
                host.call("forget", id=after)
            if not page["more"]:
                return

    def resident(self) -> int:
        return self.hosts[-1].call("info")["agent"]["resident"]

    def write(self, name: str, data: bytes, mode: int = 0o644) -> None: ...

    def kill(self, pid: int) -> None: ...

    def children(self) -> list[str]: ...

    def descriptors(self) -> list[str]: ...

    def end(self) -> None: ...

    def remove(self) -> None: ...


class Agent(Target):
    """A program on this host."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self.sanitized = b"__asan_init" in Path(program).read_bytes()
        self.slow = 3.0 if self.sanitized else 1.0
        self.directory = tempfile.mkdtemp(prefix="agent-check-")
        self.path = f"{self.directory}/socket"
        env = {
            **os.environ,
            "STOKER_HOOKS": f"{self.directory}/hooks.d",
            "ASAN_OPTIONS": "detect_leaks=1:exitcode=99:quarantine_size_mb=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        self.command = [program, "--socket", self.path]
        self.process = subprocess.Popen(self.command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def write(self, name: str, data: bytes, mode: int = 0o644) -> None:
        Path(f"{self.directory}/{name}").write_bytes(data)
        os.chmod(f"{self.directory}/{name}", mode)

    def kill(self, pid: int) -> None:
        os.kill(pid, 9)

    def descriptors(self) -> list[str]:
        base = f"/proc/{self.process.pid}/fd"
        found = []
        for fd in os.listdir(base):
            try:
                found.append(os.readlink(f"{base}/{fd}"))
            except FileNotFoundError:
                pass
        return found

    def children(self) -> list[str]:
        return Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()

    def end(self) -> None:
        self.forget_all()
        left = [f for f in self.descriptors() if f.startswith("pipe:") or "ptmx" in f]
        # Its stderr is a pipe of ours.
        assert len(left) <= 1, f"descriptors left open: {left}"
        self.hosts[-1].call("shutdown", how="poweroff", grace=1000)
        code = self.process.wait(10)
        assert code == 0, f"the agent ended with {code}:\n{self.complaints()}"

    def complaints(self) -> str:
        assert self.process.stderr is not None
        return "" if self.process.stderr.closed else self.process.stderr.read().decode(errors="replace")

    def again(self) -> None:
        """After a test that ended it."""
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def remove(self) -> None:
        for host in self.hosts:
            host.sock.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()
        subprocess.run(["rm", "-rf", self.directory], check=True)


class Guest(Target):
    """PID 1 of a machine that is booted and configured, by the Unix socket of its channel."""

    slow = 6.0
    many = 200

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.directory = "/tmp/agent-check"
        self.id = 1 << 20
        self.connect()
        # Ids are never used twice: those of the tests are small, and the machine's owner may have used some.
        self.sh(f"mkdir -p {self.directory}")

    def sh(self, script: str, input: bytes | None = None) -> bytes:
        self.id += 1
        done, out, err = self.hosts[-1].run(self.id, "sh", "-c", script, input=input)
        assert done["code"] == 0, (script, done, err)
        return out

    def write(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self.sh(f"cat > {self.directory}/{name}; chmod {mode:o} {self.directory}/{name}", data)

    def kill(self, pid: int) -> None:
        self.sh(f"kill -9 {pid}")

    def descriptors(self) -> list[str]:
        return self.sh("ls -l /proc/1/fd | sed -n 's/.*-> //p'; true").decode().split("\n")

    def children(self) -> list[str]:
        *found, shell = self.sh("read -r x < /proc/1/task/1/children; echo $x $$").decode().split()
        return [pid for pid in found if pid != shell]

    def end(self) -> None:
        assert not self.children()

    def remove(self) -> None:
        self.forget_all()
        for host in self.hosts:
            host.sock.close()


def fails(code: str, call: Callable[..., Any], *args: Any, **more: Any) -> Failure:
    try:
        call(*args, **more)
    except Failure as e:
        assert e.code == code, e
        return e
    raise AssertionError(f"no error {code}")


class Box:
    """Applets over one connection."""

    def __init__(self, host: Host) -> None:
        self.host, self.id = host, 1000

    def start(self, applet: str, *, stdin: bool = False, user: str | None = None, cwd: str | None = None, **args) -> int:
        self.id += 1
        self.host.call("exec", id=self.id, argv=[applet], builtin=True, stdin=stdin, args=args, user=user, cwd=cwd)
        return self.id

    def __call__(self, applet: str, input: bytes | None = None, **more) -> bytes:
        id = self.start(applet, stdin=input is not None, **more)
        if input is not None:
            self.host.feed(4 * id, input)
        done = self.host.exit_of(id, 60)
        out, err = bytes(self.host.stream(4 * id + 1).data), bytes(self.host.stream(4 * id + 2).data)
        self.host.call("forget", id=id)
        if done["code"] == 0:
            assert not err, err
            return out
        assert done["code"] == 1, (done, err)
        raise Failure(unpack(err))

    def entry(self, applet: str, input: bytes | None = None, **more) -> dict:
        (one,) = records(self(applet, input, **more))
        return one


def records(data: bytes | bytearray) -> list[dict]:
    found, at = [], 0
    while at + 4 <= len(data):
        n = int.from_bytes(data[at : at + 4], "little")
        if at + 4 + n > len(data):
            break
        found.append(unpack(bytes(data[at + 4 : at + 4 + n])))
        at += 4 + n
    return found
