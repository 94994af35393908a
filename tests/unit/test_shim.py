"""The supervisor, with small programs in the VMM's place: lifetimes, descriptors, logs, records, the network filter."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from shim_pipes import ENVIRONMENT, Pipes, ended, gone, pipes
from stoker.errors import HostError
from stoker.host.binaries import shim_path
from stoker.host.process import ProcessIdentity
from stoker.network.user import UserNetwork, plan_user_network
from stoker.vmm.console import GAP, clean_lines, follow, tail
from stoker.vmm.machine import MachineExit
from stoker.vmm.shim import ShimOptions, exit_of, filter_rules, find, read_exit, shim_command, start

__all__ = ["pipes"]
pytestmark = pytest.mark.anyio

SLEEP = ("/bin/sleep", "600")


async def run(pipes: Pipes, *argv: str, **options: object) -> None:
    """Runs a VMM to its end."""
    await ended(await start(shim_path(), pipes.options(**options), argv, ENVIRONMENT))


def test_the_command_line() -> None:
    options = ShimOptions(
        Path("/d"), 5, 4096, owner=6, passed=(7, 8), user=9000, groups=(104,), device=Path("/dev/kvm"),
        cgroup=Path("/sys/fs/cgroup/x"), net_out=10, net_in=11, net_deny=Path("/d/net.deny"),
    )  # fmt: skip
    assert (
        shim_command(Path("/shim"), options, 4, ["/qemu", "-M", "none"])
        == (
            "/shim --dir /d --status-fd 4 --console-fd 5 --console-bytes 4096 --owner-fd 6 --uid 9000 --gid 9000 --groups 104"
            " --device /dev/kvm --cgroup /sys/fs/cgroup/x/cgroup.procs --net-out 10 --net-in 11 --net-deny /d/net.deny"
            " --pass-fd 7 --pass-fd 8 -- /qemu -M none"
        ).split()
    )
    assert options.descriptors() == (5, 6, 10, 11, 7, 8)


async def test_records_and_exit_codes(pipes: Pipes) -> None:
    pair = await start(shim_path(), pipes.options(), ("/bin/sh", "-c", "sleep 0.2; exit 7"), ENVIRONMENT)
    assert find(pipes.directory) == pair and pair.vmm.exe and pair.shim.exe == str(shim_path().resolve())
    assert json.loads((pipes.directory / "shim.json").read_text())["vmm"] == {"pid": pair.vmm.pid, "start": pair.vmm.start}
    await ended(pair)
    assert find(pipes.directory) is None
    assert exit_of(read_exit(pipes.directory), False) == MachineExit(7, None)
    await run(pipes, "/bin/sh", "-c", "kill -SEGV $$")
    assert exit_of(read_exit(pipes.directory), False) == MachineExit(None, 11)
    assert exit_of(None, True) == MachineExit(None, 9, True)


async def test_a_program_that_cannot_be_executed(pipes: Pipes) -> None:
    with pytest.raises(HostError) as caught:
        await start(shim_path(), pipes.options(), ("/nonexistent/qemu",), ENVIRONMENT)
    assert caught.value.code == "vmm_not_started" and "No such file" in caught.value.message
    assert read_exit(pipes.directory) == {"code": None, "signal": None, "cause": "exec", "errno": 2, "oom": False}
    assert not (pipes.directory / "shim.json").exists()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    named = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children]
    assert not [words for words in named if os.fsencode(pipes.directory) in words], "the shim was not reaped"


async def test_the_vmm_inherits_what_is_named_and_nothing_else(pipes: Pipes) -> None:
    stray = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(stray, True)
    try:
        script = f"""
            ls -l /proc/self/fd; ls -l /proc/$PPID/fd; readlink /proc/self/fd/0
            echo to the console >/dev/fd/{pipes.console}
        """
        await run(pipes, "/bin/sh", "-c", script)
    finally:
        os.close(stray)
    log = "\n".join(tail(pipes.directory / "vmm.log", 100))
    assert "/dev/zero" not in log and log.endswith("/dev/null")
    mine, _, _ = log.partition("total 0\n") if not log.startswith("total") else log.removeprefix("total 0\n").partition("total 0\n")
    numbers = {line.split(" -> ")[0].split()[-1] for line in mine.splitlines() if " -> " in line and "/proc/" not in line}
    assert numbers == {"0", "1", "2", str(pipes.console)}
    assert tail(pipes.directory / "console.log") == ("to the console",)


async def test_the_vmm_is_in_a_session_of_its_own_with_clean_signals(pipes: Pipes) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        await run(pipes, "/bin/sh", "-c", "cat /proc/self/status /proc/self/stat; ulimit -c; pwd")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    lines = tail(pipes.directory / "vmm.log", 200)
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    own = 0b111 << 31  # the C library's own signals, 32 to 34, which it does not let anyone touch
    assert int(status["SigBlk"], 16) == int(status["SigIgn"], 16) & ~own == 0 and status["NoNewPrivs"].strip() == "1"
    assert lines[-2:] == ("0", "/")
    assert int(lines[-3].split()[5]) != os.getsid(0)


async def test_death_of_the_owner_takes_the_vmm_along(pipes: Pipes) -> None:
    theirs, ours = pipes.owner()
    pair = await start(shim_path(), pipes.options(owner=theirs), SLEEP, ENVIRONMENT)
    os.write(ours, b"words on the pipe mean nothing")
    await asyncio.sleep(0.05)
    assert pair.vmm.alive()
    os.close(ours)
    assert await gone(lambda: not pair.vmm.alive()) < 1.0
    await ended(pair)
    assert read_exit(pipes.directory) == {"code": None, "signal": 9, "cause": "owner", "errno": 0, "oom": False}


async def test_an_owner_that_died_before_the_start_leaves_nothing(pipes: Pipes) -> None:
    theirs, ours = pipes.owner()
    os.close(ours)
    with pytest.raises(HostError) as caught:
        await start(shim_path(), pipes.options(owner=theirs), SLEEP, ENVIRONMENT)
    assert caught.value.code == "vmm_not_started" and list(pipes.directory.iterdir()) == []


async def test_death_of_the_shim_takes_the_vmm_along_at_once(pipes: Pipes) -> None:
    pair = await start(shim_path(), pipes.options(), SLEEP, ENVIRONMENT)
    os.kill(pair.shim.pid, signal.SIGKILL)
    assert await gone(lambda: not pair.vmm.alive()) < 0.5
    os.waitpid(pair.shim.pid, 0)  # noqa: ASYNC222
    assert read_exit(pipes.directory) is None


@pytest.mark.parametrize("delay", [0, 0.0005, 0.001, 0.002, 0.004])
async def test_killed_at_any_moment_of_its_start_the_shim_leaves_no_vmm(pipes: Pipes, delay: float) -> None:
    """Whoever dies between fork and PDEATHSIG, nobody is left: the program carries a word to be found by."""
    marker = f"{pipes.directory}/marker"
    argv = shim_command(shim_path(), pipes.options(passed=()), 2, ("/bin/sleep", "600", marker))
    argv = ["600.25" if word == "600" else word for word in argv]
    for _ in range(8):
        child = subprocess.Popen(argv[: argv.index(marker)], stderr=subprocess.DEVNULL, pass_fds=(pipes.console_read,))  # noqa: ASYNC220
        time.sleep(delay)  # noqa: ASYNC251 - the very moment counts
        child.kill()
        child.wait()
    await asyncio.sleep(0.1)
    sleepers = [
        entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and _words(entry)[:2] == ["/bin/sleep", "600.25"]
    ]
    assert sleepers == []


def _words(entry: Path) -> list[str]:
    try:
        return (entry / "cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


async def test_sigterm_ends_the_vmm_and_sighup_does_not(pipes: Pipes) -> None:
    pair = await start(shim_path(), pipes.options(), SLEEP, ENVIRONMENT)
    os.kill(pair.shim.pid, signal.SIGHUP)
    await asyncio.sleep(0.05)
    assert pair.vmm.alive()
    os.kill(pair.shim.pid, signal.SIGTERM)
    await ended(pair)
    assert exit_of(read_exit(pipes.directory), False) == MachineExit(None, 9, True)


async def test_logs_are_bounded_and_end_with_the_last_word(pipes: Pipes) -> None:
    script = f"""
        exec 5>/dev/fd/{pipes.console}
        i=0; while [ $i -lt 20000 ]; do echo line $i; echo line $i >&5; i=$((i+1)); done; echo last >&5
    """
    await run(pipes, "/bin/sh", "-c", script, console_bytes=8192)
    sizes = {path.name: path.stat().st_size for path in pipes.directory.glob("*.log*")}
    assert sizes["console.log.1"] == 4096 and 0 < sizes["console.log"] <= 4096
    assert sizes["vmm.log"] <= 128 << 10 and sizes.get("vmm.log.1", 0) <= 128 << 10
    lines = tail(pipes.directory / "console.log", 500)
    assert lines[-2:] == ("line 19999", "last")
    assert [int(line.split()[1]) for line in lines[-400:-1]] == list(range(19601, 20000)), "no hole where the halves meet"


async def test_a_log_that_cannot_be_written_does_not_stop_the_machine(pipes: Pipes) -> None:
    (pipes.directory / "console.log.1").mkdir()
    await run(pipes, "/bin/sh", "-c", f"head -c 100000 /dev/zero >/dev/fd/{pipes.console}; exit 3", console_bytes=8192)
    assert exit_of(read_exit(pipes.directory), False).code == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change the user")
async def test_a_user_of_its_own(pipes: Pipes) -> None:
    theirs, ours = pipes.owner()
    options = pipes.options(owner=theirs, user=0x5A000001, groups=(4242,))
    pair = await start(shim_path(), options, SLEEP, ENVIRONMENT)
    vmm, shim = (Path(f"/proc/{process.pid}/status").read_text() for process in (pair.vmm, pair.shim))
    assert f"Uid:\t{'	'.join([str(0x5A000001)] * 4)}" in vmm and "Groups:\t4242" in vmm and "CapEff:\t0000000000000000" in vmm
    assert "CapEff:\t0000000000000020" in shim, "CAP_KILL and no other"
    os.close(ours)
    assert await gone(lambda: not pair.vmm.alive()) < 1.0
    await ended(pair)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make device nodes")
async def test_a_device_of_its_own(pipes: Pipes) -> None:
    device = pipes.directory / "device"
    os.mknod(device, 0o600 | 0o020000, os.makedev(1, 5))
    script = f"stat -c '%u %a %t:%T' {device}; head -c 3 {device} | wc -c"
    pipes.directory.chmod(0o711)
    pipes.directory.parent.chmod(0o711)
    await run(pipes, "/bin/sh", "-c", script, user=0x5A000002, device=device)
    assert tail(pipes.directory / "vmm.log") == (f"{0x5A000002} 600 1:5", "3")
    assert device.stat().st_uid == 0


async def test_a_control_group(pipes: Pipes) -> None:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    group = next((Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"), Path("/none")) / f"stoker-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no control group can be made here")
    try:
        pair = await start(shim_path(), pipes.options(cgroup=group), SLEEP, ENVIRONMENT)
        assert (group / "cgroup.procs").read_text().split() == [str(pair.vmm.pid)]
        os.kill(pair.shim.pid, signal.SIGTERM)
        await ended(pair)
        with pytest.raises(HostError) as caught:
            await start(shim_path(), pipes.options(cgroup=group / "none"), SLEEP, ENVIRONMENT)
        assert "cgroup" in caught.value.message
    finally:
        group.rmdir()


def _memory_group(limit: int) -> Path | None:
    """A control group with a limit on memory, of either version; none where we may not make one."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        name = "memory.max" if kind == "cgroup2" else "memory.limit_in_bytes"
        if kind != "cgroup2" and not (kind == "cgroup" and "memory" in options.split(",")):
            continue
        group = Path(mount) / f"stoker-test-oom-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(limit))
            return group
        except OSError:
            group.rmdir()
    return None


