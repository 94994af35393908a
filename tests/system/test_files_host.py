"""The guest's files through the real agent's applets, on this host."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from guest_host import children, running_agent
from stoker.errors import Conflict, Forbidden, InvalidRequest, NotFound, StokerError, TooLarge
from stoker.guest.agent import Agent
from stoker.guest.channel import connect
from stoker.guest.files import Change, Files

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
MIB = 1 << 20


@pytest.fixture
async def agent(short_dir: Path) -> AsyncIterator[Agent]:
    path = short_dir / "agent"
    async with running_agent(path) as program, await connect(path, fresh=True, timeout=10) as agent:
        yield agent
        async with asyncio.timeout(5):
            while await agent.processes() or children(program.pid):
                await asyncio.sleep(0.02)


@pytest.fixture
def tree(short_dir: Path) -> Path:
    path = short_dir / "tree"
    path.mkdir()
    return path


@pytest.fixture
def files(agent: Agent, tree: Path) -> Files:
    return Files(agent, cwd=str(tree))


async def blocks(count: int, block: bytes = bytes(MIB)) -> AsyncIterator[bytes]:
    for i in range(count):
        yield i.to_bytes(4, "big") + block


async def test_write_read_append_and_what_is_there(files: Files, tree: Path) -> None:
    entry = await files.write("a/b/c.txt", b"one\n", mode=0o640)
    assert (entry.path, entry.name, entry.type, entry.size, entry.mode) == (
        os.fsencode(tree / "a/b/c.txt"),
        b"c.txt",
        "file",
        4,
        0o640,
    )
    assert (tree / "a/b/c.txt").read_bytes() == b"one\n"
    again = await files.write("a/b/c.txt", b"two\n", append=True)
    assert (again.size, again.version != entry.version) == (8, True)
    assert await files.read("a/b/c.txt") == b"one\ntwo\n"
    assert await files.read("a/b/c.txt", offset=2, length=3) == b"e\nt"
    assert await files.read("a/b/c.txt", offset=100) == b""
    assert (await files.stat(tree / "a/b/c.txt")).version == again.version
    assert await files.exists("a/b")
    assert not await files.exists("a/b/d")
    assert not await files.exists("a/b/c.txt/d")
    await files.write("empty", b"")
    assert await files.read("empty") == b""


async def test_names_that_are_not_text(files: Files, tree: Path) -> None:
    name = "caf\udce9 \udcff"
    entry = await files.write(name, b"x")
    assert entry.name == b"caf\xe9 \xff"
    assert [item.name for item in (await files.list(str(tree))).entries] == [b"caf\xe9 \xff"]
    assert await files.read(b"caf\xe9 \xff") == b"x"


@pytest.mark.parametrize(
    ("operation", "family", "code"),
    [
        (lambda f: f.stat("nothing"), NotFound, "file_not_found"),
        (lambda f: f.read("nothing"), NotFound, "file_not_found"),
        (lambda f: f.read("."), Conflict, None),
        (lambda f: f.read("/dev/null"), Conflict, "not_a_file"),
        (lambda f: f.list("nothing"), NotFound, "file_not_found"),
        (lambda f: f.list("file"), Conflict, "not_directory"),
        (lambda f: f.write("file/below", b""), Conflict, "not_directory"),
        (lambda f: f.write("full", b""), Conflict, "is_directory"),
        (lambda f: f.write("file", b"x", exclusive=True), Conflict, "file_exists"),
        (lambda f: f.write("short", b"x", size=2), InvalidRequest, "short_input"),
        (lambda f: f.mkdir("full", parents=False), Conflict, "file_exists"),
        (lambda f: f.mkdir("file"), Conflict, None),
        (lambda f: f.remove("nothing"), NotFound, "file_not_found"),
        (lambda f: f.remove("full"), Conflict, "directory_not_empty"),
        (lambda f: f.move("nothing", "x"), NotFound, "file_not_found"),
        (lambda f: f.move("file", "full/x", overwrite=False), Conflict, "file_exists"),
        (lambda f: f.chmod("nothing", 0o600), NotFound, "file_not_found"),
        (lambda f: f.chown("file", "nobody-of-that-name"), InvalidRequest, "no_such_user"),
        (lambda f: f.readlink("file"), StokerError, None),
        (lambda f: f.stat("x" * 5000), InvalidRequest, "bad_path"),
        (lambda f: f.stat("a\0b"), InvalidRequest, "bad_path"),
        (lambda f: f.stat("~nobody-of-that-name/x"), InvalidRequest, "bad_path"),
        (lambda f: f.stat("loop"), InvalidRequest, "bad_path"),
        (lambda f: f.tar_in("t", b"not a tar" * 100), InvalidRequest, None),
        (lambda f: Files(f._agent, user="nobody").write("/etc/passwd", b"x", append=True), Forbidden, "permission_denied"),
        (lambda f: Files(f._agent, user="nobody-of-that-name").stat("/"), InvalidRequest, "no_such_user"),
    ],
)
async def test_errors(files: Files, tree: Path, operation: object, family: type[StokerError], code: str | None) -> None:
    (tree / "file").write_bytes(b"content")
    (tree / "full").mkdir()
    (tree / "full" / "x").write_bytes(b"")
    (tree / "loop").symlink_to("loop")
    before = sorted(tree.rglob("*"))
    with pytest.raises(family) as info:
        await operation(files)  # type: ignore[operator]
    if code is not None:
        assert info.value.code == code
    assert info.value.message
    assert [path for path in sorted(tree.rglob("*")) if path.name != "t"] == before
    assert (tree / "file").read_bytes() == b"content"


async def test_changes(files: Files, tree: Path) -> None:
    assert (await files.mkdir("d/e", mode=0o750)).mode == 0o750
    await files.mkdir("d/e")
    await files.write("d/e/f", b"x")
    assert (await files.move("d/e/f", "d/g")).path == os.fsencode(tree / "d/g")
    assert (await files.chmod("d", 0o700, recursive=True)).mode == 0o700
    assert (tree / "d/g").stat().st_mode & 0o777 == 0o700
    link = await files.symlink("l", "d/g")
    assert (link.type, link.target) == ("symlink", b"d/g")
    assert await files.readlink("l") == b"d/g"
    assert await files.readlink("l", canonical=True) == os.fsencode((tree / "d/g").resolve())
    assert (await files.stat("l")).type == "file"
    assert (await files.stat("l", follow=False)).type == "symlink"
    if os.geteuid() == 0:
        assert (await files.chown("d/g", "65534:65534")).uid == 65534
    await files.remove("l")
    assert (tree / "d/g").exists()
    await files.remove("d", recursive=True)
    await files.remove("d", missing_ok=True)
    assert list(tree.iterdir()) == []


async def test_listings(files: Files, tree: Path) -> None:
    for name in ("b", "a", "c/y", "c/x/z"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"")
    names = [item.path[len(os.fsencode(tree)) + 1 :] for item in (await files.list(tree)).entries]
    assert names == [b"a", b"b", b"c"]
    deep = await files.list(tree, depth=3)
    assert [item.path[len(os.fsencode(tree)) + 1 :] for item in deep.entries] == [b"a", b"b", b"c", b"c/x", b"c/x/z", b"c/y"]
    assert (deep.truncated, deep.unreadable) == (False, 0)
    cut = await files.list(tree, depth=3, limit=2)
    assert (len(cut.entries), cut.truncated) == (2, True)
    many = tree / "many"
    many.mkdir()
    for i in range(5000):
        (many / f"{i:05}-{'x' * 100}").touch()
    assert [item.name[:5] for item in (await files.list(many)).entries] == [b"%05d" % i for i in range(5000)]


async def test_128_mib_in_and_out_in_pieces(files: Files, tree: Path) -> None:
    sent, received = hashlib.sha256(), hashlib.sha256()

    async def source() -> AsyncIterator[bytes]:
        async for data in blocks(128):
            sent.update(data)
            yield data

    entry = await files.write("big", source(), mode=0o600)
    assert entry.size == 128 * (MIB + 4)
    async with files.open("big") as pieces:
        async for data in pieces:
            received.update(data)
    assert sent.digest() == received.digest()
    with pytest.raises(TooLarge):
        await files.read("big", limit=MIB)


async def test_a_transfer_that_is_left_leaves_no_file(files: Files, tree: Path) -> None:
    async def breaks() -> AsyncIterator[bytes]:
        async for data in blocks(3):
            yield data
        raise ConnectionResetError("the client has gone")

    (tree / "old").write_bytes(b"old")
    for name in ("old", "new"):
        with pytest.raises(ConnectionResetError):
            await files.write(name, breaks())
    endless = asyncio.create_task(files.write("new", blocks(1_000_000)))
    await asyncio.sleep(0.2)
    endless.cancel()
    with pytest.raises(asyncio.CancelledError):
        await endless
    await asyncio.sleep(0.2)
    assert {path.name: path.read_bytes() for path in tree.iterdir()} == {"old": b"old"}
    async with files.open("/proc/self/exe") as pieces:
        async for _ in pieces:
            break


async def test_a_writer_that_fails_in_the_middle_says_why(files: Files) -> None:
    with pytest.raises(StokerError) as info:
        await files.write("/dev/full", blocks(10), parents=False)
    assert info.value.code == "no_space"


async def test_trees_as_tar(files: Files, tree: Path) -> None:
    source = tree / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_bytes(b"content")
    (source / ("long" * 50)).write_bytes(b"long")
    (source / "link").symlink_to("sub/file")
    os.link(source / "sub" / "file", source / "hard")
    archive = bytearray()
    async with files.tar_out("source") as pieces:
        async for data in pieces:
            archive += data
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert {member.name.removeprefix("./") for member in tar} >= {"sub", "sub/file", "long" * 50, "link", "hard"}

    async def slowly() -> AsyncIterator[bytes]:
        for at in range(0, len(archive), 1000):
            yield bytes(archive[at : at + 1000])

    await files.tar_in("copy", slowly())
    assert (tree / "copy/sub/file").read_bytes() == b"content"
    assert os.readlink(tree / "copy/link") == "sub/file"
    assert (tree / "copy/hard").stat().st_ino == (tree / "copy/sub/file").stat().st_ino
    with pytest.raises(InvalidRequest) as info:
        await files.tar_in("torn", bytes(archive[:700]))
    assert info.value.code == "short_input"


async def test_a_tar_does_not_leave_its_directory(files: Files, tree: Path) -> None:
    for name in ("../out", "/tmp/stoker-out", "link/out"):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, str(tree)
            tar.addfile(link)
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"out"))
        with pytest.raises(InvalidRequest) as info:
            await files.tar_in("target", packed.getvalue())
        assert info.value.code == "bad_archive"
        assert not (tree / "out").exists()
        assert not Path("/tmp/stoker-out").exists()


async def test_watch(files: Files, tree: Path) -> None:
    seen: list[Change] = []
    async with files.watch(tree, recursive=True) as watch:

        async def until(kind: str, name: str) -> Change:
            async with asyncio.timeout(10):
                async for change in watch:
                    seen.append(change)
                    if change.e == kind and change.path == os.fsencode(tree / name):
                        return change
            raise AssertionError(f"no {kind} {name}")

        (tree / "d").mkdir()
        assert (await until("created", "d")).directory
        (tree / "d" / "f").write_bytes(b"x")
        await until("modified", "d/f")
        (tree / "d" / "f").rename(tree / "g")
        assert (await until("moved", "g")).old_path == os.fsencode(tree / "d" / "f")
        (tree / "g").chmod(0o600)
        await until("attributes", "g")
        (tree / "g").unlink()
        await until("removed", "g")
        (tree / "d").rmdir()
        tree.rmdir()
        async with asyncio.timeout(10):
            seen += [change async for change in watch]
    assert seen[-1].e == "ended"
    with pytest.raises(NotFound):
        async with files.watch("/nonexistent"):
            pass


async def test_100_small_files_at_once(files: Files, tree: Path) -> None:
    await asyncio.gather(*(files.write(f"d{i % 10}/f{i}", b"%d" % i) for i in range(100)))
    contents = await asyncio.gather(*(files.read(f"d{i % 10}/f{i}") for i in range(100)))
    assert contents == [b"%d" % i for i in range(100)]
