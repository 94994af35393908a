"""A running lab, seen from the host: one leased machine of Stoker's own, in which one pytest process runs what it is told.

``stoker run --init image`` boots it and carries three streams: the checkout (a tar archive of known length) and then one order a
line go to its stdin, one JSON object a line comes out of its stdout, and whatever else is said out of its stderr, into a file.
Killed in any way, the command takes its machine along: that is the lease.
"""

from __future__ import annotations

import io
import json
import os
import queue
import shutil
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine_fixtures import own_data
from lab_image import CHECKOUT, FLAVOURS, Flavour, LabImage, build, compile_for
from stoker.settings import Settings, load_settings

COPIED = ("src", "tests", "agent", "contrib", "docs", "pyproject.toml", "README.md")
SKIPPED = ("__pycache__", "build", "fuzz", ".pytest_cache", ".hypothesis", "node_modules")
BOOT = 420.0
"""Seconds from the start of the machine to pytest's word that it has collected, on a busy host without hardware virtualisation."""
SILENCE = 900.0
"""A test inside has a time limit of its own; after so long without a word the lab counts as dead."""

# The store would hash what is new to it, for minutes here: it is sealed (stoker.images.store) as the host found it intact.
# systemd is up when its jobs are done; a unit that failed is a test's business, not the boot's.
UNPACK = """
set -e
mkdir -p /srv/stoker
head -c {size} | tar -x --warning=no-timestamp -C /srv/stoker
for file in /var/lib/stoker/images/*/rootfs.ext4 /var/lib/stoker/kernels/*/vmlinux; do
    stat -c '%i %s %.9Y %.9Z' "$file" | tr -d . >"${{file%/*}}/SEAL"
done
until systemctl is-system-running --wait 2>/dev/null | grep -qE 'running|degraded'; do sleep 0.2; done
"""
SERVE = """
cd /srv/stoker
exec 3>&1 1>&2 4<&0 </dev/null
export STOKER_LAB_ORDERED=1
exec python -m pytest {arguments} tests/lab
"""


class LabError(Exception):
    """The lab cannot be had, or it died. The text says why, with the end of what was said on the way."""


def checkout(image: LabImage, scratch: Path) -> bytes:
    """The checkout as a tar archive, compiled for the lab's Python. ``scratch`` does not exist before and after."""
    # Agent and supervisor as their sources are now: with old ones the tests inside fail for reasons nobody understands.
    subprocess.run(["make", "-s", "-C", CHECKOUT / "agent", "all"], stdin=subprocess.DEVNULL, stdout=2, check=True)
    scratch.mkdir()
    try:
        for name in COPIED:
            source = CHECKOUT / name
            if source.is_dir():
                shutil.copytree(source, scratch / name, symlinks=True, ignore=shutil.ignore_patterns(*SKIPPED))
            else:
                shutil.copy2(source, scratch)
        compile_for(image, scratch, "/srv/stoker")
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(scratch, ".", filter=_as_root)
        return buffer.getvalue()
    finally:
        shutil.rmtree(scratch)


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    return member


def shared_settings(root: Path) -> Settings:
    """Where labs are built and kept: the host's data directory, or what ``STOKER_TEST_DATA_DIR`` names."""
    environment = {**os.environ, "STOKER_CONFIG": "/nonexistent/stoker.toml", "STOKER_RUN_DIR": str(root / "run")}
    data = os.environ.get("STOKER_TEST_DATA_DIR")
    if data:
        environment["STOKER_DATA_DIR"] = data
    shared = load_settings(environment)
    shared.data_dir.mkdir(parents=True, exist_ok=True)
    return shared


def lab_settings(shared: Settings, root: Path) -> Settings:
    """Settings of the lab's own daemon below ``root``; kernels and images are shared with the host."""
    return replace(own_data(shared, root), accel="tcg", boot_timeout=BOOT)


def daemon_environment(settings: Settings) -> dict[str, str]:
    """What makes the command line use the lab's daemon."""
    return {
        **os.environ,
        "STOKER_DATA_DIR": str(settings.data_dir),
        "STOKER_RUN_DIR": str(settings.run_dir),
        "STOKER_ACCEL": settings.accel,
        "STOKER_BOOT_TIMEOUT": str(settings.boot_timeout),
        "STOKER_START_TIMEOUT": "120",
        "STOKER_IDLE_EXIT": "30",  # where nobody is left to stop it
        "STOKER_POOL": "directory",  # one disk, thrown away: no file system of its own for it
        "STOKER_CONFIG": str(settings.config_file),
    }


def environment_inside(flavour: Flavour) -> dict[str, str]:
    """What every program in the lab has: the tests' Python first, and what says that this is the lab."""
    path = "/opt/stoker/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    # A host in software on a busy host is slow, not broken.
    patience = {"STOKER_START_TIMEOUT": "240", "STOKER_BOOT_TIMEOUT": "280", "STOKER_KVM_PROBE_TIMEOUT": "240"}
    tests = {"PYTHONPATH": "/srv/stoker/tests", "PYTEST_ADDOPTS": "-p no:cacheprovider", "STOKER_LAB": flavour.name}
    # What is made in the background, on the one CPU, would be in the way of a test; test_kvm.py has it made.
    tests["STOKER_GOLDEN"] = "0"
    return {"PATH": path, **tests, **patience}