async def test_a_kill_for_lack_of_memory_is_told_from_any_other(pipes: Pipes) -> None:
    group = _memory_group(24 << 20)
    if group is None:
        pytest.skip("no control group with a memory limit can be made here")
    try:
        await run(pipes, "/usr/bin/tail", "/dev/zero", cgroup=group)
        assert exit_of(read_exit(pipes.directory), False) == MachineExit(None, 9, False, True)
    finally:
        group.rmdir()
    pair = await start(shim_path(), pipes.options(), SLEEP, ENVIRONMENT)
    os.kill(pair.vmm.pid, signal.SIGKILL)
    await ended(pair)
    assert exit_of(read_exit(pipes.directory), False) == MachineExit(None, 9)


@pytest.mark.parametrize(
    "words",
    [
        ["--dir", "/nonexistent"],
        ["--dir", "/tmp", "--owner-fd", "77"],
        ["--dir", "/tmp", "--uid", "5"],
        ["--dir", "/tmp", "--net-out", "2", "--net-in", "2"],
        ["--dir", "/tmp", "--bogus", "1"],
        [],
    ],
)
def test_bad_options_start_nothing(words: list[str], short_dir: Path) -> None:
    made = short_dir / "made"
    done = subprocess.run(
        [shim_path(), *words, "--", "/usr/bin/touch", made], stdin=subprocess.DEVNULL, capture_output=True, timeout=10
    )
    assert done.returncode == 125 and done.stderr.startswith(b"stoker-shim: ") and not made.exists()


