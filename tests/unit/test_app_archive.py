"""App archives: hostile ones are refused with the entry's name, good ones become one image, whoever asks and however often."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from stoker.errors import InvalidRequest, StokerError, TooLarge
from stoker.storage import app as apps
from stoker.storage.app import app_image, find_app, make_app, prepare_apps, sweep_apps
from stoker.storage.app_archive import Bounds, Entry, unpack

SMALL = Bounds(entries=20, bytes=1 << 20, depth=8, path=300)


def tar(*members: tuple[str, str, bytes | str], gz: bool = False) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if gz else "w", format=tarfile.PAX_FORMAT) as archive:
        for kind, name, what in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.mtime = kind.encode(), 0o644, 77
            if isinstance(what, bytes):
                info.size = len(what)
                archive.addfile(info, io.BytesIO(what))
            else:
                info.linkname = what
                archive.addfile(info)
    return out.getvalue()


def packed(*members: tuple[str, int, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, mode, data in members:
            info = zipfile.ZipInfo(name, (2001, 2, 3, 4, 5, 6))
            info.create_system, info.external_attr, info.compress_type = 3, mode << 16, method
            archive.writestr(info, data)
    return out.getvalue()


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data and len(old) == len(new)
    return data.replace(old, new)


def many(count: int) -> bytes:
    return tar(*(("0", f"f{i}", b"") for i in range(count)))


def sparse() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("holes")
        info.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "holes",
            "GNU.sparse.realsize": "9",
        }
        archive.addfile(info)
    return out.getvalue()


def long_header() -> bytes:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32
    return info.tobuf(tarfile.USTAR_FORMAT) + bytes(2048)


L, F = stat.S_IFLNK | 0o777, stat.S_IFREG | 0o644
HOSTILE: dict[str, tuple[bytes, str]] = {
    "absolute": (tar(("0", "/etc/passwd", b"x")), "/etc/passwd"),
    "dotdot": (tar(("0", "a/../../x", b"x")), "a/../../x"),
    "dotdot alone": (tar(("5", "..", "")), ".."),
    "through a link": (tar(("2", "d", "/tmp"), ("0", "d/x", b"x")), "d/x"),
    "through a file": (tar(("0", "d", b""), ("0", "d/x", b"x")), "d/x"),
    "twice": (tar(("0", "a", b"1"), ("0", "a", b"2")), "a"),
    "twice by another spelling": (tar(("0", "a/b", b"1"), ("0", "./a//b", b"2")), "./a//b"),
    "a directory in place of a link": (tar(("2", "a", "/tmp"), ("5", "a", "")), "a"),
    "a link in place of a directory": (tar(("5", "a", ""), ("2", "a", "/tmp")), "a"),
    "device": (tar(("3", "null", "")), "null"),
    "pipe": (tar(("6", "pipe", "")), "pipe"),
    "hard link out": (tar(("1", "a", "../x")), "../x"),
    "hard link to nothing": (tar(("1", "a", "b")), "a"),
    "hard link to a link": (tar(("2", "l", "/etc/shadow"), ("1", "a", "l")), "a"),
    "line break": (tar(("0", "a\nb", b"")), "a\nb"),
    "link target with a line break": (tar(("2", "a", "x\ny")), "a"),
    "too deep": (tar(("0", "/".join("d" * 9) + "/x", b"")), "d/d"),
    "too long": (tar(("0", "n" * 290 + "/" + "m" * 290, b"")), "nnn"),
    "long part": (tar(("0", "n" * 256, b"")), "nnn"),
    "without a name": (tar(("0", "./", b"x")), "."),
    "sparse": (sparse(), ""),
    "endless header": (long_header(), ""),
    "too many": (many(21), "f20"),
    "too large": (tar(("0", "big", bytes(1 << 20) + b"x")), "big"),
    "bomb": (tar(("0", "a", bytes(600 << 10)), ("0", "b", bytes(600 << 10)), gz=True), "b"),
    "cut off": (tar(("0", "a", b"x" * 5000))[:3000], ""),
    "damaged gzip": (tar(("0", "a", os.urandom(5000)), gz=True)[:2000] + bytes(100), ""),
    "neither": (b"#!/bin/sh\necho no archive\n" * 30, "neither"),
    "empty": (b"", "neither"),
    "zip absolute": (packed(("/etc/passwd", F, b"x")), "/etc/passwd"),
    "zip dotdot": (packed(("a/../../x", F, b"x")), "a/../../x"),
    "zip through a link": (packed(("d", L, b"/tmp"), ("d/x", F, b"x")), "d/x"),
    "zip device": (packed(("null", stat.S_IFCHR | 0o666, b"")), "null"),
    "zip link without end": (packed(("l", L, b"x" * 5000)), "l"),
    "zip link to nothing": (packed(("l", L, b"")), "l"),
    "zip bomb": (packed(("zeros", F, bytes(2 << 20))), "zeros"),
    "zip method": (packed(("x", F, b"x" * 100), method=zipfile.ZIP_LZMA), "x"),
    "zip too many": (packed(*((f"f{i}", F, b"") for i in range(21))), "21"),
    "zip lies about a size": (patched(packed(("x", F, bytes(3000))), (3000).to_bytes(4, "little"), (10).to_bytes(4, "little")), ""),
    "zip cut off": (packed(("x", F, b"x"))[:-10], ""),
    "zip crc": (patched(packed(("x", F, b"hello"), method=zipfile.ZIP_STORED), b"hello", b"jello"), ""),
    "zip directory without end": (packed(("x", F, b""))[:-10] + b"\xff\xff\xff\x7f" + packed(("x", F, b""))[-6:], ""),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(tmp_path: Path, name: str) -> None:
    data, entry = HOSTILE[name]
    archive, top, outside = tmp_path / "archive", tmp_path / "top", tmp_path / "x"
    archive.write_bytes(data)
    top.mkdir()
    with pytest.raises((InvalidRequest, TooLarge)) as raised:
        unpack(archive, top, SMALL)
    assert raised.value.code == "bad_archive"
    assert repr(entry)[1:-1] in raised.value.message, raised.value.message
    assert not outside.exists() and sorted(os.listdir(tmp_path)) == ["archive", "top"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_an_entry_twice(tmp_path: Path) -> None:
    archive, top = tmp_path / "archive", tmp_path / "top"
    archive.write_bytes(packed(("a", F, b"1"), ("a", F, b"2")))
    top.mkdir()
    with pytest.raises(InvalidRequest, match="is there twice"):
        unpack(archive, top)


def test_what_entries_say(tmp_path: Path) -> None:
    archive, top = tmp_path / "archive", tmp_path / "top"
    archive.write_bytes(
        tar(
            ("5", "./", ""),
            ("0", "bin/go", b"go"),
            ("1", "bin/same", "./bin/go"),
            ("2", "abs", "/etc/x"),
            ("2", "up", "../../x"),
            gz=True,
        )
    )
    top.mkdir()
    assert unpack(archive, top) == [
        Entry("bin", "directory", 0o755, 0),
        Entry("bin/go", "file", 0o644, 77, size=2),
        Entry("bin/same", "same", 0o644, 77, target="bin/go"),
        Entry("abs", "link", 0o777, 77, target="/etc/x"),
        Entry("up", "link", 0o777, 77, target="../../x"),
    ]
    assert os.stat(top / "bin/go").st_nlink == 2


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    prepare_apps(tmp_path)
    return tmp_path


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


def make(data_dir: Path, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    asyncio.run(make_app(data_dir, digest, pieces(data)))
    return digest


def ask(image: Path, command: str) -> str:
    done = subprocess.run(["debugfs", "-R", command, image], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    return done.stdout


def test_an_image_is_exact_and_made_once(data_dir: Path) -> None:
    data = packed(
        ("bin/", stat.S_IFDIR | 0o750, b""),
        ("bin/go", stat.S_IFREG | 0o4755, b"#!/bin/sh\n"),
        ('a "b" c', F, b"q"),
        ("l", L, b"bin/go"),
    )
    digest = make(data_dir, data)
    image = app_image(data_dir, digest)
    assert find_app(data_dir, digest) is not None
    go = ask(image, 'stat "/bin/go"')
    assert "Mode:  04755" in go and "User:     0   Group:     0" in go and f"{981173106:x}" in go
    assert "Mode:  0750" in ask(image, 'stat "/bin"')
    assert 'Fast link dest: "bin/go"' in ask(image, 'stat "/l"')
    assert ask(image, 'cat "/a ""b"" c"') == "q"
    assert "lost+found" not in ask(image, "ls /") and "Mode:  0755" in ask(image, "stat /")
    subprocess.run(["e2fsck", "-fn", image], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert image.stat().st_mode & 0o777 == 0o444 and image.stat().st_blocks * 512 < 8 << 20
    before = image.stat()
    assert make(data_dir, data) == digest
    assert (image.stat().st_ino, image.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list((data_dir / "apps/staging").iterdir()) == []


def test_two_at_once_make_one(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, built = tar(("0", "f", b"x" * 5000)), []
    digest = hashlib.sha256(data).hexdigest()
    build = apps._build

    async def counting(*words: object) -> object:
        built.append(1)
        return await build(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(apps, "_build", counting)

    async def both() -> None:
        await asyncio.gather(*(make_app(data_dir, digest, pieces(data)) for _ in range(3)))

    asyncio.run(both())
    assert built == [1] and list((data_dir / "apps/staging").iterdir()) == []


@pytest.mark.parametrize("data", [tar(("0", "../x", b"")), b"nothing"])
def test_a_refused_archive_leaves_nothing(data_dir: Path, data: bytes) -> None:
    with pytest.raises(StokerError):
        make(data_dir, data)
    assert sorted(os.listdir(data_dir / "apps")) == ["disks", "locks", "staging"]
    assert list((data_dir / "apps/staging").iterdir()) == []


def test_another_checksum_is_refused(data_dir: Path) -> None:
    with pytest.raises(InvalidRequest) as raised:
        asyncio.run(make_app(data_dir, "0" * 64, pieces(tar(("0", "f", b"x")))))
    assert raised.value.code == "digest_mismatch"
    assert list((data_dir / "apps/staging").iterdir()) == []


@pytest.mark.parametrize("when", ["_receive", "_build", "_publish"])
def test_a_maker_that_is_killed_leaves_what_the_sweep_removes(data_dir: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    data = tar(("0", "f", b"x" * 5000))
    real: Callable[..., object] = getattr(apps, when)
    process = os.fork()
    if process == 0:
        try:
            if when == "_publish":
                monkeypatch.setattr(apps, when, lambda *_: os.kill(os.getpid(), 9))
            else:

                async def dying(*words: object) -> None:
                    await real(*words)  # type: ignore[misc]
                    os.kill(os.getpid(), 9)

                monkeypatch.setattr(apps, when, dying)
            make(data_dir, data)
        finally:
            os._exit(1)
    assert os.waitpid(process, 0)[1] == 9
    assert len(list((data_dir / "apps/staging").iterdir())) == 1
    sweep_apps(data_dir)
    assert list((data_dir / "apps/staging").iterdir()) == []
    digest = make(data_dir, data)
    assert app_image(data_dir, digest).exists()


def test_the_sweep_leaves_what_is_being_made(data_dir: Path) -> None:
    stage = apps._Stage(data_dir)
    sweep_apps(data_dir)
    assert stage.path.exists()
    stage.remove()
