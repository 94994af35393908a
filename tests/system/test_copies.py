"""Copies that are safe: two machines from one memory are no twins, and what nobody outside can change is said."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from restored_guests import Base, made_base, said, started
from stoker.errors import GuestError, NotFound
from stoker.guest.agent import Agent
from stoker.guest.channel import connect
from stoker.guest.connections import inet
from stoker.guest.copies import AfterRestore, BeforeSnapshot, Report
from stoker.guest.messages import ExecRequest, NetworkConfiguration, Resolver
from stoker.guest.process import Process
from stoker.network.user import plan_user_network
from stoker.settings import Settings
from stoker.vmm.memory import Delta, Scratch, capture

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

OLD_KEY, OLD_ID = "the original's key", "0123456789abcdef0123456789abcdef"
SSHD = """#!/bin/sh
trap 'cat /etc/ssh/ssh_host_ed25519_key > /run/reloaded' HUP
echo $$ > /run/sshd.pid
/usr/lib/sshd &
while :; do sleep 0.1; done
"""
SESSION = """#!/bin/sh
trap 'echo ended >> /run/sessions' HUP
while :; do sleep 0.1; done
"""
ECHO = r"""
use IO::Socket::INET; $| = 1;
my $l = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => 777, Listen => 1) or die; print "ready";
my $c = $l->accept; while (sysread($c, my $data, 99)) { syswrite($c, $data) }
"""
RESIDENT = r"""
use Socket; use IO::Handle; $| = 1; srand(7);
sub address {
    socket(my $s, AF_INET, SOCK_DGRAM, 0);
    ioctl($s, 0x8916, pack("a16 S n a4 x8", $_[0], AF_INET, 0, inet_aton($_[1]))) or die "$!";
}
address("lo:1", "192.0.2.1"); address("lo:2", "192.0.2.2");
sub pair {
    my ($from, $to) = @_;
    socket(my $l, AF_INET, SOCK_STREAM, 0); bind($l, sockaddr_in(0, inet_aton($to))) or die "$!"; listen($l, 1);
    my ($port) = sockaddr_in(getsockname($l));
    socket(my $c, AF_INET, SOCK_STREAM, 0); bind($c, sockaddr_in(0, inet_aton($from)));
    connect($c, sockaddr_in($port, inet_aton($to))) or die "$!"; accept(my $a, $l); $_->blocking(0) for $c, $a;
    return ($l, $c, $a);
}
my @outside = pair("192.0.2.1", "192.0.2.2"); my @inside = pair("127.0.0.1", "127.0.0.1");
sub state {
    my ($l, $c, $a) = @_;
    my $sent = syswrite($c, "x"); my $why = "$!"; select(undef, undef, undef, 0.05);
    my $got = sysread($a, my $b, 9);
    return $sent && $got ? "alive" : "gone ($why)";
}
while (<STDIN>) {
    open(my $u, "<", "/proc/uptime"); my ($up) = split ' ', <$u>; open($u, "<", "/dev/urandom"); sysread($u, my $r, 16);
    print join("|", $up, unpack("H*", $r), int(rand(1e9)), state(@outside), state(@inside)), "\n";
}
"""


@pytest.fixture
async def base(settings: Settings, short_dir: Path) -> AsyncIterator[Base]:
    async with made_base(settings, short_dir, plan_user_network([])) as base:
        yield base


async def put(agent: Agent, path: str, data: bytes, mode: str = "644") -> None:
    done = await agent.run(ExecRequest(["sh", "-c", f"mkdir -p $(dirname {path}); cat > {path}; chmod {mode} {path}"]), input=data)
    assert done.status.code == 0, done.stderr


async def ask(process: Process) -> list[str]:
    """A line of the resident process: uptime, urandom, its own random number, its connections outside and inside."""
    await process.stdin.write(b"\n")
    data = b""
    while not data.endswith(b"\n"):
        data += await process.stdout.read()
    return data.decode().strip().split("|")


async def skew(agent: Agent) -> float:
    """How far the guest's clock is off, at the least, in seconds: what one round trip of several can tell."""
    found = []
    for _ in range(10):
        before = time.time_ns()
        guest = await agent.get_time()
        after = time.time_ns()
        found.append(max(0, before - guest, guest - after) / 1e9)
    return min(found)