# ---------------------------------------------------------------------------------------------------------- the filter

NETWORK = plan_user_network(("203.0.113.7/32", "8.8.4.4/32"))


def ipv4(to: str, protocol: int = 17, port: int = 80, **change: int) -> bytes:
    """An Ethernet frame; ``change`` sets bytes of the packet by offset (b0=0x46: the first byte)."""
    length = 40 if protocol == 6 else 28
    packet = bytearray(
        struct.pack("!BBHHHBBH4s4s", 0x45, 0, length, 1, 0, 64, protocol, 0, bytes([10, 0, 2, 15]), socket.inet_aton(to))
    )
    packet += struct.pack("!HH", 40000, port) + bytes(length - 24)
    for name, value in change.items():
        packet[int(name[1:])] = value
    return bytes(12) + b"\x08\x00" + bytes(packet)


def arp() -> bytes:
    return b"\xff" * 6 + bytes(6) + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1) + bytes(20)


PASSES = {
    "arp": arp(),
    "udp to a public address": ipv4("1.1.1.1"),
    "tcp to a public address": ipv4("8.8.8.8", 6, 443),
    "ping": ipv4("1.1.1.1", 1),
    "padded": ipv4("1.1.1.1") + bytes(18),
    "the largest": ipv4("1.1.1.1", b2=0x05, b3=0xDC) + bytes(1514 - 42),
    "do not fragment": ipv4("1.1.1.1", b6=0x40),
    "dns by udp": ipv4("10.0.2.3", 17, 53),
    "dns by tcp": ipv4("10.0.2.3", 6, 53),
}
DROPPED = {
    "gateway": ipv4("10.0.2.2", 6, 22),
    "gateway's port 53": ipv4("10.0.2.2", 17, 53),
    "nameserver's other ports": ipv4("10.0.2.3", 6, 22),
    "nameserver ping": ipv4("10.0.2.3", 1, 53),
    "nameserver without ports": ipv4("10.0.2.3", 17, 53, b3=24),
    "nameserver tcp cut short": ipv4("10.0.2.3", 6, 53, b3=28),
    "neighbour": ipv4("10.0.2.77"),
    "loopback": ipv4("127.0.0.1"),
    "this host": ipv4("0.0.0.0"),
    "link local": ipv4("169.254.169.254"),
    "private 10": ipv4("10.255.1.1"),
    "private 172": ipv4("172.31.0.1"),
    "private 192": ipv4("192.168.1.1"),
    "carrier": ipv4("100.127.0.1"),
    "multicast": ipv4("224.0.0.251"),
    "broadcast": ipv4("255.255.255.255"),
    "the host's public address": ipv4("8.8.4.4", 6, 22),
    "options": ipv4("1.1.1.1", b0=0x46),
    "short header": ipv4("1.1.1.1", b0=0x44),
    "version 6 in version 4": ipv4("1.1.1.1", b0=0x65),
    "first fragment": ipv4("1.1.1.1", b6=0x20),
    "later fragment": ipv4("1.1.1.1", b7=0x10),
    "fragment to the nameserver": ipv4("10.0.2.3", 17, 53, b6=0x20),
    "reserved flag": ipv4("1.1.1.1", b6=0x80),
    "longer than the frame": ipv4("1.1.1.1", b3=29),
    "shorter than its header": ipv4("1.1.1.1", b3=19),
    "sctp": ipv4("1.1.1.1", 132),
    "ipv6": bytes(12) + b"\x86\xdd" + b"\x60" + bytes(60),
    "vlan": bytes(12) + b"\x81\x00\x00\x05" + ipv4("1.1.1.1")[12:],
    "length instead of a type": bytes(12) + b"\x00\x40" + bytes(64),
    "arp cut short": arp()[:41],
    "arp for something else": arp()[:16] + b"\x86\xdd" + arp()[18:],
    "header only": bytes(12) + b"\x08\x00",
    "nothing": b"",
    "jumbo": ipv4("1.1.1.1", b2=0x05, b3=0xDD) + bytes(1515 - 42),
    "huge": ipv4("1.1.1.1") + bytes(60000),
}


