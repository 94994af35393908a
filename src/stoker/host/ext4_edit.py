"""Changing an ext4 file system in a plain file without mounting it: one batch of edits, one ``debugfs``, read back, checked.

Edits are values; :func:`render` makes them a script (pure), :func:`edit_image` applies it. All of them happen or none: the script
works on a copy beside the image (blocks are shared where the host's file system can), which is read back, checked by ``e2fsck -fn``
and only then renamed over the image. A crash leaves the image as it was, and perhaps ``IMAGE.edit`` and ``IMAGE.edit.d/``, which
the next edit replaces and whoever removes the image removes too. A base, or an image in use, is no image for this.

debugfs reads commands a line at a time: a name with a line break cannot be said, and is refused before anything is written. Spaces,
quotes, backslashes and bytes that are no text can. It ends with 0 whatever happens: what it says on stderr, and above all what is
read back, tell how it went.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from stoker.errors import HostError, InvalidRequest
from stoker.host.durable import sync_directory
from stoker.host.reflink import share, sparse_copy
from stoker.host.run import Completed, run

__all__ = ["Change", "Edit", "PutDirectory", "PutFile", "PutSymlink", "apply", "edit_image", "render", "render_check"]

LONGEST_LINE = 8000
"""debugfs has a buffer of 8191 bytes and takes the rest of a longer line for another command."""
AT_ONCE = 4000
"""Edits read back by one debugfs: what it prints of each is kept in memory."""
LONGEST_NAME = 255
LONGEST_TARGET = 4095
XATTR = re.compile(rb"(user|trusted|security|system)\.[!-~]{1,200}")


@dataclass(frozen=True, slots=True)
class PutFile:
    """A regular file with this content; one that is there is replaced. Its directory exists, or is made by an earlier edit."""

    path: bytes
    content: bytes
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int | None = None
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class PutDirectory:
    """A directory; one that is there keeps its content and gets these attributes."""

    path: bytes
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int | None = None
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class PutSymlink:
    """A symbolic link; what is there under its name (but a directory) is replaced."""

    path: bytes
    target: bytes
    uid: int = 0
    gid: int = 0
    mtime: int | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """Attributes of something that is there already; None leaves one as it is. ``mode`` has the file type's bits too."""

    path: bytes
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    mtime: int | None = None
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


Edit: TypeAlias = PutFile | PutDirectory | PutSymlink | Change


def _refuse(path: bytes, why: str) -> InvalidRequest:
    return InvalidRequest("bad_edit", f"{os.fsdecode(path)[:200]!r}: {why}", "nothing was written")


def quoted(word: bytes) -> bytes:
    """A word of debugfs' command language. :class:`InvalidRequest` (``bad_edit``) for one that it cannot say."""
    if b"\n" in word or b"\r" in word or b"\0" in word:
        raise _refuse(word, "a line break in a name")
    return b'"' + word.replace(b'"', b'""') + b'"'


def _path(path: bytes) -> bytes:
    parts = path.split(b"/")
    if parts[0] or len(parts) < 2 or any(part in (b"", b".", b"..") for part in parts[1:]):
        raise _refuse(path, "not an absolute path without '.', '..' and empty parts")
    if any(len(part) > LONGEST_NAME for part in parts):
        raise _refuse(path, f"a name of more than {LONGEST_NAME} bytes")
    return quoted(path)


def _attributes(path: bytes, kind: int, uid: int | None, gid: int | None, mode: int | None, mtime: int | None) -> list[bytes]:
    for number, most in ((uid, 2**32 - 2), (gid, 2**32 - 2), (mode, 0o177777), (mtime, 2**33)):
        if number is not None and not 0 <= number <= most:
            raise _refuse(path, f"{number} is not an owner, a mode or a time")
    name = _path(path)
    lines = [b"sif %s uid %d" % (name, uid)] if uid is not None else []
    lines += [b"sif %s gid %d" % (name, gid)] if gid is not None else []
    lines += [b"sif %s mode 0%o" % (name, kind | mode)] if mode is not None else []
    lines += [b"sif %s mtime @%d" % (name, mtime)] if mtime is not None else []
    return lines


@dataclass(frozen=True, slots=True)
class Script:
    """Lines for ``debugfs -f`` and the files they read: :func:`render` numbers them, ``0`` upwards."""

    text: bytes
    files: tuple[bytes, ...]


def _xattrs(edit: PutFile | PutDirectory | Change, files: list[bytes]) -> list[bytes]:
    lines = []
    for name, value in edit.xattrs:
        if XATTR.fullmatch(name) is None or not value or len(value) > 4000:
            raise _refuse(edit.path, f"the extended attribute {os.fsdecode(name)[:100]!r} cannot be set")
        lines.append(b"ea_set -f %d %s %s" % (len(files), _path(edit.path), quoted(name)))
        files.append(value)
    return lines