async def furnish(agent: Agent) -> None:
    """What a user may have in a machine that is copied."""
    await put(agent, "/etc/machine-id", f"{OLD_ID}\n".encode())
    await put(agent, "/var/lib/dbus/machine-id", f"{OLD_ID}\n".encode())
    await put(agent, "/etc/hosts", b"127.0.0.1 localhost\n127.0.1.1\tbox # this is box\n192.0.2.7 mailbox box.example\n")
    await put(agent, "/usr/sbin/sshd", SSHD.encode(), "755")
    await put(agent, "/usr/lib/sshd", SESSION.encode(), "755")
    for kind in ("ed25519", "rsa"):
        await put(agent, f"/etc/ssh/ssh_host_{kind}_key", OLD_KEY.encode(), "600")
        await put(agent, f"/etc/ssh/ssh_host_{kind}_key.pub", OLD_KEY.encode())
    for kind, name, script in (
        ("pre-snapshot", "10-first", "echo first $1 >> /srv/hooks"),
        ("pre-snapshot", "20-second", "echo second >> /srv/hooks"),
        ("post-restore", "10-after", "echo $1 $(cat /run/stoker/generation) $(hostname) >> /srv/hooks"),
        ("post-restore", "20-bad", "echo it does not work; exit 1"),
    ):
        await put(agent, f"/etc/stoker/hooks.d/{kind}/{name}", f"#!/bin/sh\n{script}\n".encode(), "755")
    if openssl := shutil.which("openssl"):
        await put(agent, "/usr/local/bin/openssl", Path(openssl).read_bytes(), "755")
        for library in ("libssl.so.3", "libcrypto.so.3"):
            found = next(Path("/usr/lib").glob(f"**/{library}"), None)
            if found is not None:
                await put(agent, f"/usr/local/lib/{library}", found.read_bytes())


IDENTITY = """
cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/boot_id; cat /etc/machine-id
LD_LIBRARY_PATH=/usr/local/lib openssl rand -hex 32 || cat /proc/sys/kernel/random/uuid
cat /etc/ssh/ssh_host_ed25519_key; cat /sys/class/net/eth0/address; hostname -I; hostname
"""


def words(number: int) -> AfterRestore:
    return AfterRestore(
        entropy=os.urandom(64),
        generation=number,
        hostname=f"copy{number}",
        machine_id=f"{number:032x}",
        network=NetworkConfiguration("eth0", f"10.0.2.{20 + number}/24", "10.0.2.2", f"52:54:00:53:4b:{20 + number}"),
        resolv=Resolver(["10.0.2.3"]),
        ssh_host_keys=[("/etc/ssh/ssh_host_ed25519_key", 0o600, f"key {number}")],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin", "COPY": str(number)},
    )


@asynccontextmanager
async def copied(base: Base, name: str, disk: bytes, delta: Delta, state: bytes) -> AsyncIterator[Agent]:
    spec = base.own(name)
    spec.disks[0].path.write_bytes(disk)
    async with started(spec, base.settings) as machine:
        await machine.restore(base.memory, delta, state)
        await machine.thaw()
        async with await connect(machine.channel(), fresh=False, timeout=60) as agent:
            yield agent


def state_of(report: Report, name: str) -> tuple[bool, str]:
    return next((hazard.handled, hazard.detail) for hazard in report.hazards if hazard.name == name)


async def test_two_copies_of_one_machine_are_no_twins(base: Base) -> None:
    async with base.restored("original") as (machine, agent):
        assert await said(agent, "cat /run/stoker/generation") == "0\n"
        await furnish(agent)
        resident = await agent.exec(ExecRequest(["perl", "-e", RESIDENT], stdin=True))
        first = await ask(resident)
        assert first[3:] == ["alive", "alive"]
        await said(agent, "setsid /usr/sbin/sshd < /dev/null > /dev/null 2>&1 & while ! test -s /run/sshd.pid; do sleep 0.1; done")
        echo = await agent.exec(ExecRequest(["perl", "-e", ECHO]))
        assert await echo.stdout.read() == b"ready"
        line = await agent.connect(inet(777))
        original = (await said(agent, IDENTITY)).splitlines()
        await agent.set_time(10**18)  # in 2001
        before = await agent.before_snapshot(BeforeSnapshot(freeze=True))
        assert not before.unhandled and list(before.steps) == ["hooks", "quiet"]
        assert state_of(before, "file_systems") == (True, "1 frozen")
        await machine.freeze()
        delta, state = capture(machine.vmm.pid, base.memory, Scratch()), await machine.device_state()
        disk = base.disk_of(machine)
        await machine.thaw()
        after = await agent.after_snapshot()
        assert state_of(after, "file_systems") == (True, "1 thawed")
        async with copied(base, "one", disk, delta, state) as one, copied(base, "two", disk, delta, state) as two:
            reports = [await copy.after_restore(words(number)) for number, copy in ((1, one), (2, two))]
            for report in reports:
                assert [hazard.name for hazard in report.unhandled] == ["hook:20-bad"], report.unhandled
                assert [hazard.name for hazard in report.hazards if hazard.beyond] == ["processes", "kernel_secrets"]
                assert "perl" in state_of(report, "processes")[1] and "exit 1" in state_of(report, "hook:20-bad")[1]
                assert state_of(report, "connections") == (True, "2 ended")
                assert state_of(report, "ssh_host_keys") == (True, "1 files written, 3 of other types removed")
            await check_copies(one, two, original)
            await check_residents(one, two, resident.id, float(first[0]))
            for copy in (one, two):
                with pytest.raises(NotFound):  # the far end is the original's
                    await copy.attach(line.process.id)
            # A copy of a copy has another boot id once more.
            boot_id = await said(one, "cat /proc/sys/kernel/random/boot_id")
            await one.after_restore(words(3))
            assert boot_id != await said(one, "cat /proc/sys/kernel/random/boot_id")
            assert await said(one, "grep -c boot_id /proc/self/mounts; hostname; grep -c copy3 /etc/hosts") == "1\ncopy3\n1\n"
        assert (await ask(resident))[3:] == ["alive", "alive"], "the original's connections are its own"
        await line.write(b"hello")
        assert await line.read() == b"hello"
        assert (await said(agent, IDENTITY)).splitlines()[2:4] == original[2:4]
        assert await said(agent, "cat /srv/hooks") == "first pre-snapshot\nsecond\n"