@dataclass
class Wire:
    """The VMM's side of both redirector sockets."""

    out: socket.socket
    back: socket.socket

    def send(self, *frames: bytes) -> None:
        self.out.sendall(b"".join(struct.pack("!I", len(frame)) + frame for frame in frames))

    async def receive(self, count: int) -> list[bytes]:
        loop, data, frames = asyncio.get_running_loop(), b"", []
        while len(frames) < count:
            async with asyncio.timeout(10):
                chunk = await loop.sock_recv(self.back, 1 << 16)
            assert chunk, "the filter closed the wire"
            data += chunk
            while len(data) >= 4 and len(data) >= 4 + int.from_bytes(data[:4], "big"):
                size = int.from_bytes(data[:4], "big")
                frames.append(data[4 : 4 + size])
                data = data[4 + size :]
        assert len(frames) == count and not data
        return frames


async def filtered(pipes: Pipes, network: UserNetwork = NETWORK) -> Wire:
    ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)]
    for pair in ends:
        for end in pair:
            pipes.stack.enter_context(end)
    (shim_out, out), (shim_in, back) = ends
    rules = pipes.directory / "net.deny"
    rules.write_text(filter_rules(network))
    options = pipes.options(net_out=shim_out.fileno(), net_in=shim_in.fileno(), net_deny=rules)
    await start(shim_path(), options, SLEEP, ENVIRONMENT)
    shim_out.close()
    shim_in.close()
    back.setblocking(False)
    return Wire(out, back)


