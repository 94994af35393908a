#!/usr/bin/env python3
"""The agent's own tests: drives `stoker-agent --socket` on this host. usage: check.py AGENT [NAME...]

Plain Python, no dependency. Each test gets an agent of its own; at its end the agent must have no child, no open descriptor
more than at the start, and must end cleanly (AddressSanitizer's leak check included).
"""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from wire import ACK, CALL, DATA, EOF, ZEROS, Failure, Host, frame, pack, preamble, unpack

TESTS = []
SLOW = 4.0 if "test" in (sys.argv[1] if len(sys.argv) > 1 else "") else 1.0


def test(f):
    TESTS.append(f)
    return f


class Agent:
    def __init__(self, program: str) -> None:
        self.directory = tempfile.mkdtemp(prefix="agent-check-")
        self.path = f"{self.directory}/socket"
        env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1:exitcode=99:quarantine_size_mb=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
        self.process = subprocess.Popen([program, "--socket", self.path], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.hosts: list[Host] = []

    def connect(self, *, fresh: bool = False) -> Host:
        for host in self.hosts:
            host.sock.close()
        self.hosts = [Host(self.socket(), fresh=fresh)]
        return self.hosts[0]

    def socket(self) -> socket.socket:
        deadline = time.monotonic() + 10
        while True:
            s = socket.socket(socket.AF_UNIX)
            try:
                s.connect(self.path)
                return s
            except OSError:
                s.close()
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.005)

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

    def resident(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096

    def end(self) -> None:
        host = self.connect()
        for info in host.call("processes")["processes"]:
            if info["running"]:
                host.call("signal", id=info["id"], signal=9)
                host.exit_of(info["id"])
            host.call("forget", id=info["id"])
        left = [f for f in self.descriptors() if f.startswith("pipe:") or "ptmx" in f]
        # Its stderr is a pipe of ours.
        assert len(left) <= 1, f"descriptors left open: {left}"
        host.call("shutdown", how="poweroff", grace=1000)
        code = self.process.wait(10)
        assert self.process.stderr is not None
        text = self.process.stderr.read().decode(errors="replace")
        assert code == 0, f"the agent ended with {code}:\n{text}"
        self.remove()

    def remove(self) -> None:
        for host in self.hosts:
            host.sock.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()
        subprocess.run(["rm", "-rf", self.directory], check=True)


def fails(code: str, call, *args, **more) -> Failure:
    try:
        call(*args, **more)
    except Failure as e:
        assert e.code == code, e
        return e
    raise AssertionError(f"no error {code}")


# ---- processes ------------------------------------------------------------------------------------------------------------------


@test
def runs_commands(a: Agent) -> None:
    h = a.connect(fresh=True)
    assert h.welcome["version"] == 1 and h.welcome["state"] == "initramfs" and h.welcome["generation"] == 1, h.welcome
    assert h.call("configure", env={"COLOUR": "blue", "SHAPE": "round"}) == {"pid1": False}
    fails("already_configured", h.call, "configure")
    done, out, err = h.run(1, "sh", "-c", "echo $COLOUR $SHAPE $HOME; echo oops >&2; exit 7", env={"SHAPE": "square", "HOME": "/h"})
    assert (done["code"], out, err) == (7, b"blue square /h\n", b"oops\n"), (done, out, err)
    assert done["out"] == 15 and done["err"] == 5 and done["duration_us"] > 0
    done, out, _ = h.run(2, "env", env={"ONLY": "this"}, clear_env=True)
    assert out == b"ONLY=this\n", out
    done, out, _ = h.run(3, "sh", "-c", "umask; ulimit -n; ulimit -c; pwd", umask=0o77, rlimits=[[7, 99, 100], [4, 0, 0]], cwd="/usr")
    assert out == b"0077\n99\n0\n/usr\n", out
    done, out, _ = h.run(4, b"printf", b"\xff\xfe")
    assert out == b"\xff\xfe"
    done, _, _ = h.run(5, "sh", "-c", "kill -9 $$")
    assert done["signal"] == 9 and done["code"] is None


@test
def explains_failed_starts(a: Agent) -> None:
    h = a.connect()
    d = a.directory
    Path(f"{d}/plain").write_text("echo script\n")
    Path(f"{d}/script").write_text("echo from-$0-$1\n")
    Path(f"{d}/interpreter").write_text("#!/no/such/thing\n")
    Path(f"{d}/binary").write_bytes(b"\x01\x02\0\0\0\nabc")
    for name in ("script", "interpreter", "binary"):
        os.chmod(f"{d}/{name}", 0o755)
    e = fails("no_such_command", h.run, 1, "/no/such/thing")
    assert e.errno == 2 and "/no/such/thing" in e.message
    fails("no_such_command", h.run, 1, "nosuchthing")
    fails("no_such_command", h.run, 1, f"{d}/plain/x")
    fails("not_executable", h.run, 1, f"{d}/plain")
    fails("not_executable", h.run, 1, d)
    e = fails("not_executable", h.run, 1, f"{d}/interpreter")
    assert "interpreter" in e.message
    fails("not_executable", h.run, 1, f"{d}/binary")
    fails("not_executable", h.run, 1, "plain", env={"PATH": f"/nowhere:{d}"})
    e = fails("no_such_directory", h.run, 1, "true", cwd="/no/such/dir")
    assert e.errno == 2 and "/no/such/dir" in e.message
    fails("no_such_directory", h.run, 1, "true", cwd=f"{d}/plain")
    fails("no_such_user", h.run, 1, "true", user="nosuchuser")
    fails("no_such_group", h.run, 1, "true", user="root:nosuchgroup")
    fails("bad_request", h.call, "exec", id=1, argv=[])
    fails("bad_request", h.call, "exec", id=1, argv=["a\0b"])
    fails("bad_request", h.call, "exec", id=0, argv=["true"])
    fails("bad_request", h.call, "exec", id=1 << 28, argv=["true"])
    fails("bad_request", h.call, "exec", id=1, argv=["true"], ring=5000)
    fails("bad_request", h.call, "exec", id=1, argv=["true"], env={"A=B": "c"})
    fails("bad_request", h.call, "exec", id=1, argv=["true"], tag="x" * 129)
    fails("bad_request", h.call, "exec", id=1, argv=["true"], rlimits=[[1, 2]])
    fails("not_found", h.call, "attach", id=77)
    fails("unsupported", h.call, "dance")
    done, out, _ = h.run(1, "script", "arg", env={"PATH": d})
    assert out == f"from-{d}/script-arg\n".encode(), out
    done, out, _ = h.run(2, "sh", "-c", "exit 3")
    assert done["code"] == 3
    assert not h.call("processes")["processes"]


@test
def becomes_users(a: Agent) -> None:
    if os.geteuid():
        return
    h = a.connect()
    _, out, _ = h.run(1, "sh", "-c", "id -u; id -g; echo $USER $HOME", user="daemon")
    assert out == b"1\n1\ndaemon /usr/sbin\n", out
    _, out, _ = h.run(2, "id", user="4242:31")
    assert b"uid=4242" in out and b"gid=31" in out, out
    _, out, _ = h.run(3, "sh", "-c", "id -G; echo $HOME", user="4242", groups=[7, 8])
    assert out == b"0 7 8\n/\n", out
    _, out, _ = h.run(4, "sh", "-c", "grep -E '^(Cap(Eff|Prm)|SigBlk|SigIgn)' /proc/self/status", user="daemon")
    assert all(int(line.split()[1], 16) == 0 for line in out.splitlines()), out
    _, out, _ = h.run(5, "sh", "-c", "ls -l /proc/self/fd | wc -l; ps -o pid=,pgid=,sid= -p $$")
    assert len(out.splitlines()[0]) == 1 or int(out.split()[0]) <= 5, out


@test
def keeps_stdin_whole(a: Agent) -> None:
    h = a.connect()
    data = os.urandom(3 << 20)
    done, out, _ = h.run(1, "cat", input=data, timeout=60)
    assert out == data
    done, out, _ = h.run(2, "wc", "-c", input=b"")
    assert out.strip() == b"0"
    done, out, _ = h.run(3, "sh", "-c", "wc -c")  # no stdin: /dev/null
    assert out.strip() == b"0"


@test
def tells_of_closed_stdin(a: Agent) -> None:
    h = a.connect()
    h.call("exec", id=1, argv=["sh", "-c", "exec <&-; sleep 0.3"], stdin=True)
    h.until(lambda: (1, {"e": "stdin_closed"}) in h.events)
    h.feed(4, bytes(1 << 20))  # acknowledged and dropped
    h.until(lambda: h.acks[4] == 1 << 20)
    assert h.exit_of(1)["code"] == 0
    assert [e for e in h.events if e[1]["e"] == "stdin_closed"] == [(1, {"e": "stdin_closed"})]


@test
def ignores_repeated_and_early_input(a: Agent) -> None:
    h = a.connect()
    h.call("exec", id=1, argv=["cat"], stdin=True)
    h.send(frame(DATA, 4, 0, b"hello "))
    h.send(frame(DATA, 4, 3, b"lo wor"))  # overlaps
    h.send(frame(DATA, 4, 20, b"too early"))
    h.send(frame(DATA, 4, 0, b"hello "))
    h.send(frame(DATA, 4, 9, b"ld"))
    h.send(frame(EOF, 4, 11))
    h.send(frame(EOF, 4, 11))
    assert h.exit_of(1)["code"] == 0
    assert h.stream(5).data == b"hello world", h.stream(5).data
    assert h.call("attach", id=1, out=11, err=0)["stdin"] == 11


@test
def waits_for_a_slow_reader_of_stdin(a: Agent) -> None:
    h = a.connect()
    h.call("exec", id=1, argv=["sh", "-c", "sleep 0.3; sha1sum"], stdin=True)
    data = os.urandom(2 << 20)
    h.feed(4, data)
    import hashlib

    h.exit_of(1)
    assert h.stream(5).data.split()[0].decode() == hashlib.sha1(data).hexdigest()


@test
def stops_at_the_window(a: Agent) -> None:
    h = a.connect()
    h.acknowledge = False
    h.call("exec", id=1, argv=["sh", "-c", "head -c 5000000 /dev/zero | tr '\\0' x; echo end"])
    h.call("stream", id=1, mode="block", window=100_000)
    h.settle(0.5)
    s = h.stream(5)
    first = s.received
    assert first <= 1 << 20, first
    h.send(frame(ACK, 5, first))
    h.settle(0.3)
    assert s.received - first <= 100_000, s.received - first
    info = h.call("attach", id=1, out=s.received, err=None)
    assert info["running"] and info["out"] <= first + (1 << 20)
    h.acknowledge = True
    h.call("stream", id=1, window=1 << 20)
    h.send(frame(ACK, 5, s.received))
    done = h.exit_of(1, 30)
    assert s.end == 5_000_004 == done["out"] and not s.gaps, (s.end, s.gaps)
    assert bytes(s.data[-8:]) == b"xxxxend\n" and s.data.count(b"x") == 5_000_000


@test
def discards_the_oldest(a: Agent) -> None:
    h = a.connect()
    h.call("exec", id=1, argv=["sh", "-c", "seq 1 200000; exec sleep 600"], mode="discard", ring=65536, attach=False)
    deadline = time.monotonic() + 20
    total = sum(len(str(i)) + 1 for i in range(1, 200001))
    while (info := h.call("attach", id=1, out=1 << 40, err=None))["out"] < total:
        assert time.monotonic() < deadline, info
        time.sleep(0.02)
    assert info["out"] == total and info["out_oldest"] == total - 65536, info
    h.streams.clear()
    h.call("attach", id=1, out=5, err=None)  # long gone: begins at the oldest
    h.until(lambda: h.stream(5).received >= 65536)
    whole = b"".join(b"%d\n" % i for i in range(1, 200001))
    assert h.stream(5).data == whole[-65536:]
    h.call("signal", id=1, signal=15)
    done = h.exit_of(1)
    assert done["signal"] == 15


@test
def shows_gaps_while_attached(a: Agent) -> None:
    h = a.connect()
    h.acknowledge = False
    script = "i=0; while [ $i -lt 20000 ]; do echo line-$i; i=$((i+1)); done"
    h.call("exec", id=1, argv=["sh", "-c", script], mode="discard", ring=16384)
    h.settle(1.0 * SLOW)
    s = h.stream(5)
    while True:
        h.send(frame(ACK, 5, s.offset or 0))
        try:
            h.until(lambda: s.end is not None, 0.3)
            break
        except TimeoutError:
            pass
    whole = b"".join(b"line-%d\n" % i for i in range(20000))
    assert s.gaps and s.end == len(whole), (s.gaps, s.end)
    assert whole.endswith(bytes(s.data[-1000:]))


@test
def survives_reconnection(a: Agent) -> None:
    h = a.connect()
    h.acknowledge = False
    h.call("exec", id=1, argv=["sh", "-c", "seq 1 50000; read x; echo got $x"], stdin=True, tag="worker")
    h.until(lambda: h.stream(5).received > 100_000)
    got = bytes(h.stream(5).data)
    h = a.connect()  # nothing of it was acknowledged
    assert h.welcome["generation"] == 2
    assert h.welcome["processes"] == [{"id": 1, "pid": h.welcome["processes"][0]["pid"], "tag": "worker", "running": True, "pty": False}]
    h.settle(0.1)
    assert not h.streams, "data without attach"
    info = h.call("attach", id=1, out=60_000, err=0)
    assert info["running"] and info["exit"] is None and info["stdin"] == 0
    whole = b"".join(b"%d\n" % i for i in range(1, 50001))
    h.until(lambda: h.stream(5).received >= len(whole) - 60_000)
    assert got[:60_000] + h.stream(5).data == whole
    h.call("detach", id=1)
    h.feed(4, b"you\n")
    h.exit_of(1)  # told at once to whoever is connected
    h = a.connect()
    assert not h.welcome["processes"][0]["running"]
    info = h.call("attach", id=1, out=None, err=None)
    assert info["exit"]["code"] == 0 and info["out"] == len(whole) + 8
    assert h.exit_of(1)["out"] == len(whole) + 8
    assert h.stream(5).data == whole + b"got you\n" and h.stream(5).end == len(whole) + 8
    assert h.call("exec", id=1, argv=["false"])["pid"] == info["pid"], "an id starts one process only"


@test
def sends_input_again_after_a_loss(a: Agent) -> None:
    h = a.connect()
    h.call("exec", id=1, argv=["sh", "-c", "sleep 0.2; exec cat"], stdin=True)
    data = os.urandom(150_000)
    h.send(frame(DATA, 4, 0, data[:65536]) + frame(DATA, 4, 65536, data[65536:131072])[:30_000])
    h = a.connect()
    wants = h.call("attach", id=1, out=0, err=0)["stdin"]
    assert wants in (0, 65536), wants
    at = 0  # from the last acknowledgement, of which it may have seen some
    while at < len(data):
        h.send(frame(DATA, 4, at, data[at : at + 50_000]))
        at += 50_000
    h.send(frame(EOF, 4, len(data)))
    h.exit_of(1)
    assert h.stream(5).data == data


@test
def hunts_through_damage(a: Agent) -> None:
    h = a.connect(fresh=True)
    # A frame torn in the middle, then zeros, then a new preamble: as after a vanished writer.
    for cut in (1, 5, 23, 24, 30, 60_000):
        torn = frame(DATA, 4, 0, os.urandom(65536))[:cut]
        h.sock.sendall(torn)
        h.synchronise()
        assert h.call("processes")["processes"] == []
    for junk in (os.urandom(100_000), b"SK" * 50_000, b"\xf5STOKER-SYNC\r\n\x1a\n" * 100, frame(CALL, 1, 0, b"x")[:-1] + b"\0"):
        h.sock.setblocking(True)
        h.sock.sendall(junk)
        h.synchronise()
        h.ping()
    # A preamble in the place of a header needs no zeros; one inside a damaged frame is found as well.
    h.synchronise(fresh=True)
    nonce = os.urandom(16)
    bad = bytearray(frame(DATA, 4, 0, b"A" * 50 + preamble(nonce) + b"B" * 50))
    bad[-1] ^= 0x55
    h.nonce, h.synced, h.buffer = nonce, False, bytearray()
    h.send(bytes(bad) + frame(0x01, payload=pack({"min": 1, "max": 1, "host": "t"})))
    # The rest of the damaged frame is no frame: another hunt, so the hello is lost; the answer to the preamble is not.
    h.until(lambda: h.synced)
    h.synchronise()
    # Frames of unknown type and unknown channels, maps that are none: no damage.
    h.send(frame(0x77, 1, 2, b"?") + frame(DATA, 99, 0, b"?") + frame(ACK, 97, 5) + frame(EOF, 96, 0) + frame(ACK, 3, 5))
    h.request += 1
    h.send(frame(CALL, h.request, 0, b"\xc1"))
    fails("bad_request", h.result, h.request)
    h.request += 1
    h.send(frame(CALL, h.request, 0, pack([1, 2])))
    fails("bad_request", h.result, h.request)
    h.request += 1
    h.send(frame(CALL, h.request, 0, b"\x91" * 9 + b"\x00"))
    fails("bad_request", h.result, h.request)
    assert h.ping(b"y" * 4096) < 5


@test
def answers_versions(a: Agent) -> None:
    h = a.connect()
    h.send(frame(0x01, payload=pack({"min": 2, "max": 9, "host": "future"})))
    h.until(lambda: h.welcome["version"] == 0)
    h.send(frame(0x01, payload=pack({"min": 1, "max": 9, "host": "future"})))
    h.until(lambda: h.welcome["version"] == 1)


@test
def does_not_wait_for_grandchildren(a: Agent) -> None:
    h = a.connect()
    started = time.monotonic()
    h.call("exec", id=1, argv=["sh", "-c", "sleep 600 & echo $!"])
    done = h.exit_of(1)
    took = time.monotonic() - started
    assert 0.24 < took < 3 and done["code"] == 0, took
    os.kill(int(h.stream(5).data), 9)
    # One that goes on writing is heard until it is silent.
    h.call("exec", id=2, argv=["sh", "-c", "(for i in 1 2 3 4 5 6; do sleep 0.1; echo $i; done; exec sleep 600 2>/dev/null) & echo $!"])
    h.exit_of(2)
    lines = h.stream(9).data.split()
    assert lines[1:] == [b"1", b"2", b"3", b"4", b"5", b"6"], lines
    os.kill(int(lines[0]), 9)


@test
def signals_groups(a: Agent) -> None:
    h = a.connect()
    h.call("exec", id=1, argv=["sh", "-c", "trap 'echo caught; exit 5' USR1; while :; do sleep 0.05; done"])
    time.sleep(0.2)
    h.call("signal", id=1, signal=int(signal.SIGUSR1), group=False)
    assert h.exit_of(1)["code"] == 5
    fails("not_found", h.call, "signal", id=1, signal=9)
    fails("bad_request", h.call, "signal", id=1, signal=0)
    h.call("exec", id=2, argv=["sh", "-c", "sleep 600 & sleep 600 & wait"])
    time.sleep(0.2)
    h.call("signal", id=2, signal=9)
    assert h.exit_of(2)["signal"] == 9
    time.sleep(0.1)
    assert not a.children(), a.children()


@test
def gives_terminals(a: Agent) -> None:
    h = a.connect()
    h.call("exec", id=1, argv=["sh", "-c", "tty; stty size; ps -o tty= -p $$; read x; echo \"<$x>\"; stty size; cat; echo bye"],
           tty=True, rows=31, cols=97)  # fmt: skip
    h.until(lambda: b"31 97" in h.stream(5).data)
    h.call("resize", id=1, rows=50, cols=132)
    h.send(frame(DATA, 4, 0, b"hello\n"))
    h.until(lambda: b"50 132" in h.stream(5).data)
    h.send(frame(DATA, 4, 6, b"line\n"))
    h.until(lambda: h.stream(5).data.count(b"line") == 2)
    h.send(frame(EOF, 4, 11))  # types ^D
    done = h.exit_of(1)
    assert done["code"] == 0 and b"<hello>" in h.stream(5).data and b"bye" in h.stream(5).data, h.stream(5).data
    assert h.stream(6).end == 0
    h.call("exec", id=2, argv=["sh", "-c", "sleep 600"], tty=True)
    time.sleep(0.2)
    h.send(frame(DATA, 8, 0, b"\x03"))  # ^C
    assert h.exit_of(2)["signal"] == 2
    fails("bad_request", h.call, "resize", id=2, rows=1, cols=1)


@test
def leaks_nothing_in_many_runs(a: Agent) -> None:
    h = a.connect()
    for i in range(1, 101):
        h.run(i, "true")
    before, fds = a.resident(), len(a.descriptors())
    for i in range(101, 2101):
        h.call("exec", id=i, argv=["/bin/true"], stdin=True)
        h.exit_of(i)
        h.call("forget", id=i)
        h.events.clear()
    assert len(a.descriptors()) == fds
    grown = a.resident() - before
    assert grown < (8 << 20 if "test" in a.process.args[0] else 128 << 10), grown
    assert not a.children()


@test
def runs_many_at_once(a: Agent) -> None:
    h = a.connect()
    for i in range(1, 201):
        h.call("exec", id=i, argv=["sh", "-c", f"read x; echo $x-{i}; echo e{i} >&2"], stdin=True)
    for i in range(1, 201):
        h.send(frame(DATA, 4 * i, 0, b"in%d\n" % i) + frame(EOF, 4 * i, len(b"in%d\n" % i)))
    for i in range(1, 201):
        assert h.exit_of(i, 60)["code"] == 0
        assert h.stream(4 * i + 1).data == b"in%d-%d\n" % (i, i) and h.stream(4 * i + 2).data == b"e%d\n" % i
    first = h.call("processes")
    assert len(first["processes"]) == 200 and not first["more"]
    for i in range(201, 301):
        h.call("exec", id=i, argv=["true"])
        h.exit_of(i, 60)
    first = h.call("processes")
    assert len(first["processes"]) == 256 and first["more"]
    rest = h.call("processes", after=first["processes"][-1]["id"])
    assert [p["id"] for p in rest["processes"]] == list(range(257, 301)) and not rest["more"]


@test
def remembers_a_thousand_ended_ones(a: Agent) -> None:
    h = a.connect()
    for i in range(1, 1101):
        h.call("exec", id=i, argv=["/bin/true"], attach=False)
        h.exit_of(i)
        h.events.clear()
    first = h.call("processes")["processes"][0]["id"]
    assert first == 77, first


@test
def reaps_orphans(a: Agent) -> None:
    h = a.connect()
    h.run(1, "sh", "-c", "for i in 1 2 3 4 5; do (sleep 0.2 >/dev/null 2>&1 </dev/null &) ; done")
    time.sleep(0.1)
    assert len(a.children()) == 5, a.children()
    time.sleep(0.5)
    assert not a.children(), a.children()


@test
def counts_for_metrics(a: Agent) -> None:
    h = a.connect()
    info = h.call("info")
    assert info["uptime_ms"] > 0 and info["memory"]["total"] > 1 << 20 and info["cpu"]["cpus"] >= 1 and len(info["load"]) == 3
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    assert abs(info["uptime_ms"] / 1000 - uptime) < 5
    lo = next(n for n in info["networks"] if n["name"] == "lo")
    assert lo["rx_bytes"] == lo["tx_bytes"]
    assert h.call("sync") == {}


@test
def survives_floods_of_calls(a: Agent) -> None:
    h = a.connect()
    for i in range(1, 151):
        h.call("exec", id=i, argv=["true"], tag="t" * 128)
        h.exit_of(i)
    one = frame(CALL, 5, 0, pack({"m": "processes"}))
    h.sock.setblocking(True)
    h.sock.settimeout(0.3)
    sent = 0
    try:
        while sent < 50 << 20:  # the answers are never read: the agent has to stop reading, not to grow
            sent += h.sock.send(one * 500)
    except TimeoutError:
        pass
    assert sent < 40 << 20 and a.resident() < (600 << 20 if SLOW > 1 else 8 << 20), (sent, a.resident())
    h = a.connect()
    assert h.ping() < 5


@test
def shuts_down_with_grace(a: Agent) -> None:
    h = a.connect()
    h.call("exec", id=1, argv=["sh", "-c", "trap '' TERM; sleep 600"])
    time.sleep(0.2)
    started = time.monotonic()
    h.call("shutdown", how="poweroff", grace=300)
    assert a.process.wait(10) == 0
    assert time.monotonic() - started >= 0.29
    a.process = subprocess.Popen([*a.process.args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


# ---- files ----------------------------------------------------------------------------------------------------------------------


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


@test
def writes_and_reads_files(a: Agent) -> None:
    box, d = Box(a.connect()), a.directory
    e = box.entry("write", b"hello", path=f"{d}/a/b/c.txt")
    assert e["size"] == 5 and e["type"] == "file" and e["mode"] == 0o644 and e["path"] == f"{d}/a/b/c.txt".encode() and e["name"] == b"c.txt"
    assert e["user"] == __import__("pwd").getpwuid(os.geteuid()).pw_name
    assert Path(f"{d}/a/b/c.txt").read_bytes() == b"hello"
    os.chmod(f"{d}/a/b/c.txt", 0o750)
    inode = os.stat(f"{d}/a/b/c.txt").st_ino
    e = box.entry("write", b"replaced", path=f"{d}//a/./b/c.txt")
    assert e["mode"] == 0o750 and e["ino"] != inode and e["path"] == f"{d}/a/b/c.txt".encode()
    assert box.entry("write", b"", path=f"{d}/m", mode=0o4711)["mode"] == 0o4711
    assert box.entry("write", b" more", path=f"{d}/a/b/c.txt", append=True)["size"] == 13
    assert box("read", path=f"{d}/a/b/c.txt") == b"replaced more"
    assert box("read", path=f"{d}/a/b/c.txt", offset=9, length=2) == b"mo"
    assert box("read", path=f"{d}/a/b/c.txt", offset=99) == b""
    assert box("read", path="/proc/self/comm").startswith(b"stoker-agent")
    big = os.urandom(5 << 20)
    assert box.entry("write", big, path=f"{d}/big", size=len(big))["size"] == len(big)
    assert box("read", path=f"{d}/big") == big
    assert fails("short_input", box, "write", b"xyz", path=f"{d}/big", size=4).errno
    assert fails("short_input", box, "write", b"xyz", path=f"{d}/new", size=4)
    assert not os.path.exists(f"{d}/new") and os.path.getsize(f"{d}/big") == len(big)
    fails("file_exists", box, "write", b"", path=f"{d}/big", exclusive=True)
    box("write", b"1", path=f"{d}/fresh", exclusive=True)
    fails("is_directory", box, "write", b"", path=d)
    fails("is_directory", box, "read", path=d)
    fails("not_a_file", box, "read", path="/dev/null")
    fails("file_not_found", box, "read", path=f"{d}/none")
    fails("file_not_found", box, "write", b"", path=f"{d}/none/x", parents=False)
    fails("not_directory", box, "write", b"", path=f"{d}/big/x")
    fails("bad_path", box, "stat", path="/" + "x" * 5000)
    fails("bad_path", box, "stat", path="~nosuchuser/x")
    fails("bad_request", box, "stat")
    fails("unsupported", box, "frobnicate")
    box("write", b"null", path="/dev/null")
    # Through links, even one whose target is still missing.
    os.symlink("target", f"{d}/link")
    box("write", b"linked", path=f"{d}/link")
    assert os.readlink(f"{d}/link") == "target" and Path(f"{d}/target").read_bytes() == b"linked"
    box("write", b"again", path=f"{d}/link")
    assert os.path.islink(f"{d}/link") and Path(f"{d}/target").read_bytes() == b"again"
    os.symlink("loop", f"{d}/loop")
    fails("bad_path", box, "write", b"", path=f"{d}/loop")
    assert not [n for n in os.listdir(d) if n.startswith(".stoker")]
    # Relative to the directory; a missing one only matters then.
    box("write", b"rel", path="rel", cwd=d)
    assert Path(f"{d}/rel").read_bytes() == b"rel"
    fails("file_not_found", box, "stat", path="rel", cwd="/no/such")
    assert box.entry("stat", path=f"{d}/rel", cwd="/no/such")["size"] == 3


@test
def leaves_no_half_files(a: Agent) -> None:
    h = a.connect()
    box, d = Box(h), a.directory
    Path(f"{d}/old").write_text("old")
    id = box.start("write", stdin=True, path=f"{d}/old")
    h.feed(4 * id, bytes(1 << 20), end=False)
    h.call("signal", id=id, signal=9)
    h.exit_of(id)
    assert Path(f"{d}/old").read_text() == "old" and sorted(os.listdir(d)) == ["old", "socket"], os.listdir(d)


@test
def lists_trees(a: Agent) -> None:
    box, d = Box(a.connect()), a.directory
    for name in ("x/one", "x/two", "x/deep/er/est", "y"):
        Path(f"{d}/t/{name}").parent.mkdir(parents=True, exist_ok=True)
        Path(f"{d}/t/{name}").write_text(name)
    os.symlink("../y", f"{d}/t/x/link")
    os.mkfifo(f"{d}/t/pipe")
    found = records(box("list", path=f"{d}/t"))
    assert found.pop() == {"end": True, "truncated": False, "unreadable": 0}
    assert [(e["name"], e["type"]) for e in found] == [(b"pipe", "fifo"), (b"x", "directory"), (b"y", "file")]
    found = records(box("list", path=f"{d}/t", depth=9))[:-1]
    below = [e["path"].decode()[len(d) + 3 :] for e in found]
    assert below == ["pipe", "x", "x/deep", "x/deep/er", "x/deep/er/est", "x/link", "x/one", "x/two", "y"], below
    assert next(e for e in found if e["name"] == b"link")["target"] == b"../y"
    found = records(box("list", path=f"{d}/t", depth=9, limit=4))
    assert len(found) == 5 and found[-1]["truncated"]
    fails("not_directory", box, "list", path=f"{d}/t/y")
    for i in range(3000):
        Path(f"{d}/t/x/f{i}").touch()
    found = records(box("list", path=f"{d}/t/x"))
    assert len(found) == 3005
    entry = box.entry("stat", path=f"{d}/t/x/link", follow=False)
    assert entry["type"] == "symlink" and box.entry("stat", path=f"{d}/t/x/link")["type"] == "file"


@test
def changes_trees(a: Agent) -> None:
    box, d = Box(a.connect()), a.directory
    assert box.entry("mkdir", path=f"{d}/p/q/r", mode=0o711)["mode"] == 0o711
    box("mkdir", path=f"{d}/p/q/r")
    fails("file_exists", box, "mkdir", path=f"{d}/p", parents=False)
    fails("file_not_found", box, "mkdir", path=f"{d}/no/way", parents=False)
    Path(f"{d}/p/q/file").write_text("x")
    fails("not_directory", box, "mkdir", path=f"{d}/p/q/file")
    os.symlink("/etc", f"{d}/p/etc")
    assert box.entry("chmod", path=f"{d}/p", mode=0o700, recursive=True)["mode"] == 0o700
    assert os.stat(f"{d}/p/q/file").st_mode & 0o7777 == 0o700 and os.stat("/etc").st_mode & 0o777 == 0o755
    fails("bad_request", box, "chmod", path=f"{d}/p", mode=0o77777)
    if not os.geteuid():
        e = box.entry("chown", path=f"{d}/p", owner="daemon:31", recursive=True)
        assert (e["uid"], e["gid"]) == (1, 31) and os.lstat(f"{d}/p/etc").st_uid == 1 and os.stat("/etc").st_uid == 0
        assert box.entry("chown", path=f"{d}/p", owner=":12")["gid"] == 12
        assert box.entry("chown", path=f"{d}/p", owner="77")["gid"] == 12
        fails("no_such_user", box, "chown", path=f"{d}/p", owner="nosuch")
        fails("permission_denied", box, "chmod", path=f"{d}/p/q", mode=0o777, user="daemon")
        box("chown", path=f"{d}/p", owner="0:0", recursive=True)
    box("symlink", path=f"{d}/s", target="p/q")
    fails("file_exists", box, "symlink", path=f"{d}/s", target="x")
    assert box.entry("symlink", path=f"{d}/s", target="p", overwrite=True)["target"] == b"p"
    assert box("readlink", path=f"{d}/s") == b"p"
    assert box("readlink", path=f"{d}/s/q/file", canonical=True) == f"{d}/p/q/file".encode()
    e = box.entry("move", source=f"{d}/p/q/file", destination=f"{d}/moved")
    assert e["path"] == f"{d}/moved".encode() and not os.path.exists(f"{d}/p/q/file")
    Path(f"{d}/other").write_text("o")
    fails("file_exists", box, "move", source=f"{d}/moved", destination=f"{d}/other", overwrite=False)
    box("move", source=f"{d}/moved", destination=f"{d}/other")
    fails("file_not_found", box, "move", source=f"{d}/moved", destination=f"{d}/x")
    fails("directory_not_empty", box, "remove", path=f"{d}/p")
    box("remove", path=f"{d}/s")
    box("remove", path=f"{d}/p", recursive=True)
    assert sorted(os.listdir(d)) == ["other", "socket"] and os.path.exists("/etc/passwd")
    fails("file_not_found", box, "remove", path=f"{d}/p")
    box("remove", path=f"{d}/p", missing_ok=True)
    fails("is_directory", box, "remove", path="/", recursive=True)


@test
def moves_across_file_systems(a: Agent) -> None:
    if os.stat("/dev/shm").st_dev == os.stat(a.directory).st_dev:
        return
    box, d = Box(a.connect()), a.directory
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        Path(f"{d}/tree/sub").mkdir(parents=True)
        Path(f"{d}/tree/sub/f").write_bytes(b"x" * 100_000)
        os.symlink("f", f"{d}/tree/sub/l")
        os.link(f"{d}/tree/sub/f", f"{d}/tree/h")
        os.utime(f"{d}/tree/sub/f", (1000, 2000))
        box("move", source=f"{d}/tree", destination=f"{other}/arrived")
        assert not os.path.exists(f"{d}/tree")
        assert Path(f"{other}/arrived/sub/f").read_bytes() == b"x" * 100_000 and os.readlink(f"{other}/arrived/sub/l") == "f"
        assert os.stat(f"{other}/arrived/h").st_ino == os.stat(f"{other}/arrived/sub/f").st_ino
        assert os.stat(f"{other}/arrived/h").st_mtime == 2000
        box("move", source=f"{other}/arrived/sub/l", destination=f"{d}/l")
        assert os.readlink(f"{d}/l") == "f"
        box("move", source=f"{other}/arrived/h", destination=f"{d}/h")
        assert os.path.getsize(f"{d}/h") == 100_000 and not os.path.exists(f"{other}/arrived/h")


@test
def packs_and_unpacks(a: Agent) -> None:
    box, d = Box(a.connect()), a.directory
    t = Path(f"{d}/t")
    (t / "sub" / "empty").mkdir(parents=True)
    (t / "sub" / "f").write_bytes(os.urandom(70_000))
    (t / ("n" * 120)).write_text("long")
    deep = t / ("d" * 90) / ("e" * 90) / ("f" * 90)
    deep.mkdir(parents=True)
    (deep / "bottom").write_text("deep")
    (t / "é").write_text("not ascii")
    os.symlink("z" * 150, t / "link")
    os.link(t / "sub" / "f", t / "hard")
    os.chmod(t / "sub" / "f", 0o4755)
    os.chmod(t / "sub" / "empty", 0o500)
    os.utime(t / "sub" / "f", (5, 1234567890))
    os.utime(t / "sub", (5, 1234567000))
    os.mkfifo(t / "pipe")
    data = box("tar-out", path=str(t))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        names = tar.getnames()
        assert names[0] in (".", "./") and {"./hard", "./sub/f", "./" + "n" * 120, "./é"} <= set(names), names
        assert tar.getmember("./link").linkname == "z" * 150
        links = [m for m in tar if m.islnk()]
        assert len(links) == 1
        assert tar.getmember("./sub/empty").mode == 0o500
    box("tar-in", data, path=f"{d}/u", preserve=not os.geteuid())
    show = ["sh", "-c", "cd $1; find . -printf '%p %y %m %l %n %U\\n' | sort; find . -type f -exec sha1sum {} + | sort; find . ! -type l -printf '%p %T@\\n' | sort", "-"]
    first, second = (subprocess.run([*show, f"{d}/{x}"], capture_output=True, check=True).stdout.decode() for x in "tu")
    cut = "\n".join(line.split(".")[0] if "." in line[2:] else line for line in first.splitlines())
    assert [x.rsplit(".", 1)[0] for x in first.splitlines()] == [x.rsplit(".", 1)[0] for x in second.splitlines()], cut
    # Over what is there: replaced, merged.
    Path(f"{d}/u/sub/f").write_text("other")
    Path(f"{d}/u/sub/extra").write_text("stays")
    box("tar-in", data, path=f"{d}/u")
    assert os.path.getsize(f"{d}/u/sub/f") == 70_000 and os.path.exists(f"{d}/u/sub/extra")
    if not os.geteuid():
        os.mkdir(f"{d}/v", 0o777)
        os.chmod(d, 0o755)
        os.chmod(f"{d}/v", 0o777)
        box("tar-in", data, path=f"{d}/v", user="daemon")
        assert os.stat(f"{d}/v/sub/f").st_uid == 1 and os.stat(f"{d}/v/sub/f").st_mode & 0o7777 == 0o755
        fails("permission_denied", box, "tar-in", data, path=f"{d}/v", user="daemon", preserve=True)
    one = box("tar-out", path=f"{d}/t/sub/f")
    with tarfile.open(fileobj=io.BytesIO(one)) as tar:
        assert tar.getnames() == ["f"]
    fails("too_many", box, "tar-out", path=str(t), limit=1000)
    # What others write.
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
            name = "a" * 80 + "/" + "b" * (150 if kind != tarfile.USTAR_FORMAT else 50)
            m = tarfile.TarInfo(name)
            m.size, m.mtime = 3, 77
            tar.addfile(m, io.BytesIO(b"abc"))
        box("tar-in", out.getvalue(), path=f"{d}/w{kind}")
        assert Path(f"{d}/w{kind}/{name}").read_bytes() == b"abc" and os.stat(f"{d}/w{kind}/{name}").st_mtime == 77


def archive(*members: tuple[str, str, str | bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind, name, what in members:
            m = tarfile.TarInfo(name)
            m.type = kind.encode()
            if isinstance(what, bytes):
                m.size = len(what)
                tar.addfile(m, io.BytesIO(what))
            else:
                m.linkname = what
                tar.addfile(m)
    return out.getvalue()


@test
def stays_inside_the_target(a: Agent) -> None:
    box, d = Box(a.connect()), a.directory
    os.mkdir(f"{d}/outside")
    Path(f"{d}/outside/secret").write_text("secret")
    bad = [
        archive(("0", "../evil", b"x")),
        archive(("0", "/evil", b"x")),
        archive(("0", "a/../../evil", b"x")),
        archive(("2", "l", "../outside"), ("0", "l/evil", b"x")),
        archive(("2", "l", f"{d}/outside"), ("0", "l/evil", b"x")),
        archive(("2", "l", f"{d}/outside"), ("5", "l/evil", "")),
        archive(("2", "a", "."), ("2", "a/l", "../../outside"), ("0", "a/l/evil", b"x")),
        archive(("2", "l", f"{d}/outside"), ("1", "got", "l/secret")),
        archive(("1", "got", "../outside/secret")),
        archive(("3", "device", "")),
        archive(("S", "sparse", "")),
        archive(("0", "x", b"y" * 600))[:512] + bytes(600),
    ]
    for i, data in enumerate(bad):
        fails("bad_archive", box, "tar-in", data if i < 11 else b"\1" * 1024, path=f"{d}/in{i}")
        assert sorted(os.listdir(f"{d}/outside")) == ["secret"] and not os.path.exists(f"{d}/evil"), i
        assert not os.path.exists(f"{d}/in{i}/got") and not os.path.exists(f"{d}/in{i}/device")
    # A link is not written through: the entry replaces it.
    os.mkdir(f"{d}/t")
    os.symlink(f"{d}/outside/secret", f"{d}/t/f")
    box("tar-in", archive(("0", "f", b"new")), path=f"{d}/t")
    assert Path(f"{d}/outside/secret").read_text() == "secret" and Path(f"{d}/t/f").read_text() == "new"
    # Links that stay inside are fine.
    box("tar-in", archive(("5", "usr/lib", ""), ("2", "lib", "usr/lib"), ("0", "lib/x", b"1")), path=f"{d}/merged")
    assert Path(f"{d}/merged/usr/lib/x").read_text() == "1"
    fails("short_input", box, "tar-in", archive(("0", "x", b"y" * 5000))[:2000], path=f"{d}/cut")
    fails("short_input", box, "tar-in", b"", path=f"{d}/cut")


@test
def watches(a: Agent) -> None:
    h = a.connect()
    box, d = Box(h), a.directory
    os.makedirs(f"{d}/t/sub")
    id = box.start("watch", path=f"{d}/t", recursive=True)
    stream = h.stream(4 * id + 1)

    def events() -> list[tuple]:
        return [(e["e"], e.get("path", b"").decode()[len(d) + 3 :], e.get("old_path", b"").decode()[len(d) + 3 :]) for e in records(stream.data)]

    def wait_for(*wanted: tuple) -> None:
        h.until(lambda: all(w in events() for w in wanted), 10)

    wait_for(("ready", "", ""))
    Path(f"{d}/t/sub/f").write_text("x")
    wait_for(("created", "sub/f", ""), ("modified", "sub/f", ""))
    os.rename(f"{d}/t/sub/f", f"{d}/t/g")
    wait_for(("moved", "g", "sub/f"))
    os.makedirs(f"{d}/t/new/deep")
    Path(f"{d}/t/new/deep/early").write_text("x")
    wait_for(("created", "new", ""), ("created", "new/deep", ""), ("created", "new/deep/early", ""))
    os.rename(f"{d}/t/new", f"{d}/t/renamed")
    wait_for(("moved", "renamed", "new"))
    Path(f"{d}/t/renamed/deep/late").write_text("x")
    wait_for(("created", "renamed/deep/late", ""))
    os.rename(f"{d}/t/g", f"{d}/away")
    wait_for(("removed", "g", ""))
    os.rename(f"{d}/away", f"{d}/t/back")
    wait_for(("created", "back", ""))
    os.chmod(f"{d}/t/back", 0o600)
    wait_for(("attributes", "back", ""))
    os.unlink(f"{d}/t/back")
    wait_for(("removed", "back", ""))
    subprocess.run(["rm", "-r", f"{d}/t"], check=True)
    wait_for(("ended", "", ""))
    assert h.exit_of(id)["code"] == 0
    fails("file_not_found", box, "watch", path=f"{d}/t")
    Path(f"{d}/file").write_text("x")
    id = box.start("watch", path=f"{d}/file")
    stream = h.stream(4 * id + 1)
    h.until(lambda: records(stream.data))
    with open(f"{d}/file", "a") as f:
        f.write("more")
    h.until(lambda: any(e["e"] == "modified" for e in records(stream.data)))
    for i in range(20):
        os.makedirs(f"{d}/many/{i}")
    id = box.start("watch", path=f"{d}/many", recursive=True, limit=10)
    h.until(lambda: {"e": "overflow"} in records(h.stream(4 * id + 1).data))


# ---- running ---------------------------------------------------------------------------------------------------------------------


def main() -> int:
    program, wanted = sys.argv[1], sys.argv[2:]
    failed = 0
    for f in TESTS:
        if wanted and f.__name__ not in wanted:
            continue
        started = time.monotonic()
        agent = Agent(program)
        try:
            f(agent)
            agent.end()
            print(f"ok      {f.__name__} {time.monotonic() - started:.1f} s", flush=True)
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"FAILED  {f.__name__}", flush=True)
            if agent.process.poll() is not None and agent.process.stderr and not agent.process.stderr.closed:
                print(agent.process.stderr.read().decode(errors="replace"))
        finally:
            agent.remove()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
