"""A directory as an exact tar, as Python's and GNU's tar read it again."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from stoker.client.archive import pack, save

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners and trusted attributes need root")


async def _packed(top: Path) -> bytes:
    return b"".join([piece async for piece in pack(top, exact=True)])


def packed(top: Path) -> bytes:
    return asyncio.run(_packed(top))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "in"
    (top / "d").mkdir(parents=True)
    (top / "d/f").write_bytes(b"x" * 1000)
    os.link(top / "d/f", top / "same")
    os.chown(top / "d/f", 7, 3_000_000)
    os.setxattr(top / "d/f", "user.a=%", b"\0\xff=\n")
    os.setxattr(top / "d", "trusted.t", b"t")
    os.utime(top / "d/f", ns=(0, 1_000_000_000_000_000_007))
    os.symlink("é" * 60, top / "link")
    with open(top / "holes", "wb") as file:
        file.truncate(3 << 30)
        for at in (1 << 20, 2 << 30):
            file.seek(at)
            file.write(b"data" * 2000)
    with open(top / ("long" * 40), "wb") as file:
        file.truncate(1 << 20)
    return top


def test_gnu_tar_gets_back_what_went_in(tree: Path, tmp_path: Path) -> None:
    data, out = packed(tree), tmp_path / "out"
    assert len(data) < 1 << 20
    out.mkdir()
    subprocess.run(["tar", "-C", out, "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", "-"], input=data, check=True)
    status = (out / "d/f").stat()
    assert (status.st_uid, status.st_gid, status.st_nlink, status.st_mtime_ns) == (7, 3_000_000, 2, 1_000_000_000_000_000_007)
    assert os.getxattr(out / "d/f", "user.a=%") == b"\0\xff=\n" and os.getxattr(out / "d", "trusted.t") == b"t"
    holes = out / "holes"
    assert holes.stat().st_size == 3 << 30 and holes.stat().st_blocks * 512 < 1 << 20
    with open(holes, "rb") as file:
        file.seek((2 << 30) - 2)
        assert file.read(8003) == b"\0\0" + b"data" * 2000 + b"\0"
    assert (out / ("long" * 40)).stat().st_size == 1 << 20
    assert os.readlink(out / "link") == "é" * 60


def test_the_same_tree_is_the_same_archive(tree: Path) -> None:
    assert packed(tree) == packed(tree)
    with tarfile.open(fileobj=io.BytesIO(packed(tree))) as archive:
        assert archive.getnames()[0] == "." and archive.getmember("holes").issparse()


def test_zeros_become_holes(tmp_path: Path) -> None:
    async def pieces() -> object:
        yield bytes(1 << 20)
        yield b"x" * 100 + bytes(1 << 20)
        yield bytes(3 << 20)

    place = tmp_path / "raw"
    asyncio.run(save(pieces(), place, 0o600, sparse=True))  # type: ignore[arg-type]
    assert place.read_bytes() == bytes(1 << 20) + b"x" * 100 + bytes(4 << 20)
    assert place.stat().st_blocks * 512 < 1 << 20