MARK = ipv4("9.9.9.9", 17, 9)


async def test_what_passes_the_filter_and_what_does_not(pipes: Pipes) -> None:
    wire = await filtered(pipes)
    for name, frame in PASSES.items():
        wire.send(frame)
        assert await wire.receive(1) == [frame], name
    for name, frame in DROPPED.items():
        wire.send(frame, MARK)
        assert await wire.receive(1) == [MARK], name
    # All at once, and byte by byte: the framing does not depend on how the stream is cut.
    wire.send(*DROPPED.values(), *PASSES.values())
    assert await wire.receive(len(PASSES)) == list(PASSES.values())
    for byte in struct.pack("!I", len(MARK)) + MARK:
        wire.out.sendall(bytes([byte]))
    assert await wire.receive(1) == [MARK]


async def test_a_flood_into_a_full_wire_is_dropped_and_the_filter_goes_on(pipes: Pipes) -> None:
    """The VMM does not read while it writes: a filter that waited for it would hang both."""
    wire = await filtered(pipes)
    frame = ipv4("1.1.1.1", b2=0x05, b3=0xDC) + bytes(1514 - 42)
    await asyncio.to_thread(lambda: [wire.send(*[frame] * 100) for _ in range(40)])
    pair = find(pipes.directory)
    assert pair is not None
    assert int(Path(f"/proc/{pair.shim.pid}/statm").read_text().split()[1]) * 4096 < 2 << 20
    loop, got = asyncio.get_running_loop(), b""
    async with asyncio.timeout(10):
        while got[-len(MARK) :] != MARK:
            got += await loop.sock_recv(wire.back, 1 << 20)
            if len(got) % (len(frame) + 4) == 0:
                wire.send(MARK)
    assert got[: len(frame) + 4] == struct.pack("!I", len(frame)) + frame, "frames are whole or missing"
    assert 0 < len(got) < 4000 * len(frame)


