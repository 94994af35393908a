"""What the host's network is found to be like, and mended, in a host of namespaces that has another's firewall."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from leaks import wait_gone
from network_world import SERVED6, World, world
from stoker.engine import host_network
from stoker.errors import HostError
from stoker.host.nftables import Nftables
from stoker.network import host
from stoker.network.egress import ALL
from stoker.network.host import Chain, Finding, Observed, Pass, Setting, judge, mend, observe, sysctl_file, undo
from stoker.network.plan import NAMESPACE_RANGE, RUN_RANGE, Foreign
from stoker.network.rules import Machine
from stoker.settings import Settings

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
RANGES = [RUN_RANGE, NAMESPACE_RANGE]


@pytest.fixture
def made() -> Iterator[World]:
    with world() as one:
        yield one


def wrong(made: World) -> list[Finding]:
    return [one for one in judge(made.host.run(lambda: observe(made.slots.foreign())), RANGES) if not one.ok]


def ruleset(made: World) -> list[str]:
    with made.host.run(Nftables) as nft:
        # What was logged of late is forgotten by itself.
        rows = [row for row in nft.query("list ruleset") if row.get("set", {}).get("name") not in ("logged", "noted")]
    for row in rows:
        for part in row.values():
            part.pop("handle", None)
    return [json.dumps(row, sort_keys=True) for row in rows]


def test_what_others_do_against_us_is_found_mended_and_undone(made: World) -> None:
    with made.host.run(Nftables) as nft:
        for hook in ("forward", "input"):
            nft.apply(
                [
                    "add table ip filter",
                    f"add chain ip filter {hook.upper()} {{ type filter hook {hook} priority 0; policy drop; }}",
                ]
            )
        nft.apply(["add rule ip filter FORWARD counter", "add rule ip filter INPUT ct state established accept"])
    for name, value in (("ip_forward", "0"), ("conf/all/rp_filter", "1"), ("conf/up0/rp_filter", "2")):
        made.host.run(lambda name=name, value=value: Path(f"/proc/sys/net/ipv4/{name}").write_text(value))  # type: ignore[misc]
    before = ruleset(made)
    guest = made.machine("run")
    assert guest.ask("1.1.1.1", timeout=0.3) == "timeout"
    bad = wrong(made)
    assert [one.name for one in bad] == ["forwarding", "reverse path", "firewall ip filter FORWARD", "firewall ip filter INPUT"]
    mends = [one for finding in bad for one in finding.mends]
    record = made.host.run(lambda: mend(mends))
    assert json.loads(json.dumps(record)) == record
    assert wrong(made) == []
    assert guest.ask("1.1.1.1") == "5.5.5.5"
    assert guest.ask("10.1.2.3", timeout=0.3) != "5.5.5.5", "our own rules still decide"
    guest.end()
    made.slots.drop(guest.slot.plan, guest.slot).result(20)
    made.guests.clear()
    for _ in range(2):
        made.host.run(lambda: undo(record))
        assert ruleset(made) == before
        assert made.host.run(lambda: Path("/proc/sys/net/ipv4/ip_forward").read_text()) == "0\n"
        assert made.host.run(lambda: Path("/proc/sys/net/ipv4/conf/all/rp_filter").read_text()) == "1\n"


def test_judging_by_value() -> None:
    settings = {
        "ipv4/ip_forward": "1",
        "ipv4/conf/all/rp_filter": "0",
        "ipv4/conf/eth0/rp_filter": "1",
        "ipv4/conf/eth1/rp_filter": "2",
    }
    vpn = Foreign(IPv4Network("100.64.0.0/10"), "is routed to vpn0")
    chain = Chain("inet", "ufw", "forward", "forward")
    found = judge(Observed(settings, (), (vpn,), (chain,)), RANGES)
    assert [(one.name, one.ok) for one in found] == [
        ("forwarding", True),
        ("reverse path", False),
        ("uplink", False),
        ("range", False),
        ("firewall inet ufw forward", False),
    ]
    assert found[1].mends == (Setting("ipv4/conf/eth0/rp_filter", "0"),)
    assert found[3].says == "the range machines (100.80.0.0/16) lies in 100.64.0.0/10, which is routed to vpn0"
    (let_through,) = found[4].mends
    assert isinstance(let_through, Pass)
    assert let_through.commands[0] == 'insert rule inet ufw forward ip saddr 172.16.0.0/16 accept comment "stoker"'
    assert len(let_through.commands) == 4 and "nft 'insert rule" in str(let_through)
    record = [
        {"setting": "ip_forward", "before": "0", "after": "1"},  # as an older one wrote it
        {"setting": "ipv4/conf/all/rp_filter", "before": "1", "after": "0"},
        {"setting": "ipv4/conf/eth0/rp_filter", "before": "1", "after": "0"},
        {"chain": ["inet", "ufw", "forward"]},
    ]
    assert sysctl_file(record).splitlines()[1:] == ["net.ipv4.ip_forward = 1", "net.ipv4.conf.all.rp_filter = 0"]


def test_ipv6_is_judged_where_it_is_wanted() -> None:
    settings = {"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "0", "ipv6/conf/eth0/accept_ra": "1"}

    def six(changed: dict[str, str], advertised: tuple[str, ...] = ("eth0",)) -> Finding:
        found = Observed(settings | changed, ("eth0",), (), (), advertised)
        assert not [one for one in judge(found, RANGES) if one.name == "IPv6"], "nobody asked"
        (one,) = [one for one in judge(found, RANGES, ipv6=True) if one.name == "IPv6"]
        return one

    forward, listen = Setting("ipv6/conf/all/forwarding", "1"), Setting("ipv6/conf/eth0/accept_ra", "2")
    assert six({}).mends == (listen, forward), "its route would go if it did not listen first"
    assert six({}, ()).mends == (forward,) and not six({}, ()).ok
    assert not six({forward.name: "1"}).ok
    assert six({forward.name: "1", listen.name: "2"}).ok and six({forward.name: "1"}, ()).ok
    assert str(forward) == "sysctl -w net.ipv6.conf.all.forwarding=1"
    record = [{"setting": one.name, "before": "0", "after": one.value} for one in (listen, forward)]
    assert sysctl_file(record).splitlines()[1:] == ["net.ipv6.conf.eth0.accept_ra = 2", "net.ipv6.conf.all.forwarding = 1"]


def test_network_manager_is_told_to_keep_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of its name, which a SIGHUP ends: so it is seen to be told."""
    program = tmp_path / "NetworkManager"
    shutil.copy("/bin/sleep", program)
    monkeypatch.setattr(host, "MANAGED", (str(tmp_path / "etc"),))

    def found() -> list[Finding]:
        return [one for one in judge(observe([]), RANGES) if one.name == "NetworkManager"]

    assert found() == []
    for undone in (False, True):
        with subprocess.Popen([program, "60"]) as process:
            try:
                wait_gone(lambda: ["it has another name"] if not host._processes("NetworkManager") else [])
                if not undone:
                    (finding,) = found()
                    record = mend(finding.mends)
                    assert json.loads(json.dumps(record)) == record
                    assert "unmanaged" not in str(finding.mends[0]) and "managed=0" in str(finding.mends[0])
                else:
                    assert found() == [], "it has been told"
                    undo(record)
                assert process.wait(10) == -signal.SIGHUP
            finally:
                process.kill()
        assert (tmp_path / "etc" / "conf.d" / "90-stoker.conf").exists() != undone
    undo(record)


