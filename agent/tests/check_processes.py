"""Processes and their streams: start, input, output, signals, terminals, losses."""

from __future__ import annotations

import hashlib
import os
import signal
import time

from harness import Agent, Target, fails, host_test, test
from wire import ACK, CALL, DATA, EOF, frame, pack, preamble


@host_test
def runs_commands(a: Target) -> None:
    h = a.connect(fresh=True)
    assert h.welcome["version"] == 1 and h.welcome["state"] == "initramfs" and h.welcome["generation"] == 1, h.welcome
    fails("bad_request", h.call, "configure", init="somebody")
    assert h.call("configure", env={"COLOUR": "blue", "SHAPE": "round"}) == {"pid1": False, "steps": {}}
    fails("already_configured", h.call, "configure")
    done, out, err = h.run(1, "sh", "-c", "echo $COLOUR $SHAPE $HOME; echo oops >&2; exit 7", env={"SHAPE": "square", "HOME": "/h"})
    assert (done["code"], out, err) == (7, b"blue square /h\n", b"oops\n"), (done, out, err)
    assert done["out"] == 15 and done["err"] == 5 and done["duration_us"] > 0
    done, out, _ = h.run(2, "env", env={"ONLY": "this"}, clear_env=True)
    assert out == b"ONLY=this\n", out
    done, out, _ = h.run(
        3, "sh", "-c", "umask; ulimit -n; ulimit -c; pwd", umask=0o77, rlimits=[[7, 99, 100], [4, 0, 0]], cwd="/usr"
    )
    assert out == b"0077\n99\n0\n/usr\n", out
    done, out, _ = h.run(4, b"printf", b"\xff\xfe")
    assert out == b"\xff\xfe"
    done, _, _ = h.run(5, "sh", "-c", "kill -9 $$")
    assert done["signal"] == 9 and done["code"] is None


@test
def explains_failed_starts(a: Target) -> None:
    h = a.connect()
    d = a.directory
    a.write("plain", b"echo script\n")
    a.write("script", b"echo from-$0-$1\n", 0o755)
    a.write("interpreter", b"#!/no/such/thing\n", 0o755)
    a.write("binary", b"\x01\x02\0\0\0\nabc", 0o755)
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
def becomes_users(a: Target) -> None:
    if isinstance(a, Agent) and os.geteuid():
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
def keeps_stdin_whole(a: Target) -> None:
    h = a.connect()
    data = os.urandom(3 << 20)
    done, out, _ = h.run(1, "cat", input=data, timeout=60)
    assert out == data
    done, out, _ = h.run(2, "wc", "-c", input=b"")
    assert out.strip() == b"0"
    done, out, _ = h.run(3, "sh", "-c", "wc -c")  # no stdin: /dev/null
    assert out.strip() == b"0"


@test
def tells_of_closed_stdin(a: Target) -> None:
    h = a.connect()
    h.call("exec", id=1, argv=["sh", "-c", "exec <&-; sleep 0.3"], stdin=True)
    h.until(lambda: (1, {"e": "stdin_closed"}) in h.events)
    h.feed(4, bytes(1 << 20))  # acknowledged and dropped
    h.until(lambda: h.acks[4] == 1 << 20)
    assert h.exit_of(1)["code"] == 0
    assert [e for e in h.events if e[1]["e"] == "stdin_closed"] == [(1, {"e": "stdin_closed"})]


@test
def ignores_repeated_and_early_input(a: Target) -> None:
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
def waits_for_a_slow_reader_of_stdin(a: Target) -> None:
    h = a.connect()
    h.call("exec", id=1, argv=["sh", "-c", "sleep 0.3; sha1sum"], stdin=True)
    data = os.urandom(2 << 20)
    h.feed(4, data)
    h.exit_of(1)
    assert h.stream(5).data.split()[0].decode() == hashlib.sha1(data).hexdigest()


@test
def stops_at_the_window(a: Target) -> None:
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
def discards_the_oldest(a: Target) -> None:
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
def shows_gaps_while_attached(a: Target) -> None:
    h = a.connect()
    h.acknowledge = False
    script = "i=0; while [ $i -lt 20000 ]; do echo line-$i; i=$((i+1)); done"
    h.call("exec", id=1, argv=["sh", "-c", script], mode="discard", ring=16384)
    h.settle(1.0 * a.slow)
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
def survives_reconnection(a: Target) -> None:
    h = a.connect()
    h.acknowledge = False
    h.call("exec", id=1, argv=["sh", "-c", "seq 1 50000; read x; echo got $x"], stdin=True, tag="worker")
    h.until(lambda: h.stream(5).received > 100_000)
    got = bytes(h.stream(5).data)
    before = h.welcome["generation"]
    h = a.connect()  # nothing of it was acknowledged
    assert h.welcome["generation"] == before + 1
    assert h.welcome["processes"] == [
        {"id": 1, "pid": h.welcome["processes"][0]["pid"], "tag": "worker", "running": True, "pty": False}
    ]
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
def sends_input_again_after_a_loss(a: Target) -> None:
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
def hunts_through_damage(a: Target) -> None:
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
def answers_versions(a: Target) -> None:
    h = a.connect()
    h.send(frame(0x01, payload=pack({"min": 2, "max": 9, "host": "future"})))
    h.until(lambda: h.welcome["version"] == 0)
    h.send(frame(0x01, payload=pack({"min": 1, "max": 9, "host": "future"})))
    h.until(lambda: h.welcome["version"] == 1)