async def test_nonsense_for_a_length_closes_the_wire(pipes: Pipes) -> None:
    wire = await filtered(pipes)
    wire.send(MARK)
    assert await wire.receive(1) == [MARK]
    wire.out.sendall(b"\xff\xff\xff\xff" + MARK)
    async with asyncio.timeout(10):
        assert await asyncio.get_running_loop().sock_recv(wire.back, 100) == b""
    pair = find(pipes.directory)
    assert pair is not None and pair.vmm.alive(), "the machine goes on without a network"


@pytest.mark.parametrize(
    "rules", ["", "nameserver 10.0.2.3\n", "deny 10.0.0.0/33\n", "deny 10.0.0/8\n", "allow 1.1.1.1/32\n", "deny 1.1.1.1\n"]
)
async def test_rules_that_cannot_be_read_start_nothing(pipes: Pipes, rules: str) -> None:
    path = pipes.directory / "net.deny"
    path.write_text(rules)
    one, two = socket.socketpair()
    with one, two, pytest.raises(HostError) as caught:
        await start(shim_path(), pipes.options(net_out=one.fileno(), net_in=two.fileno(), net_deny=path), SLEEP, ENVIRONMENT)
    assert "net-deny" in caught.value.message and find(pipes.directory) is None


# -------------------------------------------------------------------------------------------------------- the readers


def test_lines_are_cleaned() -> None:
    assert clean_lines(b"a\r\n\x1b[31mred\x1b[0m\n\n\xff\tb\n" + b"x" * 1000, 10) == ("a", "[31mred[0m", "�    b", "x" * 400)
    assert clean_lines(b"1\n2\n3\n", 2) == ("2", "3")


def test_tail_reads_both_halves(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    assert tail(log) == ()
    (tmp_path / "console.log.1").write_text("one\ntwo\nthr")
    assert tail(log) == ("one", "two", "thr")
    log.write_text("ee\nfour\n")
    assert tail(log, 3) == ("two", "three", "four")


async def test_follow_gives_everything_over_rotations_and_tells_of_a_gap(tmp_path: Path) -> None:
    log, older = tmp_path / "console.log", tmp_path / "console.log.1"
    older.write_text("a")
    log.write_text("b")
    done = False
    got: list[bytes] = []

    async def read() -> None:
        async for chunk in follow(log, lambda: done, interval=0.01):
            got.append(chunk)  # noqa: PERF401 - until() looks on

    async def until(text: bytes) -> None:
        async with asyncio.timeout(5):
            while b"".join(got) != text:
                await asyncio.sleep(0.005)

    reader = asyncio.create_task(read())
    await until(b"ab")
    with log.open("a") as file:
        file.write("c")
        log.rename(older)
        file.write("d")
        file.flush()
    log.write_text("e")
    await until(b"abcde")
    for text in ("f", "g", "h"):
        log.rename(older)
        log.write_text(text)
    await until(b"abcde" + GAP + b"gh")
    log.write_text("hi")
    done = True
    await asyncio.wait_for(reader, 5)
    assert b"".join(got) == b"abcde" + GAP + b"ghi"


def test_a_start_time_that_differs_is_another_process() -> None:
    me = ProcessIdentity.of(os.getpid())
    assert me.alive() and me.exe == os.path.realpath(sys.executable)
    assert not replace(me, start=me.start + 1).alive()
