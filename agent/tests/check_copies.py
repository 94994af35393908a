"""Before a snapshot and after a restore: the hooks. What else is done there needs a machine (tests/system/test_copies.py)."""

from __future__ import annotations

import os
import time
from typing import Any

from harness import Target, fails, host_test


def hook(a: Target, kind: str, name: str, script: str, mode: int = 0o755) -> None:
    os.makedirs(f"{a.directory}/hooks.d/{kind}", exist_ok=True)
    a.write(f"hooks.d/{kind}/{name}", f"#!/bin/sh\n{script}\n".encode(), mode)


def told(report: dict[str, Any]) -> list[tuple[str, bool]]:
    return [(hazard["name"], hazard["handled"]) for hazard in report["hazards"]]


def sleepers(a: Target) -> list[str]:
    found = []
    for pid in a.children():
        try:
            with open(f"/proc/{pid}/cmdline") as f:
                found += [pid] * f.read().startswith("sleep")
        except FileNotFoundError:
            pass
    return found


@host_test
def runs_hooks_in_order(a: Target) -> None:
    log = f"{a.directory}/log"
    hook(a, "pre-snapshot", "20-b", f"echo b $1 >> {log}; echo something wrong >&2; exit 3")
    hook(a, "pre-snapshot", "10-a", f"sleep 0.2; echo a $1 >> {log}")
    hook(a, "pre-snapshot", "30-c", f"echo c $(ls /proc/self/fd | wc -w) $(cut -d' ' -f6 /proc/self/stat) $$ >> {log}")
    hook(a, "pre-snapshot", "40-no", f"echo never >> {log}", 0o644)
    hook(a, "pre-snapshot", ".hidden", f"echo never >> {log}")
    hook(a, "pre-snapshot", "old~", f"echo never >> {log}")
    hook(a, "post-restore", "x", f"echo never >> {log}")
    h = a.connect(fresh=True)
    number = h.start_call("before_snapshot")
    # It goes on meanwhile.
    assert h.run(1, "echo", "hello")[1] == b"hello\n"
    fails("too_many", h.call, "before_snapshot")
    report = h.result(number)
    lines = open(log).read().splitlines()
    assert lines[:2] == ["a pre-snapshot", "b pre-snapshot"], lines
    assert len(lines) == 3 and lines[2].split()[1] in ("3", "4"), lines
    by_name = {hazard["name"]: hazard for hazard in report["hazards"]}
    assert [by_name[f"hook:{name}"]["handled"] for name in ("10-a", "20-b", "30-c")] == [True, False, True], report
    detail = by_name["hook:20-b"]["detail"]
    assert detail.startswith("exit 3 after ") and detail.endswith(": something wrong"), detail
    assert by_name["hooks"]["handled"] and "40-no" in by_name["hooks"]["detail"], report
    assert report["steps"]["hooks"] >= 200_000, report
    assert told(h.call("before_snapshot", hooks=False)) == [("file_systems", True)]
    assert h.call("after_snapshot")["hazards"] == []


@host_test
def kills_hooks_after_their_time(a: Target) -> None:
    hook(a, "pre-snapshot", "1", "trap '' TERM; sleep 600 & sleep 600")
    hook(a, "pre-snapshot", "2", "while :; do echo a long line of words; done")
    hook(a, "pre-snapshot", "3", "exec 1>&-; kill -9 $$")
    hook(a, "pre-snapshot", "4", "sleep 600 & echo left")  # who holds its output is not waited for
    a.write("hooks.d/pre-snapshot/5", b"#!/no/such/shell\n", 0o755)
    h = a.connect(fresh=True)
    before = time.monotonic()
    report = h.call("before_snapshot", hook_ms=2000)
    assert 4.0 <= time.monotonic() - before < 20
    by_name = {hazard["name"]: hazard for hazard in report["hazards"]}
    assert all(not by_name[f"hook:{n}"]["handled"] for n in (1, 2, 3, 5)) and by_name["hook:4"]["handled"], report
    assert by_name["hook:1"]["detail"].startswith("killed after its time after 2"), report
    assert len(by_name["hook:2"]["detail"]) < 500 and by_name["hook:2"]["detail"].endswith("long line of words"), report
    assert by_name["hook:3"]["detail"].startswith("signal 9"), report
    assert "cannot be started" in by_name["hook:5"]["detail"], report
    deadline = time.monotonic() + 10
    while len(left := sleepers(a)) != 1:
        assert time.monotonic() < deadline, f"of all their processes the one that was set free is left, not {left}"
        time.sleep(0.05)
    a.kill(int(left[0]))


@host_test
def answers_nothing_before_a_restore_is_done(a: Target) -> None:
    log = f"{a.directory}/log"
    hook(a, "post-restore", "1", f"sleep 0.3; echo $1 >> {log}")
    h = a.connect(fresh=True)
    words = {"entropy": os.urandom(64), "generation": 7}
    first, second = h.start_call("after_restore", **words), h.start_call("info")
    h.result(second)
    assert open(log).read() == "post-restore\n"
    report = h.result(first)
    assert told(report) == [("hook:1", True)], report
    # A connection that was lost meanwhile: the next one hears the same, and nothing runs twice.
    h.start_call("after_restore", **{**words, "generation": 8})
    h = a.connect()
    again = h.call("after_restore", **{**words, "generation": 8})
    assert told(again) == [("hook:1", True)] and open(log).read() == "post-restore\n" * 2
    assert h.call("after_restore", **{**words, "entropy": os.urandom(64), "generation": 8}) != again
    assert open(log).read() == "post-restore\n" * 3
    # A snapshot whose preparation nobody waited for: its copy begins anew.
    hook(a, "pre-snapshot", "1", f"sleep 600; echo never >> {log}")
    stale = h.start_call("before_snapshot")
    assert told(h.call("after_restore", **words, hooks=False)) == []
    assert told(h.call("before_snapshot", hooks=False)) == [("file_systems", True)]
    h.settle(0.2)
    assert stale not in h.replies and "never" not in open(log).read()
