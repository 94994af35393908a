"""A running machine put away in files: what a paused machine is, and what a snapshot has of memory and devices.

A directory, written as ``.NAME``, synced and renamed, so that it is whole or not there::

    manifest.json   what made it, what may take it up, sizes and digests
    memory          the base (sparse), which other directories may have as well: a hard link, so the file system counts its users
    delta           what the machine differs from the base in (:mod:`stoker.vmm.memory_file`); none where the base is new
    state           the devices

A machine that changed little keeps its base and a delta, one that changed much makes a new base: putting pages into a machine one
by one costs ten times what mapping them does. All functions block.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stoker.errors import HostError
from stoker.host.durable import whole_directory, write_synced
from stoker.host.process import boot_id
from stoker.vmm.driver import Captured
from stoker.vmm.memory import Delta, new_memory, sealed
from stoker.vmm.memory_base import digest_of_memory, write_base
from stoker.vmm.memory_file import copy_memory, read_delta, write_delta

__all__ = ["Base", "Kept", "again", "describe", "differs", "keep", "load", "missing", "opened", "sealed_copy", "staging"]

FORMAT: Final = 2
MOST_DELTA: Final = 16 << 20
"""Bytes of a delta from which on a new base is written."""
_MOST_STATE: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Base:
    """What a machine's memory is a view of: a descriptor, and the file that has the same content, with its digest; ``None``:
    there is none that may be linked to."""

    fd: int
    file: Path | None = None
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Kept:
    """One that was checked. ``memory`` is the base's file; nobody else has it when it is ``alone``."""

    memory: Path
    digest: str
    size: int
    delta: Delta | None
    state: bytes
    manifest: dict[str, Any]
    alone: bool


def staging(directory: Path) -> Path:
    """Where it is while it is being written: always the same name, so that what a crash left is found."""
    return directory.with_name(f".{directory.name}")


