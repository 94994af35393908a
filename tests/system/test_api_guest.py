"""The API on real guests: a daemon process, one machine, everything a client does with it over HTTP and WebSockets."""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from api_daemon import DaemonProcess, daemon_process, hear, say
from leaks import processes, wait_gone
from stoker.api import websocket as wire
from stoker.api.models import OutputMode, StartProcess, Terminal

MIB = 1 << 20


@pytest.fixture(scope="module")
def daemon(session_root: Path, data_dir: Path, accelerator: str) -> Iterator[DaemonProcess]:
    directory = Path(tempfile.mkdtemp(prefix="api", dir=session_root))
    with daemon_process(directory, data_dir, accelerator) as found:
        found.create(name="box", env={"COLOUR": "green"}, labels={"team": "a"}, hostname="gast")
        yield found
    assert not wait_gone(lambda: [str(process) for process in processes(directory)])
    assert not (directory / "run/stoker.sock").exists() and not list((directory / "run/sandboxes").iterdir())
    assert not list((directory / "data/pool/clones").iterdir())


def test_what_a_sandbox_says_of_itself(daemon: DaemonProcess) -> None:
    box = daemon.call("GET", "/sandboxes/box")
    assert (box["state"], box["name"], box["labels"], box["hostname"]) == ("running", "box", {"team": "a"}, "gast")
    assert all(box["versions"][part] for part in ("daemon", "agent", "protocol", "kernel", "vmm", "accelerator"))
    assert box["started_at"] >= box["created_at"] and box["resources"]["memory"] == 192 * MIB
    assert {"exec", "freeze", "stop", "destroy"} <= set(box["actions"])
    assert daemon.call("POST", "/sandboxes/box/ping")["ms"] < 5000


def test_run_and_wait_in_the_guest(daemon: DaemonProcess) -> None:
    result = daemon.exec("box", "sh", "-c", "echo $COLOUR; hostname; echo e >&2; exit 7")
    assert (result["exit_code"], result["stdout"], result["stderr"]) == (7, "green\ngast\n", "e\n")
    assert daemon.exec("box", "sh", "-c", "kill -TERM $$")["signal"] == 15
    raw = daemon.exec("box", "cat", stdin=base64.b64encode(bytes(range(256))).decode(), stdin_base64=True)
    assert raw["stdout_base64"] and base64.b64decode(raw["stdout"]) == bytes(range(256))
    where = daemon.exec("box", "sh", "-c", "id -un; pwd; echo $A", user="nobody", cwd="/usr", env={"A": "b c"})
    assert where["stdout"] == "nobody\n/usr\nb c\n"
    timed = daemon.exec("box", "sh", "-c", "sleep 60 & wait", timeout=1.0)
    assert timed["timed_out"] and timed["signal"] == 9
    cut = daemon.exec("box", "head", "-c", str(8 * MIB), "/dev/zero", max_output=1000)
    assert cut["stdout_truncated"] and cut["exit_code"] == 0
    assert daemon.exec("box", "sh", "-c", "ulimit -n", rlimits={"NOFILE": [64, 128]})["stdout"] == "64\n"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"argv": ["no-such-command"]}, 422, "no_such_command"),
        ({"argv": ["/etc/passwd"]}, 422, "not_executable"),
        ({"argv": ["true"], "user": "no-such-user"}, 400, "no_such_user"),
        ({"argv": ["true"], "cwd": "/no/such"}, 400, "no_such_directory"),
        ({"argv": ["true"], "rlimits": {"NOPE": [1, 1]}}, 400, "bad_rlimit"),
    ],
)
def test_commands_that_cannot_be_run_say_why(daemon: DaemonProcess, body: dict[str, Any], status: int, code: str) -> None:
    assert daemon.call("POST", "/sandboxes/box/exec", status, json=body)["code"] == code


