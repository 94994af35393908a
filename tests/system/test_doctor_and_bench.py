"""``stoker doctor`` and ``stoker bench`` on the real host, as programs read them."""

from __future__ import annotations

import json
import signal
import time

import pytest

from command_line import CommandLine
from leaks import wait_gone

FACILITIES = {
    "agent",
    "data-directory",
    "qemu-system-x86_64",
    "kvm",
    "tun",
    "reflink",
    "loop",
    "device-mapper",
    "userfaultfd",
    "vsock",
    "systemd",
    "nftables",
    "dnsmasq",
    "mmdebstrap",
    "mke2fs",
}


def test_doctor_knows_this_host(stoker: CommandLine) -> None:
    done = stoker("doctor", "--json")
    assert done.code == 0, done.text
    report = json.loads(done.out)
    rows = {row["name"]: row for row in report["facilities"]}
    assert report["ok"] is True and report["accelerator"] in ("kvm", "tcg")
    assert rows.keys() >= FACILITIES
    for row in rows.values():
        assert row["status"] in ("ok", "missing", "broken", "unknown") and row["enables"]
        assert row["status"] == "ok" or (row["get"] and row["detail"]), row
    assert rows["qemu-system-x86_64"]["detail"][0].isdigit()


def test_doctor_says_what_is_missing_and_fails(stoker: CommandLine) -> None:
    done = stoker("doctor", env={"STOKER_QEMU": "no-such-qemu", "STOKER_ACCEL": "tcg"})
    assert done.code == 1
    assert "no-such-qemu is missing" in done.text
    assert "qemu-system-x86" in done.text.partition("apt-get install")[2]


@pytest.mark.timeout(600)
def test_bench_start_prints_one_object(stoker: CommandLine) -> None:
    done = stoker("bench", "start", "-n", "2", "--json", timeout=500)
    assert done.code == 0, done.error
    report = json.loads(done.out)
    assert (report["name"], report["n"], report["failures"]) == ("start", 2, 0)
    assert report["p50_ms"] <= report["p90_ms"] <= report["p99_ms"]
    assert 0.5 < report["ratios"]["bare_qemu"] < 10
    assert set(report["split_p50_ms"]) == {"host", "vmm", "kernel", "agent", "command"}
    assert all(value > 0 for value in report["split_p50_ms"].values())


@pytest.mark.timeout(600)
def test_bench_channel_prints_one_object(stoker: CommandLine) -> None:
    done = stoker("bench", "channel", "-n", "100", "--size", "16M", "--json", timeout=500)
    assert done.code == 0, done.error
    report = json.loads(done.out)
    assert (report["name"], report["n"], report["failures"]) == ("channel", 100, 0)
    assert report["out_mb_s"] > 1 and report["in_mb_s"] > 1
    assert report["agent_resident_kib"] <= 1024


@pytest.mark.timeout(600)
def test_bench_density_prints_one_object_and_leaves_nothing(stoker: CommandLine) -> None:
    done = stoker("bench", "density", "-n", "3", "--at-once", "2", "--rest", "1", "--json", timeout=300)
    assert done.code == 0, done.error
    report = json.loads(done.out)
    assert (report["name"], report["n"], report["failures"], report["machines"]) == ("density", 3, 0, 3)
    assert 5 < report["private_mib"]["p50"] <= report["pss_mib"]["p50"] < 200
    assert 3 * report["pss_mib"]["p50"] > report["pss_together_mib"] / 2
    assert json.loads(stoker("ls", "--json").out) == []
    # In the middle of it, by Ctrl-C.
    process = stoker.popen("bench", "density", "-n", "20", "--at-once", "3")
    while len(json.loads(stoker("ls", "--json").out)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert wait_gone(lambda: json.loads(stoker("ls", "--json").out)) == []


def test_bench_network_prints_an_object_for_each_plan(stoker: CommandLine) -> None:
    done = stoker("bench", "network", "-n", "2", "--slots", "4", "--size", "4M", "--json", timeout=250)
    assert done.code == 0, done.error
    reports = [json.loads(line) for line in done.out.splitlines()]
    assert [(report["name"], report["failures"]) for report in reports] == [
        ("network slot, namespace plan", 0),
        ("TCP through NAT, namespace plan", 0),
        ("network slot, run plan", 0),
        ("TCP through NAT, run plan", 0),
    ]
    for report in reports[1::2]:
        assert report["bytes"] == 4 << 20
        for rates in (report["mb_s"], report["bare_tap_mb_s"]):
            assert rates["out"] > 0 and rates["in"] > 0
        assert all(ratio > 0 for ratio in report["ratios"].values()) and len(report["ratios"]) == 2
    for report in reports[::2]:
        assert report["ratios"]["faster than spawned ip and nft"] > 1
        assert 0 < report["recycled_p50_ms"] and 0 < report["given_back_p50_ms"] < report["gone_behind_p50_ms"]
    first, last = reports[0]["rules_passed_first_and_last"]
    assert first == last > 3, "a packet passes the same rules with more machines"