def _lines(edit: Edit, files: list[bytes], there: bool) -> list[bytes]:
    name = _path(edit.path)
    gone = [b"rm " + name] if there else []
    if isinstance(edit, PutFile):
        directory, _, last = edit.path.rpartition(b"/")
        # `write` takes a name in the current directory, nothing else.
        lines = [
            *gone,
            b"cd " + (quoted(directory) if directory else b"/"),
            b"write %d %s" % (len(files), quoted(last)),
            b"cd /",
        ]
        files.append(edit.content)
        attributes = _attributes(edit.path, stat.S_IFREG, edit.uid, edit.gid, edit.mode, edit.mtime)
        return [*lines, *attributes, *_xattrs(edit, files)]
    if isinstance(edit, PutDirectory):
        attributes = _attributes(edit.path, stat.S_IFDIR, edit.uid, edit.gid, edit.mode, edit.mtime)
        # On a directory that is there, mkdir would leave a lost inode behind (e2fsprogs 1.47).
        return [*([] if there else [b"mkdir " + name]), *attributes, *_xattrs(edit, files)]
    if isinstance(edit, PutSymlink):
        if not 0 < len(edit.target) <= LONGEST_TARGET:
            raise _refuse(edit.path, "a link's target has 1 to 4095 bytes")
        attributes = _attributes(edit.path, stat.S_IFLNK, edit.uid, edit.gid, 0o777, edit.mtime)
        return [*gone, b"symlink %s %s" % (name, quoted(edit.target)), *attributes]
    return [*_attributes(edit.path, 0, edit.uid, edit.gid, edit.mode, edit.mtime), *_xattrs(edit, files)]


def render(edits: Sequence[Edit], there: Collection[bytes] = ()) -> Script:
    """The batch; ``there``: the paths that exist already.

    Raises ``bad_edit`` for anything debugfs' language or ext4 cannot hold; nothing has been written then.
    """
    files: list[bytes] = []
    lines: list[bytes] = []
    for edit in edits:
        lines += _lines(edit, files, edit.path in there)
        if any(len(line) > LONGEST_LINE for line in lines[-8:]):
            raise _refuse(edit.path, f"a line of more than {LONGEST_LINE} bytes")
    return Script(b"".join(line + b"\n" for line in lines), tuple(files))


def render_check(edits: Sequence[Edit]) -> bytes:
    """What reads the result back: for each edit a ``stat``, and its content into ``r.INDEX`` (attributes: ``r.INDEX.K``)."""
    lines = []
    for index, edit in enumerate(edits):
        name = _path(edit.path)
        lines.append(b"stat " + name)
        if isinstance(edit, PutFile):
            lines.append(b"dump %s r.%d" % (name, index))
        elif isinstance(edit, PutSymlink):
            if len(edit.target) >= 60:
                lines.append(b"dump %s r.%d" % (name, index))
        if not isinstance(edit, PutSymlink):
            lines += [b"ea_get -f r.%d.%d %s %s" % (index, k, name, quoted(key)) for k, (key, _) in enumerate(edit.xattrs)]
    return b"".join(line + b"\n" for line in lines)


_STAT = re.compile(
    rb"Inode: \d+ +Type: (?P<type>.+?) +Mode: +0?(?P<mode>[0-7]+) +Flags:.*?^User: +(?P<uid>\d+) +Group: +(?P<gid>\d+) "
    rb".*?Size: (?P<size>\d+)$(?:.*?^ mtime: 0x(?P<mtime>[0-9a-f]+)(?::(?P<more>[0-9a-f]+))?)?",
    re.DOTALL | re.MULTILINE,
)
_TYPES = {b"regular": stat.S_IFREG, b"directory": stat.S_IFDIR, b"symlink": stat.S_IFLNK}


def _stats(output: bytes) -> list[bytes]:
    """What each ``stat`` of a batch printed. The commands are echoed, and nothing else can look so."""
    parts = re.split(rb"^debugfs: ", output, flags=re.MULTILINE)
    return [part.partition(b"\n")[2] for part in parts if part.startswith(b"stat ")]


def _differs(index: int, edit: Edit, said: bytes, scratch: Path) -> str | None:
    """What is not as the edit wanted it."""
    found = _STAT.search(said)
    if found is None:
        return "it is not there"
    kind = {PutFile: b"regular", PutDirectory: b"directory", PutSymlink: b"symlink"}.get(type(edit))
    if kind is not None and found["type"] != kind:
        return f"it is a {found['type'].decode()}"
    mode = 0o777 if isinstance(edit, PutSymlink) else edit.mode
    seconds = int(found["mtime"] or b"0", 16) + ((int(found["more"] or b"0", 16) & 3) << 32)
    for what, wanted, got in (
        ("owner", edit.uid, int(found["uid"])),
        ("group", edit.gid, int(found["gid"])),
        ("mode", None if mode is None else stat.S_IMODE(mode), int(found["mode"], 8)),
        ("time", edit.mtime, seconds),
    ):
        if wanted is not None and wanted != got:
            return f"its {what} is {got}, not {wanted}"
    if isinstance(edit, Change) and edit.mode is not None and _TYPES.get(found["type"]) not in (None, stat.S_IFMT(edit.mode)):
        return "its type changed"
    if isinstance(edit, PutFile) and _content(scratch / f"r.{index}") != edit.content:
        return "its content is another"
    if isinstance(edit, PutSymlink):
        short = re.search(rb'^Fast link dest: "(.*)"$', said, re.MULTILINE | re.DOTALL)
        target = short[1] if short else _content(scratch / f"r.{index}")
        return None if target == edit.target else "it points elsewhere"
    for k, (key, value) in enumerate(edit.xattrs):
        if _content(scratch / f"r.{index}.{k}") != value:
            return f"its attribute {key.decode()} is another"
    return None


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _complaints(done: Completed) -> list[str]:
    """What debugfs said besides its banner."""
    lines = done.stderr.decode(errors="replace").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("debugfs 1.")]