def keep(directory: Path, base: Base, taken: Captured, made_by: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a stopped machine away and returns the manifest. ``directory`` must not exist; a failure leaves nothing.

    ``made_by`` has to be the same for whoever takes it up, ``about`` is told to whoever looks.
    """
    with whole_directory(directory, staging(directory)) as place:
        linked = taken.delta.bytes <= MOST_DELTA and base.file is not None and _linked(base.file, place / "memory")
        parts: dict[str, Any] = {"state": _write(place / "state", taken.state)}
        if linked:
            parts["memory"] = {"size": taken.delta.size, "sha256": base.digest}
            with open(place / "delta", "w+b") as file:
                write_delta(taken.delta, file.fileno())
                parts["delta"] = {"size": file.seek(0, os.SEEK_END), "sha256": _digest(file.fileno())}
                os.fsync(file.fileno())
        else:
            parts["memory"] = _new_base(place / "memory", base.fd, taken.delta)
        manifest = {"format": FORMAT, "made_by": dict(made_by), **about, "files": parts, "memory_as": _as(place / "memory")}
        write_synced(place / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def again(source: Path, directory: Path, about: Mapping[str, Any], *, flat: bool = False) -> dict[str, Any]:
    """The same once more, under another name: the base is linked to, the rest copied. ``flat``: where it has a delta, both become a
    new base."""
    with whole_directory(directory, staging(directory)) as place:
        manifest = {**read_manifest(source), **about}
        if flat and "delta" in manifest["files"]:
            with open(source / "delta", "rb") as delta, open(source / "memory", "rb") as base:
                if _digest(delta.fileno()) != manifest["files"]["delta"]["sha256"]:
                    raise _damaged(source, "what the machine had changed of its memory")
                memory = _new_base(place / "memory", base.fileno(), read_delta(delta.fileno()))
            manifest["files"] = {"state": manifest["files"]["state"], "memory": memory}
            manifest["memory_as"] = _as(place / "memory")
        elif not _linked(source / "memory", place / "memory"):
            raise HostError("host_failed", f"{source}/memory cannot be linked to", "see the daemon's log")
        for name in manifest["files"]:
            if name != "memory":
                write_synced(place / name, (source / name).read_bytes())
        write_synced(place / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def _linked(file: Path, target: Path) -> bool:
    try:
        os.link(file, target)
    except OSError:
        return False  # on another file system, gone, or it has too many names: it is written anew
    return True


def _new_base(path: Path, base: int, delta: Delta) -> dict[str, Any]:
    with open(path, "w+b") as file:
        fd = file.fileno()
        # The VMM, which has a user of its own, opens it anew for writing, though it maps it privately. The directory is ours alone.
        os.fchmod(fd, 0o666)
        digest = write_base(base, delta, fd)
        os.fsync(fd)
        return {"size": delta.size, "sha256": digest}


def _write(path: Path, data: bytes) -> dict[str, Any]:
    write_synced(path, data)
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _digest(fd: int) -> str:
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as(path: Path) -> list[Any]:
    """A file as it was written in this boot: unless any of it differs, its content needs no reading to be trusted."""
    status = os.stat(path)
    return [boot_id(), status.st_ino, status.st_size, status.st_mtime_ns]


def differs(manifest: Mapping[str, Any], made_by: Mapping[str, Any]) -> str:
    """What of ``made_by`` is not as it was, in words; empty: it can be taken up."""
    before = manifest["made_by"]
    words = []
    for key, now in json.loads(json.dumps(made_by)).items():
        if before.get(key) != now:
            short = isinstance(now, str | int) and isinstance(before.get(key), str | int)
            words.append(f"{key} ({before.get(key)} then, {now} now)" if short else key)
    return " and ".join(words)


def read_manifest(directory: Path) -> dict[str, Any]:
    """What is written about it; checked as far as its shape goes."""
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            raise HostError("saved_unusable", f"{directory} is of format {manifest['format']}, this Stoker reads {FORMAT}")
        files = manifest["files"]
        if not isinstance(manifest["made_by"], dict) or not isinstance(manifest["memory_as"], list):
            raise TypeError
        for name in ("memory", "state", *(["delta"] if "delta" in files else [])):
            if not isinstance(files[name]["size"], int) or not isinstance(files[name]["sha256"], str):
                raise TypeError
    except FileNotFoundError:
        raise HostError("saved_missing", f"there is nothing in {directory}") from None
    except (ValueError, TypeError, KeyError):
        raise _damaged(directory, "its manifest") from None
    return dict(manifest)


@contextmanager
def opened(directory: Path) -> Iterator[tuple[dict[str, Any], dict[str, int]]]:
    """The manifest and its files, open and found to be what was written: for whoever takes them elsewhere."""
    manifest = read_manifest(directory)
    with ExitStack() as stack:
        files = {}
        for name, part in manifest["files"].items():
            fd = files[name] = os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            stack.callback(os.close, fd)
            if os.fstat(fd).st_size != part["size"] or (digest_of_memory if name == "memory" else _digest)(fd) != part["sha256"]:
                raise _damaged(directory, name)
        yield manifest, files


def describe(place: Path, made_by: Mapping[str, Any], about: Mapping[str, Any], size: int) -> None:
    """Writes the manifest of files that came from elsewhere: a machine's of ``size`` bytes of memory. What cannot be such files is
    ``saved_damaged``."""
    parts: dict[str, Any] = {}
    for name in ("memory", "state", "delta"):
        try:
            fd = os.open(place / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            if name != "delta":
                raise _damaged(place, "what should have its memory") from None
            continue
        with open(fd, "rb"):
            length = os.fstat(fd).st_size
            wrong = length > _MOST_STATE if name == "state" else name == "memory" and length != size
            if wrong or (name == "delta" and read_delta(fd).size != size):
                raise _damaged(place, name)
            parts[name] = {"size": length, "sha256": (digest_of_memory if name == "memory" else _digest)(fd)}
            if name == "memory":
                os.fchmod(fd, 0o666)  # see _new_base
            os.fsync(fd)
    manifest = {"format": FORMAT, "made_by": dict(made_by), **about, "files": parts, "memory_as": _as(place / "memory")}
    write_synced(place / "manifest.json", json.dumps(manifest, indent=1).encode())


def missing(directory: Path) -> str:
    """What is known to be lost of what was kept, without reading it; empty: nothing is."""
    try:
        files = read_manifest(directory)["files"]
    except HostError as error:
        return error.message
    for name, part in files.items():
        try:
            size = os.stat(directory / name).st_size
        except FileNotFoundError:
            return f"no file {name}"
        if size != part["size"]:
            return f"{size} bytes of {name}, {part['size']} were written"
    return ""


def load(directory: Path, made_by: Mapping[str, Any]) -> Kept:
    """Checks what was kept and opens it. Errors (:class:`HostError`): ``saved_missing``, ``saved_unusable`` (made by something
    else, and by what), ``saved_damaged``."""
    manifest = read_manifest(directory)
    if different := differs(manifest, made_by):
        raise HostError("saved_unusable", f"the memory in {directory} is of a machine with another {different}")
    if lost := missing(directory):
        raise HostError("saved_damaged", f"what was kept in {directory} is not whole: {lost}")
    files = manifest["files"]
    state = (directory / "state").read_bytes()
    if len(state) > _MOST_STATE or hashlib.sha256(state).hexdigest() != files["state"]["sha256"]:
        raise _damaged(directory, "the device state")
    delta = None
    if "delta" in files:
        with open(directory / "delta", "rb") as file:
            if _digest(file.fileno()) != files["delta"]["sha256"]:
                raise _damaged(directory, "what the machine had changed of its memory")
            delta = read_delta(file.fileno())
    memory = directory / "memory"
    status = os.stat(memory)
    size = files["memory"]["size"]
    if status.st_size != size or (delta is not None and delta.size != size):
        raise _damaged(directory, "the memory's size")
    alone = status.st_nlink == 1
    if alone and _as(memory) != manifest["memory_as"]:
        with open(memory, "rb") as file:
            if digest_of_memory(file.fileno()) != files["memory"]["sha256"]:
                raise _damaged(directory, "the memory")
    return Kept(memory, files["memory"]["sha256"], size, delta, state, manifest, alone)


def sealed_copy(kept: Kept) -> int:
    """The base in memory, where nobody who maps it can change it: a descriptor, the caller's to close."""
    memory = new_memory("base", kept.size)
    try:
        with open(kept.memory, "rb") as file:
            copy_memory(file.fileno(), memory)
        if digest_of_memory(memory) != kept.digest:
            raise _damaged(kept.memory.parent, "the memory")
        return sealed(memory)
    except BaseException:
        os.close(memory)
        raise


def _damaged(directory: Path, what: str) -> HostError:
    return HostError("saved_damaged", f"{what} in {directory} is damaged")