def test_a_client_that_goes_away_ends_what_it_ran(daemon: DaemonProcess) -> None:
    import httpx

    with pytest.raises(httpx.ReadTimeout):
        daemon.http.post("/v1/sandboxes/box/exec", json={"argv": ["sleep", "4711"]}, timeout=1.5)
    deadline = time.monotonic() + 15
    while daemon.exec("box", "sh", "-c", "grep -al 471[1] /proc/[0-9]*/cmdline || true")["stdout"].strip():
        assert time.monotonic() < deadline
        time.sleep(0.2)


# -- WebSockets -----------------------------------------------------------------------------------------------------------------


def _stream(daemon: DaemonProcess, process: StartProcess, **rest: Any) -> ClientConnection:
    socket = daemon.websocket("/sandboxes/box/processes/stream")
    say(socket, wire.Start(process=process, **rest))
    hear(socket, wire.Attached)
    return socket


def _all(socket: ClientConnection) -> tuple[bytes, bytes, Any]:
    parts: dict[int, list[bytes]] = {1: [], 2: []}
    owed = 0
    while True:
        frame = socket.recv(timeout=120)
        if isinstance(frame, str):
            message = wire.decode_daemon(frame)
            assert not isinstance(message, wire.Failure), message
            if isinstance(message, wire.Exit):
                return b"".join(parts[1]), b"".join(parts[2]), message.process
            continue
        stream, _, data = wire.decode_data(frame)
        parts[stream].append(bytes(data))
        owed += len(data)
        if owed < 32 << 10:
            # The daemon closes behind the last byte, and this client drops what it has not read when a send then fails.
            continue
        try:
            say(socket, wire.Ack(bytes=owed))
            owed = 0
        except ConnectionClosed:
            pass


def test_streams_apart_and_in_order(daemon: DaemonProcess) -> None:
    with _stream(daemon, StartProcess(argv=["sh", "-c", "cat; echo err >&2; exit 3"], stdin=True)) as socket:
        socket.send(wire.encode_data(wire.STDIN, 0, b"in"))
        say(socket, wire.CloseStdin())
        out, err, ended = _all(socket)
    assert (out, err, ended.exit_code) == (b"in", b"err\n", 3)


def test_a_terminal_is_one_and_can_be_resized(daemon: DaemonProcess) -> None:
    shell = StartProcess(argv=["sh"], terminal=Terminal(rows=30, cols=100), stdin=True)
    with _stream(daemon, shell) as socket:
        say(socket, wire.Resize(rows=41, cols=123))
        time.sleep(0.3)
        socket.send(wire.encode_data(wire.STDIN, 0, b"tty; stty size; exit 5\n"))
        out, err, ended = _all(socket)
    assert b"/dev/pts/" in out and b"41 123" in out and err == b"" and ended.exit_code == 5


def test_ctrl_c_reaches_the_terminals_process(daemon: DaemonProcess) -> None:
    with _stream(daemon, StartProcess(argv=["sleep", "100"], terminal=Terminal(), stdin=True)) as socket:
        time.sleep(0.3)
        socket.send(wire.encode_data(wire.STDIN, 0, b"\x03"))
        assert _all(socket)[2].signal == 2