def test_ipv6_is_mended_and_undone() -> None:
    with world(ipv6=True) as made:

        def write(value: str) -> None:
            Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text(value)

        made.host.run(lambda: write("0"))
        with pytest.raises(HostError) as refused:
            made.machine("ns", ipv6=True)
        assert refused.value.code == "network_unprepared" and "check --ipv6" in refused.value.hint
        (bad,) = made.host.run(lambda: [one for one in judge(observe(made.slots.foreign()), RANGES, ipv6=True) if not one.ok])
        record = made.host.run(lambda: mend(bad.mends))
        guest = made.machine("ns", ipv6=True)
        assert guest.ask(SERVED6[0]) != "timeout"
        made.host.run(lambda: undo(record))
        assert made.host.run(lambda: Path("/proc/sys/net/ipv6/conf/all/forwarding").read_text()) == "0\n"


def test_what_is_up_of_a_run_is_planned_as_it_is(made: World, tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path, tmp_path / "none.toml")
    first, other = made.host.run(lambda: host_network.plan(settings, "r1", ["one", "two"]))
    slot = made.slots.up(first, Machine(first.interface, first.source_mac, first.address, ALL))
    try:
        assert made.host.run(lambda: host_network.plan(settings, "r1", ["one", "two"])) == [first, other]
        (moved,) = made.host.run(lambda: host_network.plan(settings, "r2", ["x"]))
        assert not moved.network.overlaps(first.network)
    finally:
        made.slots.drop(first, slot).result(20)
