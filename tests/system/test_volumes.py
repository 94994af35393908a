"""Volumes and apps in real guests: what goes in comes out, and what a killed daemon leaves. Few boots, many looks."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine
from crashing import daemon
from engine_daemon import settings as settings_of
from engine_fixtures import own_data
from engine_host import HostBooter
from leaks import processes, wait_gone
from stoker.api.models import Principal
from stoker.engine.engine import Engine
from stoker.settings import Settings

pytestmark = [pytest.mark.timeout(400), pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")]
IMAGE = "debian:12"
ADMIN = Principal()


@pytest.fixture
def stoker(settings: Settings, short_dir: Path) -> Iterator[CommandLine]:
    own = own_data(settings, short_dir)
    env = {"STOKER_DATA_DIR": str(own.data_dir), "STOKER_RUN_DIR": str(own.run_dir), "STOKER_CONFIG": str(own.config_file)}
    command = CommandLine(own, {**env, "STOKER_ACCEL": own.accel})
    yield command
    command("daemon", "stop")
    assert wait_gone(lambda: [str(process) for process in processes(own.run_dir)]) == []


def sure(stoker: CommandLine, *words: str) -> str:
    done = stoker(*words)
    assert done.code == 0, (words, done.error)
    return done.text


def tree(top: Path) -> Path:
    """One of everything that a volume has to keep."""
    (top / "sub" / "empty").mkdir(parents=True)
    (top / "sub" / "f").write_bytes(b"content\n" * 1000)
    os.link(top / "sub" / "f", top / "hard")
    os.symlink("../outside", top / "link")
    (top / 'a "b" \\ c').write_text("quotes")
    os.close(os.open(os.fsencode(top) + b"/line\nbreak \xff", os.O_CREAT | os.O_WRONLY))
    with open(top / "holes", "wb") as file:
        file.truncate(64 << 20)
        file.seek(20 << 20)
        file.write(b"in the middle")
    os.mkfifo(top / "pipe")
    os.mknod(top / "null", 0o600 | 0o020000, os.makedev(1, 3))
    os.setxattr(top / "hard", "user.k", b"\0v=\xff")
    os.setxattr(top / "sub", "trusted.t", b"on a directory")
    os.chown(top / "hard", 1234, 70000)
    os.chmod(top / "hard", 0o4751)
    os.chmod(top / "sub" / "empty", 0o1770)
    os.chown(top / "link", 12, 34, follow_symlinks=False)
    os.utime(top / "hard", ns=(0, 1_234_567_890_123_456_789))
    os.utime(top / "sub", ns=(0, 1_000_000_000_000_000_001))
    return top


def facts(top: Path) -> dict[bytes, tuple[Any, ...]]:
    """All that is to be kept of a tree."""
    found: dict[bytes, tuple[Any, ...]] = {}
    names: dict[int, bytes] = {}
    for directory, below, files in sorted(os.walk(os.fsencode(top))):
        for name in sorted(below + files):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            key = os.path.relpath(path, os.fsencode(top))
            content: object = os.readlink(path) if os.path.islink(path) else None
            if os.path.isfile(path) and not os.path.islink(path):
                content = (status.st_size, Path(os.fsdecode(path)).read_bytes(), status.st_blocks * 512 < status.st_size)
            xattrs = {key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)}
            first = names.setdefault(status.st_ino, key)
            found[key] = (status.st_mode, status.st_uid, status.st_gid, status.st_rdev, status.st_mtime_ns, xattrs, first, content)
    return found


def test_a_directory_goes_in_and_comes_out(stoker: CommandLine, tmp_path: Path) -> None:
    """Owners, modes, links, times, extended attributes, holes, names; through an import, a guest that looks, and an export."""
    source = tree(tmp_path / "in")
    assert sure(stoker, "volume", "import", "data", str(source)) == "data\n"
    made = json.loads(sure(stoker, "volume", "inspect", "data"))[0]
    assert made["used"] < 24 << 20 and made["size"] >= 1 << 30 and made["users"] == []
    look = "cd '/mnt/a b'; stat -c '%n %a %u %g %h' hard sub/empty; stat -c %s holes; cat 'a \"b\" \\ c'; touch new 2>&1"
    look += "; mount | grep 'a b'"
    seen = sure(stoker, "run", "-v", "data:/mnt/a b:ro", IMAGE, "--", "sh", "-c", look)
    assert seen.startswith("hard 4751 1234 70000 2\nsub/empty 1770 0 0 2\n67108864\nquotes")
    assert "Read-only file system" in seen and "norecovery" in seen
    archive, out = tmp_path / "out.tar", tmp_path / "out"
    sure(stoker, "volume", "export", "data", str(archive))
    assert archive.stat().st_size < 1 << 20
    out.mkdir()
    subprocess.run(["tar", "-C", out, "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", archive], check=True)
    assert facts(out) == facts(source)
    raw = tmp_path / "raw.ext4"
    sure(stoker, "volume", "export", "data", "--raw", str(raw))
    assert raw.stat().st_size == made["size"] and raw.stat().st_blocks * 512 < 64 << 20
    subprocess.run(["e2fsck", "-fn", raw], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    # Through a pipe, by its name or as standard output: the same bytes.
    with open(raw, "rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
    for words in (("--raw", "-"), ("--raw", str(tmp_path / "fifo"))):
        if words[1] != "-":
            os.mkfifo(words[1])
        process = stoker.popen("volume", "export", "data", *words)
        assert process.stdout is not None
        with process.stdout if words[1] == "-" else open(words[1], "rb") as pipe:
            assert hashlib.file_digest(pipe, "sha256").hexdigest() == whole
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_data_outlives_sandboxes_and_daemons(stoker: CommandLine, tmp_path: Path) -> None:
    """A writer's last words are on the disk when it is destroyed; its claim outlives the daemon; growing; an app beside it."""
    app = tmp_path / "app.zip"
    with zipfile.ZipFile(app, "w") as archive:
        info = zipfile.ZipInfo("bin/hello")
        info.create_system, info.external_attr = 3, 0o100755 << 16
        archive.writestr(info, "#!/bin/sh\necho hello from $0\n")
        link = zipfile.ZipInfo("start")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "bin/hello")
    sure(stoker, "volume", "create", "data", "--size", "32M")
    script = "/app/start; echo mine > /app/own; echo kept > /data/deep/er/f; sync /app/own; df -m /data/deep/er | tail -1"
    first = sure(stoker, "run", "-v", "data:/data/deep/er", "--app", str(app), IMAGE, "--", "sh", "-c", script)
    assert first.startswith("hello from /app/start\n")
    images = list((stoker.settings.data_dir / "apps").glob("*/app.ext4"))
    assert len(images) == 1
    before = images[0].stat()
    sure(stoker, "volume", "resize", "data", "96M")
    made = ("create", "-v", "data:/d", "--app", str(app), "--name", "box", IMAGE)
    sure(stoker, *made)
    after = images[0].stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    assert json.loads(sure(stoker, "inspect", "box"))[0]["app"] == images[0].parent.name
    shown = sure(
        stoker, "exec", "box", "--", "sh", "-c", "cat /d/f; ls /app; df -m /d | tail -1 | awk '{print ($2 > 60)}'; echo b > /app/b"
    )
    assert shown == "kept\nbin\nstart\n1\n"
    os.kill(json.loads(sure(stoker, "daemon", "status", "--json"))["pid"], 9)
    for words in (
        ("volume", "rm", "data"),
        ("volume", "export", "data", "-"),
        made[:3] + (IMAGE,),
    ):
        refused = stoker(*words)
        assert refused.code == 125 and "volume_in_use" in refused.error and "box" in refused.error, refused
    sure(stoker, "exec", "box", "--", "sh", "-c", "echo more >> /d/f")
    # Under its writer, which the new daemon has found again: disk and file system grow, what is in it stays.
    look = "cat /sys/block/vdc/size; df -m /d | tail -1 | awk '{print ($2 > 170)}'; cat /d/f"
    look += "; dd if=/dev/zero of=/d/large bs=1M count=150 2>&1"
    sure(stoker, "volume", "resize", "data", "200M")
    seen = sure(stoker, "exec", "box", "--", "sh", "-c", look + " | tail -1; sync; rm /d/large").splitlines()
    assert seen[:4] == [str(200 << 11), "1", "kept", "more"] and seen[4].startswith("157286400 bytes"), seen
    assert json.loads(sure(stoker, "volume", "inspect", "data"))[0]["size"] == 200 << 20
    # What is deleted is given back to the host, as it goes and by fstrim.
    used = next((stoker.settings.data_dir / "volumes").iterdir()).stat
    sure(stoker, "exec", "box", "--", "sh", "-c", "sync && fstrim /d && sync")
    empty = used().st_blocks * 512
    fill = "head -c 60000000 /dev/urandom > /d/big && sync"
    sure(stoker, "exec", "box", "--", "sh", "-c", fill)
    assert used().st_blocks * 512 - empty > 56 << 20
    sure(stoker, "exec", "box", "--", "sh", "-c", "rm /d/big && sync && fstrim /d && sync")
    assert used().st_blocks * 512 - empty < 8 << 20
    # Where the guest has something else there, it is said; the volume has grown, and the next mount fills it.
    sure(stoker, "exec", "box", "--", "mount", "-t", "tmpfs", "none", "/d")
    refused = stoker("volume", "resize", "data", "300M")
    assert refused.code == 125 and "at /d" in refused.error, refused
    sure(stoker, "exec", "box", "--", "umount", "/d")
    sure(stoker, "volume", "resize", "data", "300M")
    assert sure(stoker, "exec", "box", "--", "sh", "-c", "df -m /d | tail -1 | awk '{print ($2 > 260)}'") == "1\n"
    sure(stoker, "stop", "box")
    assert "volume_in_use" in stoker("volume", "rm", "data").error
    sure(stoker, "start", "box")
    assert sure(stoker, "exec", "box", "--", "sh", "-c", "cat /d/f /app/b") == "kept\nmore\nb\n"
    assert list((stoker.settings.data_dir / "apps/disks").iterdir()) != []
    sure(stoker, "rm", "box")
    [file] = (stoker.settings.data_dir / "volumes").iterdir()
    subprocess.run(["e2fsck", "-fn", file], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    assert list((stoker.settings.data_dir / "apps/disks").iterdir()) == []
    assert sure(stoker, "fsck").startswith("0 differences")
    sure(stoker, "volume", "rm", "data")
    assert list((stoker.settings.data_dir / "volumes").iterdir()) == []


def hostile(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("good"))
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        archive.addfile(info)
    return out.getvalue()


def test_an_import_that_fails_leaves_nothing(stoker: CommandLine, tmp_path: Path) -> None:
    """A hostile tar, one that is cut off, and one that does not fit."""
    big = io.BytesIO()
    with tarfile.open(fileobj=big, mode="w") as archive:
        info = tarfile.TarInfo("big")
        info.size = 40 << 20
        archive.addfile(info, io.BytesIO(os.urandom(info.size)))
    cases = {"bad_archive": hostile("../../etc/passwd"), "short_input": big.getvalue()[: 1 << 20], "no_space": big.getvalue()}
    for code, data in cases.items():
        done = stoker("volume", "import", "--size", "24M", "data", "-", input=data)
        assert done.code == 125 and f"[{code}]" in done.error, (code, done.error)
        assert list((stoker.settings.data_dir / "volumes").iterdir()) == []
        assert list((stoker.settings.run_dir / "helpers").iterdir()) == []
    assert json.loads(sure(stoker, "volume", "ls", "--json")) == []


@pytest.mark.anyio
@pytest.mark.parametrize("point", ["helper.after_boot", "volume.after_unpacked"])
async def test_a_daemon_that_dies_during_an_import(settings: Settings, short_dir: Path, tmp_path: Path, point: str) -> None:
    """No machine, no file, no row is left; the name is free."""
    own = own_data(settings, short_dir)
    data, run = own.data_dir, short_dir / "run"
    archive = tmp_path / "in.tar"
    archive.write_bytes(hostile("fine"))
    async with daemon(data, run, "real", point) as first:
        assert await first.ask(do="import", name="data", tar=str(archive)) is None, "the point was never reached"
    async with Engine.open(settings_of(data, run), booter=HostBooter(), trace_kill="") as engine:
        assert (await engine.volumes.list(ADMIN, limit=10, cursor=None)).items == []
        assert await engine._core.ledger.all() == []
    assert list((data / "volumes").iterdir()) == list((run / "helpers").iterdir()) == []
    assert wait_gone(lambda: [shlex.join(p.words) for p in processes(run) if b"helpers" in shlex.join(p.words).encode()]) == []