async def check_copies(one: Agent, two: Agent, original: list[str]) -> None:
    identities = [(await said(copy, IDENTITY)).splitlines() for copy in (one, two)]
    for line, mine, others in zip(original, *identities, strict=True):
        assert len({line, mine, others}) == 3, (line, mine, others)
    for number, copy in ((1, one), (2, two)):
        assert await said(copy, "cat /etc/machine-id /var/lib/dbus/machine-id") == f"{number:032x}\n" * 2
        assert await said(copy, "cat /etc/hosts") == (
            f"127.0.0.1 localhost\n127.0.1.1\tcopy{number} # this is box\n192.0.2.7 mailbox box.example\n"
        )
        assert await said(copy, "cat /etc/hostname /run/stoker/generation; echo $COPY") == f"copy{number}\n{number}\n{number}\n"
        assert await said(copy, "cat /etc/ssh/*; stat -c %a /etc/ssh/ssh_host_ed25519_key") == f"key {number}600\n"
        assert await said(copy, "while ! test -s /run/reloaded; do sleep 0.1; done; cat /run/reloaded") == f"key {number}"
        assert await said(copy, "ls /run | grep -c sessions || true") == "0\n", "only the sshd that listens is told"
        assert await said(copy, "hostname -I") == f"10.0.2.{20 + number} \n"
        assert await said(copy, "cut -f 2-3 /proc/net/route | sed -n 2p") == "00000000\t0202000A\n"
        assert await said(copy, "cat /srv/hooks") == f"first pre-snapshot\nsecond\npost-restore {number} copy{number}\n"
        await said(copy, "echo written > /srv/written; sync /srv/written")  # thawed
        assert await skew(copy) < 0.05


async def check_residents(one: Agent, two: Agent, id: int, uptime: float) -> None:
    """A process that was running goes on: its clock without a jump, its connections gone, its own random state everybody's."""
    answers = []
    for copy in (one, two):
        process = await copy.attach(id)
        assert b"alive" in await process.stdout.read()  # what it said when it was the original
        answers.append(await ask(process))
    first, second = answers
    assert uptime <= float(first[0]) < uptime + 300
    assert first[1] != second[1]
    assert first[2] == second[2], "this is why it is told as beyond"
    assert all(answer[3].startswith("gone") and answer[4] == "alive" for answer in answers)


async def test_frozen_file_systems_thaw_by_themselves_and_a_resumed_machine_keeps_what_is_its_own(base: Base) -> None:
    async with base.restored("original") as (_, agent):
        identity = IDENTITY.replace("openssl", "false")
        before = (await said(agent, f"echo {OLD_ID} > /etc/machine-id;" + identity)).splitlines()
        report = await agent.after_restore(AfterRestore(os.urandom(64), 1, copy=False))
        assert not report.unhandled and not [hazard for hazard in report.hazards if hazard.beyond]
        after = (await said(agent, identity)).splitlines()
        assert after[:2] != before[:2] and after[2:4] == before[2:4] and after[-2:] == before[-2:]
        await agent.before_snapshot(BeforeSnapshot(freeze=True))
        process = await agent.exec(ExecRequest(["sh", "-c", "echo x > /srv/x; sync /srv/x; echo done"]))
        async with asyncio.timeout(120):
            assert await process.stdout.read() == b"done\n"
        assert [hazard.name for hazard in (await agent.after_snapshot()).unhandled] == ["file_systems"]
        # A copy that is told too little says so.
        report = await agent.after_restore(AfterRestore(b"", 2))
        assert {hazard.name for hazard in report.unhandled} >= {"random", "machine_id"}


async def test_a_machine_that_was_told_nothing_is_to_be_configured(base: Base) -> None:
    async with started(base.own("fresh"), base.settings) as machine:
        await machine.restore(base.memory, None, base.state)
        await machine.thaw()
        async with await connect(machine.channel(), fresh=True, timeout=60) as agent:
            with pytest.raises(GuestError) as caught:
                await agent.after_restore(words(1))
            assert caught.value.code == "not_ready"
