"""Offline edits of ext4 images: the script by value, real images, names of every kind, failures that leave the image as it was."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stoker.errors import HostError, InvalidRequest
from stoker.host.ext4_edit import Change, Edit, PutDirectory, PutFile, PutSymlink, edit_image, render

QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ext4") / "fresh.img"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-b", "4096", path, "8M"], check=True, **QUIET)  # type: ignore[call-overload]
    return path


@pytest.fixture
def image(fresh: Path, tmp_path: Path) -> Path:
    path = tmp_path / "image.ext4"
    path.write_bytes(fresh.read_bytes())
    return path


def edit(image: Path, *edits: Edit) -> None:
    asyncio.run(edit_image(image, edits))


def sum_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def dump(image: Path, name: bytes) -> bytes:
    out = image.with_name("dumped")
    out.unlink(missing_ok=True)
    command = b'dump "' + name.replace(b'"', b'""') + b'" ' + os.fsencode(out)
    subprocess.run([b"debugfs", b"-R", command, os.fsencode(image)], check=True, **QUIET)  # type: ignore[call-overload]
    return out.read_bytes() if out.exists() else b"MISSING"


def test_the_script_by_value() -> None:
    script = render(
        [
            PutDirectory(b"/root/.ssh", mode=0o700),
            PutFile(b"/root/.ssh/authorized keys", b"key", mode=0o600, uid=7, mtime=5, xattrs=((b"user.a", b"v"),)),
            PutSymlink(b'/a"b', b"/t x"),
            Change(b"/etc", uid=1, mode=0o40711),
        ],
        {b"/root/.ssh/authorized keys", b"/etc"},
    )
    assert script.text.decode().splitlines() == [
        'mkdir "/root/.ssh"',
        'sif "/root/.ssh" uid 0',
        'sif "/root/.ssh" gid 0',
        'sif "/root/.ssh" mode 040700',
        'rm "/root/.ssh/authorized keys"',
        'cd "/root/.ssh"',
        'write 0 "authorized keys"',
        "cd /",
        'sif "/root/.ssh/authorized keys" uid 7',
        'sif "/root/.ssh/authorized keys" gid 0',
        'sif "/root/.ssh/authorized keys" mode 0100600',
        'sif "/root/.ssh/authorized keys" mtime @5',
        'ea_set -f 1 "/root/.ssh/authorized keys" "user.a"',
        'symlink "/a""b" "/t x"',
        'sif "/a""b" uid 0',
        'sif "/a""b" gid 0',
        'sif "/a""b" mode 0120777',
        'sif "/etc" uid 1',
        'sif "/etc" mode 040711',
    ]
    assert script.files == (b"key", b"v")


@pytest.mark.parametrize(
    "bad",
    [
        PutFile(b"/a\nb", b""),
        PutFile(b"/a\rb", b""),
        PutFile(b"/a\0b", b""),
        PutFile(b"relative", b""),
        PutFile(b"/", b""),
        PutFile(b"/a/../b", b""),
        PutFile(b"/a//b", b""),
        PutFile(b"/" + b"x" * 256, b""),
        PutDirectory(b"/" + b"/".join([b"d" * 200] * 45)),
        PutSymlink(b"/a", b""),
        PutSymlink(b"/a", b"x\ny"),
        PutSymlink(b"/a", b"x" * 4096),
        PutFile(b"/a", b"", uid=-1),
        PutFile(b"/a", b"", xattrs=((b"nonsense", b"v"),)),
        PutFile(b"/a", b"", xattrs=((b"user.a\nb", b"v"),)),
    ],
)
def test_what_cannot_be_said_is_refused_before_anything_is_written(image: Path, bad: Edit) -> None:
    before, listed = sum_of(image), sorted(os.listdir(image.parent))
    with pytest.raises(InvalidRequest) as raised:
        edit(image, PutFile(b"/first", b"x"), bad)
    assert raised.value.code == "bad_edit"
    assert (sum_of(image), sorted(os.listdir(image.parent))) == (before, listed)


def test_keys_for_ssh(image: Path) -> None:
    """Twice: the second time everything is there and is replaced."""
    for key in (b"ssh-ed25519 AAAA one\n", b"ssh-ed25519 BBBB two\n"):
        edit(
            image,
            PutDirectory(b"/root", mode=0o700),
            PutDirectory(b"/root/.ssh", mode=0o700),
            PutFile(b"/root/.ssh/authorized_keys", key, mode=0o600, xattrs=((b"user.made_by", b"stoker"),)),
            PutSymlink(b"/root/short", b"a b"),
            PutSymlink(b"/root/long", b"x/" * 100),
            Change(b"/lost+found", gid=1234, mtime=1_000_000_000),
        )
        assert dump(image, b"/root/.ssh/authorized_keys") == key
    subprocess.run(["e2fsck", "-fn", image], check=True, **QUIET)  # type: ignore[call-overload]
    assert sorted(os.listdir(image.parent)) == ["dumped", "image.ext4"]


NAMES = st.binary(min_size=1, max_size=40).filter(
    lambda name: not set(name) & set(b"/\n\r\0") and name not in (b".", b"..", b"lost+found")
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(directory=NAMES, names=st.lists(NAMES, min_size=1, max_size=6, unique=True), content=st.binary(max_size=9000))
def test_any_name(fresh: Path, tmp_path: Path, directory: bytes, names: list[bytes], content: bytes) -> None:
    image = tmp_path / "any.ext4"
    image.write_bytes(fresh.read_bytes())
    top = b"/" + directory
    edit(
        image,
        PutDirectory(top),
        *(PutFile(top + b"/" + name, content + name) for name in names),
        PutSymlink(top + b"/" + b"l" * 41, names[0]),
    )
    for name in names:
        assert dump(image, top + b"/" + name) == content + name


def test_a_full_image_stays_as_it_was(image: Path) -> None:
    before = sum_of(image)
    with pytest.raises(HostError) as raised:
        edit(image, PutFile(b"/small", b"x"), PutFile(b"/large", os.urandom(9 << 20)))
    assert raised.value.code == "edit_failed"
    assert sum_of(image) == before and sorted(os.listdir(image.parent)) == ["image.ext4"]


@pytest.mark.parametrize("bad", [PutFile(b"/no/such/directory", b"x"), Change(b"/nothing", uid=1), PutFile(b"/lost+found", b"x")])
def test_an_impossible_edit_leaves_the_image_as_it_was(image: Path, bad: Edit) -> None:
    before = sum_of(image)
    with pytest.raises(HostError) as raised:
        edit(image, PutFile(b"/fine", b"x"), bad)
    assert raised.value.code == "edit_failed"
    assert sum_of(image) == before and sorted(os.listdir(image.parent)) == ["image.ext4"]


def test_a_crash_before_the_swap_leaves_the_image_and_the_next_edit_works(image: Path) -> None:
    before = sum_of(image)
    process = os.fork()
    if process == 0:
        try:
            asyncio.run(edit_image(image, [PutFile(b"/a", b"x")], before_swap=lambda: os.kill(os.getpid(), 9)))
        finally:
            os._exit(1)
    assert os.waitpid(process, 0)[1] == 9
    assert sum_of(image) == before
    edit(image, PutFile(b"/b", b"y"))
    assert (dump(image, b"/a"), dump(image, b"/b")) == (b"MISSING", b"y")
    assert sorted(os.listdir(image.parent)) == ["dumped", "image.ext4"]


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(b"no file system" * 1000)
    with pytest.raises(HostError):
        edit(path, PutFile(b"/a", b""))
    assert path.read_bytes() == b"no file system" * 1000