@test
def does_not_wait_for_grandchildren(a: Target) -> None:
    h = a.connect()
    started = time.monotonic()
    h.call("exec", id=1, argv=["sh", "-c", "sleep 600 & echo $!"])
    done = h.exit_of(1)
    took = time.monotonic() - started
    assert 0.24 < took < 3 and done["code"] == 0, took
    a.kill(int(h.stream(5).data))
    if a.slow > 3:
        return  # what follows needs a descendant that is never late by the quiet time
    # One that goes on writing is heard until it is silent.
    h.call(
        "exec", id=2, argv=["sh", "-c", "(for i in 1 2 3 4 5 6; do sleep 0.1; echo $i; done; exec sleep 600 2>/dev/null) & echo $!"]
    )
    h.exit_of(2)
    lines = h.stream(9).data.split()
    assert lines[1:] == [b"1", b"2", b"3", b"4", b"5", b"6"], lines
    a.kill(int(lines[0]))


@test
def signals_groups(a: Target) -> None:
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
def gives_terminals(a: Target) -> None:
    h = a.connect()
    h.call(
        "exec",
        id=1,
        argv=["sh", "-c", 'tty; stty size; ps -o tty= -p $$; read x; echo "<$x>"; stty size; cat; echo bye'],
        tty=True,
        rows=31,
        cols=97,
    )
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
def leaks_nothing_in_many_runs(a: Target) -> None:
    h = a.connect()
    for i in range(1, a.many // 20):
        h.run(i, "true")
    before, fds = a.resident(), len(a.descriptors())
    for i in range(101, 101 + a.many):
        h.call("exec", id=i, argv=["/bin/true"], stdin=True)
        h.exit_of(i)
        h.call("forget", id=i)
        h.events.clear()
    assert len(a.descriptors()) == fds
    grown = a.resident() - before
    assert grown < (8 << 20 if a.sanitized else 128 << 10), grown
    assert not a.children()


@test
def runs_many_at_once(a: Target) -> None:
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


@host_test
def remembers_a_thousand_ended_ones(a: Target) -> None:
    h = a.connect()
    for i in range(1, 1101):
        h.call("exec", id=i, argv=["/bin/true"], attach=False)
        h.exit_of(i)
        h.events.clear()
    first = h.call("processes")["processes"][0]["id"]
    assert first == 77, first


@test
def reaps_orphans(a: Target) -> None:
    h = a.connect()
    seconds = a.slow
    h.run(1, "sh", "-c", f"for i in 1 2 3 4 5; do (sleep {seconds} >/dev/null 2>&1 </dev/null &) ; done")
    assert len(a.children()) == 5, a.children()
    deadline = time.monotonic() + 5 * seconds
    while a.children():
        assert time.monotonic() < deadline, a.children()
        time.sleep(0.1)


@test
def counts_for_metrics(a: Target) -> None:
    h = a.connect()
    info = h.call("info")
    assert info["uptime_ms"] > 0 and info["memory"]["total"] > 1 << 20 and info["cpu"]["cpus"] >= 1 and len(info["load"]) == 3
    uptime = float(h.run(1, "cat", "/proc/uptime")[1].split()[0])
    assert abs(info["uptime_ms"] / 1000 - uptime) < 5 * a.slow
    lo = next(n for n in info["networks"] if n["name"] == "lo")
    assert lo["rx_bytes"] == lo["tx_bytes"]
    assert h.call("sync") == {}
    for wrong, code in (({}, "bad_request"), ({"device": "vda"}, "bad_request"), ({"device": "/nothing"}, "io")):
        fails(code, h.call, "grow", **wrong)


@host_test
def survives_floods_of_calls(a: Target) -> None:
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
    assert sent < 40 << 20 and a.resident() < (600 << 20 if a.sanitized else 8 << 20), (sent, a.resident())
    h = a.connect()
    assert h.ping() < 5


@host_test
def shuts_down_with_grace(a: Agent) -> None:
    h = a.connect()
    h.call("exec", id=1, argv=["sh", "-c", "trap '' TERM; sleep 600"])
    time.sleep(0.2)
    started = time.monotonic()
    h.call("shutdown", how="poweroff", grace=300)
    assert a.process.wait(10) == 0
    assert time.monotonic() - started >= 0.29
    a.again()