def machine_words(image: LabImage) -> list[str]:
    """How the lab's machine is asked for. One CPU: Debian 12's QEMU does not stand more of them in software."""
    environment = [word for pair in environment_inside(image.flavour).items() for word in ("--env", "=".join(pair))]
    return [
        *("--init", "image", "--kernel", str(image.kernel), "--memory", str(image.flavour.memory), "--network", "none"),
        *("--hostname", "lab", "--user", "root", "--workdir", "/root", "--quiet", *environment, f"ext4:{image.rootfs}"),
    ]


STOKER = Path(sys.executable).parent / "stoker"


class Lab:
    """One flavour's machine. :meth:`start` once, then :meth:`run` for each test, :meth:`close` whatever happened."""

    def __init__(self, flavour: str, root: Path) -> None:
        self.flavour = FLAVOURS[flavour]
        self.root = root
        self.words = root / "said"
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._settings: Settings | None = None
        self._over = False
        """It said its last word."""

    def start(self, arguments: str = "") -> None:
        """Builds what is not built yet, boots, and returns when pytest inside has collected its tests."""
        self.root.mkdir(mode=0o700)
        shared = shared_settings(self.root)
        try:
            image = build(self.flavour, shared)
        except Exception as e:  # whatever it was: the tests cannot run, and this is why
            raise LabError(f"the lab {self.flavour.name} cannot be built: {type(e).__name__}: {e}") from e
        settings = self._settings = lab_settings(shared, self.root)
        archive = checkout(image, self.root / "checkout")
        script = (UNPACK + SERVE).format(size=len(archive), arguments=arguments)
        argv = [str(STOKER), "run", *machine_words(image), "/bin/sh", "-c", script]
        self.serve(argv, daemon_environment(settings), archive)

    def serve(self, argv: list[str], environment: dict[str, str], archive: bytes) -> None:
        """Starts the command with the three streams; ``archive`` goes in first. Returns when pytest has collected."""
        with open(self.words, "wb") as words:
            self._process = subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words)
        threading.Thread(target=self._read, name=f"lab-{self.flavour.name}", daemon=True).start()
        threading.Thread(target=self._feed, args=(archive,), name=f"lab-{self.flavour.name}-in", daemon=True).start()
        told = self._next(BOOT)
        if "collected" not in told:
            raise LabError(self._explain(f"the lab {self.flavour.name} has no tests to run: {told.get('broken', told)}"))

    def _feed(self, archive: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(archive)
            self._process.stdin.flush()
        except OSError:
            pass  # it died: the reader's end says so

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self._lines.put(json.loads(line))
            except ValueError:
                self._lines.put({"broken": f"not a word of pytest's: {line[:200]!r}"})
        self._lines.put(None)

    def _next(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise LabError(self._explain(f"the lab {self.flavour.name} said nothing for {timeout:g} s")) from None
        if line is None:
            self._over = True
            raise LabError(self._explain(f"the lab {self.flavour.name} ended"))
        return line

    def _explain(self, what: str) -> str:
        code = self._process.poll() if self._process is not None else None
        said = self.words.read_text(errors="replace").splitlines()[-60:] if self.words.exists() else []
        return "\n".join([what + (f" (stoker run: exit code {code})" if code is not None else ""), *said])

    def run(self, node: str, following: str | None) -> list[dict[str, Any]]:
        """Runs one test; returns its reports. ``following`` is the next one in this lab: what both need is kept for it."""
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"run": node, "next": following}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as e:
            raise LabError(self._explain(f"the lab {self.flavour.name} takes no orders: {e.strerror}")) from None
        reports = []
        while True:
            told = self._next(SILENCE)
            if "report" in told:
                reports.append(told["report"])
            elif told.get("done") == node:
                return reports
            else:
                raise LabError(self._explain(f"the lab {self.flavour.name}: {told.get('broken', told)}"))

    def close(self) -> list[str]:
        """Ends it; returns what the tests left behind inside, in words. May be called again."""
        problems: list[str] = []
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            try:
                process.stdin.close()
                while not self._over and (line := self._lines.get(timeout=120.0)) is not None:
                    problems += line.get("left", [])
            except (OSError, queue.Empty):
                problems.append(f"the lab {self.flavour.name} did not end by itself")
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        settings, self._settings = self._settings, None
        if settings is not None:
            stop_daemon(settings)
        return problems


def stop_daemon(settings: Settings) -> None:
    """Ends the lab's daemon, if it runs."""
    subprocess.run([STOKER, "daemon", "stop"], env=daemon_environment(settings), stdin=subprocess.DEVNULL, capture_output=True)