async def _existing(image: Path, edits: Sequence[Edit], scratch: Path, pass_fds: Sequence[int]) -> set[bytes]:
    """Which paths are there already. Raises when one of them is in the way of what is to be put there."""
    found = set()
    for start in range(0, len(edits), AT_ONCE):
        part = edits[start : start + AT_ONCE]
        (scratch / "look").write_bytes(b"".join(b"stat %s\n" % _path(edit.path) for edit in part))
        look = await run(["debugfs", "-f", "look", image], cwd=scratch, pass_fds=pass_fds)
        for edit, said in zip(part, _stats(look.stdout), strict=False):
            if (status := _STAT.search(said)) is None:
                continue
            found.add(edit.path)
            if not isinstance(edit, Change) and (status["type"] == b"directory") != isinstance(edit, PutDirectory):
                raise _failed(image, f"{os.fsdecode(edit.path)[:200]!r} is a {status['type'].decode()} already", [])
    return found


async def apply(image: Path, edits: Sequence[Edit], scratch: Path, *, pass_fds: Sequence[int] = ()) -> None:
    """Applies a batch to an image in place, reads it back and checks the file system. ``scratch``: an empty directory.

    For images that are being made: after an error the image is good for nothing. The tools inherit ``pass_fds`` (a stage's lock).
    """
    render(edits)
    name = image.absolute()
    script = render(edits, await _existing(name, edits, scratch, pass_fds))
    await asyncio.to_thread(_write_files, scratch, script)
    done = await run(["debugfs", "-w", "-f", "script", name], cwd=scratch, pass_fds=pass_fds)
    if said := _complaints(done):
        raise _failed(image, said[0], said)
    for start in range(0, len(edits), AT_ONCE):
        part = edits[start : start + AT_ONCE]
        (scratch / "check").write_bytes(render_check(part))
        check = await run(["debugfs", "-f", "check", name], cwd=scratch, pass_fds=pass_fds)
        stats = _stats(check.stdout)
        if len(stats) != len(part):
            raise _failed(image, "it could not be read back", _complaints(check))
        for index, (edit, said_of) in enumerate(zip(part, stats, strict=True)):
            if (why := _differs(index, edit, said_of, scratch)) is not None:
                raise _failed(image, f"{os.fsdecode(edit.path)[:200]!r}: {why}", _complaints(check))
    await run(["e2fsck", "-fn", name], pass_fds=pass_fds)


def _failed(image: Path, why: str, said: list[str]) -> HostError:
    return HostError("edit_failed", f"{image} could not be changed: {why}", "the image is as it was", details={"stderr": said[:20]})


def _write_files(scratch: Path, script: Script) -> None:
    (scratch / "script").write_bytes(script.text)
    for number, content in enumerate(script.files):
        (scratch / str(number)).write_bytes(content)


def _copy(image: Path, copy: Path) -> None:
    copy.unlink(missing_ok=True)
    with open(image, "rb") as source:
        mode = os.fstat(source.fileno()).st_mode & 0o777
        with open(copy, "xb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, mode)) as target:
            try:
                share(source.fileno(), target.fileno())
            except OSError:
                sparse_copy(source.fileno(), target.fileno())


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


async def edit_image(image: Path, edits: Sequence[Edit], *, before_swap: Callable[[], None] = lambda: None) -> None:
    """Changes an image that nobody uses: all edits, or none. Raises ``bad_edit``, ``edit_failed``, ``no_space``, ``tool_missing``.

    ``before_swap`` is called when the changed copy is complete (tests end the process there).
    """
    render(edits)
    copy, scratch = image.with_name(image.name + ".edit"), image.with_name(image.name + ".edit.d")
    try:
        await asyncio.to_thread(_copy, image, copy)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(0o700)
        try:
            await apply(copy, edits, scratch)
        except HostError as e:
            raise HostError(e.code, e.message.replace(str(copy), str(image)), e.hint, details=e.details) from None
        await asyncio.to_thread(_sync, copy)
        before_swap()
        os.replace(copy, image)
        await asyncio.to_thread(sync_directory, image.parent)
    except OSError as e:
        raise HostError("edit_failed", f"{image} could not be changed: {e.strerror}", "the image is as it was") from e
    finally:
        copy.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