@pytest.mark.parametrize("size", [24 * MIB, pytest.param(1024 * MIB, marks=[pytest.mark.full, pytest.mark.timeout(1200)])])
def test_much_flows_both_ways_in_bounded_memory(daemon: DaemonProcess, size: int) -> None:
    before = daemon.resident()
    piece = bytes(range(256)) * 256
    peak = before
    with _stream(daemon, StartProcess(argv=["cat"], stdin=True)) as socket:
        room = threading.Semaphore(wire.STDIN_WINDOW // len(piece))

        def send() -> None:
            for _ in range(size // len(piece)):
                room.acquire()
                socket.send(wire.encode_data(wire.STDIN, 0, piece))
            say(socket, wire.CloseStdin())

        sender = threading.Thread(target=send)
        sender.start()
        digest, received, acked = hashlib.sha256(), 0, 0
        while True:
            frame = socket.recv(timeout=120)
            if isinstance(frame, bytes):
                stream, offset, data = wire.decode_data(frame)
                assert (stream, offset) == (wire.STDOUT, received)
                digest.update(data)
                received += len(data)
                try:
                    say(socket, wire.Ack(bytes=len(data)))
                except ConnectionClosed:
                    pass
                if received % (4 * MIB) < len(data):
                    peak = max(peak, daemon.resident())
                continue
            message = wire.decode_daemon(frame)
            if isinstance(message, wire.Ack):
                acked += message.bytes
                while acked >= len(piece):
                    acked -= len(piece)
                    room.release()
            elif isinstance(message, wire.Exit):
                break
        sender.join()
    expected = hashlib.sha256()
    for _ in range(size // len(piece)):
        expected.update(piece)
    assert received == size and digest.digest() == expected.digest()
    assert peak - before < 24 * MIB


def test_any_number_attach_to_one_process(daemon: DaemonProcess) -> None:
    script = "for i in $(seq 2000); do echo line $i; done; read x; echo end $x"
    started = daemon.call(
        "POST", "/sandboxes/box/processes", 201, json={"argv": ["sh", "-c", script], "stdin": True, "tag": "many"}
    )
    sockets = [daemon.websocket("/sandboxes/box/processes/many/attach") for _ in range(5)]
    for number, socket in enumerate(sockets):
        say(socket, wire.Attach(stdout=None if number % 2 else 7))
        assert hear(socket, wire.Attached).process.id == started["id"]
    sockets[0].close()
    daemon.call("POST", f"/sandboxes/box/processes/{started['id']}/stdin", 204, json={"data": "it\n"})
    expected = b"".join(b"line %d\n" % (i + 1) for i in range(2000)) + b"end it\n"
    for number, socket in enumerate(sockets[1:], 1):
        out, _, ended = _all(socket)
        assert out == (expected if number % 2 else expected[7:]) and ended.exit_code == 0
        socket.close()
    with daemon.websocket(f"/sandboxes/box/processes/{started['id']}/attach") as late:  # just ended: the ring is still there
        say(late, wire.Attach(stdout=len(expected) - 7))
        hear(late, wire.Attached)
        assert _all(late)[0] == b"end it\n"
    daemon.call("DELETE", f"/sandboxes/box/processes/{started['id']}", 204)
    assert daemon.call("GET", f"/sandboxes/box/processes/{started['id']}", 404)["code"] == "process_unknown"


def test_a_client_that_does_not_lose_a_byte_holds_the_process_back_while_it_is_there(daemon: DaemonProcess) -> None:
    writer = StartProcess(argv=["sh", "-c", f"head -c {6 * MIB} /dev/zero; echo done > /tmp/written"], mode=OutputMode.DISCARD)
    socket = _stream(daemon, writer, window=64 << 10)
    time.sleep(1)
    assert daemon.exec("box", "test", "-e", "/tmp/written")["exit_code"] == 1
    socket.close()
    deadline = time.monotonic() + 20
    while daemon.exec("box", "test", "-e", "/tmp/written")["exit_code"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_signals_by_id_and_by_tag(daemon: DaemonProcess) -> None:
    base = "/sandboxes/box/processes"
    info = daemon.call("POST", base, 201, json={"argv": ["sleep", "1000"], "tag": "sleeper"})
    assert info["pid"] > 1 and info["running"]
    daemon.call("POST", f"{base}/sleeper/signal", 204, json={"signal": "SIGUSR1"})
    deadline = time.monotonic() + 10
    while (found := daemon.call("GET", f"{base}/{info['id']}"))["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found["signal"] == 10
    assert daemon.call("POST", f"{base}/sleeper/signal", 409, json={"signal": 9})["code"] == "process_ended"
    assert [p["id"] for p in daemon.call("GET", base + "?tag=sleeper")["items"]] == [info["id"]]


# -- states, events, metrics ----------------------------------------------------------------------------------------------------


def test_freeze_and_thaw(daemon: DaemonProcess) -> None:
    assert daemon.call("POST", "/sandboxes/box/freeze")["state"] == "frozen"
    refused = daemon.call("POST", "/sandboxes/box/exec", 409, json={"argv": ["true"]})
    assert refused["code"] == "wrong_state" and refused["details"]["state"] == "frozen"
    assert daemon.call("POST", "/sandboxes/box/thaw")["state"] == "running"
    assert daemon.exec("box", "true")["exit_code"] == 0


def test_metrics_are_sampled(daemon: DaemonProcess) -> None:
    deadline = time.monotonic() + 10
    while len(samples := daemon.call("GET", "/sandboxes/box/metrics")["samples"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert samples[-1]["memory_host"] > 16 * MIB and samples[-1]["cpu_seconds"] > 0
    assert samples[-1]["at"] > samples[-2]["at"]
    text = daemon.http.get("/metrics").text
    assert 'stoker_sandboxes{state="running"} 1.0' in text and "stoker_sandbox_memory_host_bytes" in text


def test_events_of_a_life(daemon: DaemonProcess) -> None:
    with daemon.http.stream("GET", "/v1/sandboxes/box/events/stream", headers={"Last-Event-ID": "0"}) as stream:
        kinds, states = set(), []
        for line in stream.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line[6:])
                kinds.add(event["kind"])
                states.append(event["data"].get("state"))
                if "frozen" in states or "running" in states:
                    break
        assert "running" in states or "frozen" in states, kinds


def test_the_console_can_be_read(daemon: DaemonProcess) -> None:
    daemon.exec("box", "sh", "-c", "echo word on the console > /dev/console")
    deadline = time.monotonic() + 10
    while "word on the console" not in (part := daemon.call("GET", "/sandboxes/box/console"))["text"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert part["next"] - part["offset"] >= len("word on the console")


def test_an_impossible_create_is_refused_at_once(daemon: DaemonProcess) -> None:
    began = time.monotonic()
    refused = daemon.call("POST", "/sandboxes", 429, json={"image": "debian:12", "memory": 8 << 40})
    assert refused["code"] == "capacity_exhausted" and time.monotonic() - began < 2
    taken = daemon.call("POST", "/sandboxes", 409, json={"image": "debian:12", "name": "box"})
    assert taken["code"] == "name_taken"
    unknown = daemon.http.post("/v1/sandboxes", json={"image": "debian:nosuchsuite"})
    assert unknown.status_code in (400, 404) and unknown.json()["hint"]
    assert [box["name"] for box in daemon.call("GET", "/sandboxes?state=running")["items"]] == ["box"]


def test_a_paused_one_is_resumed_by_its_use(daemon: DaemonProcess) -> None:
    before = daemon.call("POST", "/sandboxes/box/exec", json={"argv": ["cat", "/proc/sys/kernel/random/boot_id"]})
    paused = daemon.call("POST", "/sandboxes/box/pause")
    assert paused["state"] == "paused" and "resume" in paused["actions"]
    operation = daemon.call("GET", f"/operations/{paused['operation']}")
    assert operation["kind"] == "pause" and operation["state"] == "succeeded" and operation["steps"]["save"] > 0
    after = daemon.call("POST", "/sandboxes/box/exec", json={"argv": ["cat", "/proc/sys/kernel/random/boot_id"]})
    assert after["stdout"] == before["stdout"]
    daemon.call("POST", "/sandboxes/box/pause")
    assert daemon.call("POST", "/sandboxes/box/resume")["state"] == "running"


# -- ends -----------------------------------------------------------------------------------------------------------------------


def test_the_daemon_may_be_killed_and_nothing_is_lost(daemon: DaemonProcess) -> None:
    before = daemon.call("GET", "/sandboxes/box")
    script = "i=0; while [ $i -lt 40 ]; do echo tick $i; i=$((i+1)); sleep 0.1; done"
    started = daemon.call("POST", "/sandboxes/box/processes", 201, json={"argv": ["sh", "-c", script], "tag": "ticks"})
    socket = daemon.websocket("/sandboxes/box/processes/ticks/attach")
    say(socket, wire.Attach())
    hear(socket, wire.Attached)
    daemon.kill()
    with pytest.raises(ConnectionClosed):
        while True:
            socket.recv(timeout=10)
    began = time.monotonic()
    daemon.start()
    assert time.monotonic() - began < 10
    after = daemon.call("GET", "/sandboxes/box")
    assert (after["id"], after["state"], after["started_at"]) == (before["id"], "running", before["started_at"])
    with daemon.websocket(f"/sandboxes/box/processes/{started['id']}/attach") as again:
        say(again, wire.Attach())
        assert hear(again, wire.Attached).process.tag == "ticks"
        out, _, ended = _all(again)
    assert out == b"".join(b"tick %d\n" % i for i in range(40)) and ended.exit_code == 0


def test_a_leased_sandbox_ends_with_its_client(daemon: DaemonProcess) -> None:
    box = daemon.create(name="leased", lease=True)
    socket = daemon.websocket("/sandboxes/leased/lease")
    hear(socket, wire.Leased)
    waiting = daemon.websocket("/sandboxes/leased/lease")  # a second holder
    hear(waiting, wire.Leased)
    waiting.close()
    assert daemon.call("GET", "/sandboxes/leased")["state"] == "running"
    socket.socket.close()
    began = time.monotonic()
    daemon.call("GET", f"/sandboxes/{box['id']}/wait?timeout=20", 204)
    assert time.monotonic() - began < 3


def test_a_timeout_ends_a_sandbox(daemon: DaemonProcess) -> None:
    box = daemon.create(name="brief")
    told = daemon.call("PUT", "/sandboxes/brief/timeout", json={"timeout": {"seconds": 1, "mode": "absolute"}})
    assert told["expires_at"] is not None
    daemon.call("GET", f"/sandboxes/{box['id']}/wait?timeout=30", 204)


def test_stop_keeps_the_disk_and_start_boots_from_it(daemon: DaemonProcess) -> None:
    daemon.create(name="disk")
    daemon.exec("disk", "sh", "-c", "echo kept > /root/kept; sync")
    assert daemon.call("POST", "/sandboxes/disk/stop", json={"grace": 2})["state"] == "stopped"
    assert daemon.call("POST", "/sandboxes/disk/exec", 409, json={"argv": ["true"]})["hint"]
    assert daemon.call("POST", "/sandboxes/disk/start")["state"] == "running"
    assert daemon.exec("disk", "cat", "/root/kept")["stdout"] == "kept\n"
    daemon.call("DELETE", "/sandboxes/disk", 204)
    daemon.call("GET", "/sandboxes/disk", 404)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_two_hundred_streams_at_once(daemon: DaemonProcess) -> None:
    daemon.create(name="wide", memory=512 * MIB)
    sockets = []
    for number in range(200):
        socket = daemon.websocket("/sandboxes/wide/processes/stream")
        say(socket, wire.Start(process=StartProcess(argv=["sh", "-c", f"echo {number}; cat"], stdin=True)))
        sockets.append(socket)
    for number, socket in enumerate(sockets):
        hear(socket, wire.Attached)
        socket.send(wire.encode_data(wire.STDIN, 0, b"x%d" % number))
        say(socket, wire.CloseStdin())
    for number, socket in enumerate(sockets):
        out, _, ended = _all(socket)
        assert (out, ended.exit_code) == (b"%d\nx%d" % (number, number), 0)
        socket.close()


def test_an_idle_daemon_is_small_and_still(daemon: DaemonProcess) -> None:
    assert daemon.resident() < 100 * MIB
