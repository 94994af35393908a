"""The files of a pool, and the rules by which a crash at any point leaves what the next start understands.

::

    POOL/lock                       held by the one process that works here; says which it is
    POOL/id -> HEX                  eight digits that tell this pool's kernel objects from another's
    POOL/strategy -> STRATEGY       how new disks are made
    POOL/clones/NAME/               one clone
        record -> STRATEGY:SIZE:KEY:PARENT:DISK
        DISK                        overlay, copy or copy-on-write store
    POOL/bases/KEY/                 one base that clones stand on
        path -> /where/the/base/is
        image                       its copy in this pool (reflink across file systems)
        refs/NAME                   one empty file for each clone that stands on it
    POOL/layers/ID/                 one frozen disk that clones share (qcow2)
        record, disk                as in a clone
        refs/NAME, refs/layer.ID    what stands on it

What must be whole is a symbolic link: made or replaced in one journaled step, in the order of the steps, so that no fsync is on the
way of a clone and a guest's own flush makes everything before it durable. A clone *is* when it has a record and the disk that the
record names. References are written before what refers and removed after it: a crash leaves one too many, never one too few, and
:meth:`Layout.sweep` removes what nothing stands on. No directory but POOL's own parts is ever made below a pool's path, so what an
unmounted pool was mounted on stays as it was.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stoker.errors import CapacityExhausted, Conflict, HostError, InvalidRequest, NotFound
from stoker.host.trace import declare, trace
from stoker.storage.strategy import Base, Strategy

__all__ = ["DROP", "FREEZE", "LAYER", "MAKE", "REMOVE", "Layout", "Record", "no_space", "write"]

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEY: Final = re.compile(r"[0-9a-f]{16}")
LAYER_ID: Final = re.compile(r"[0-9a-f]{12}")
PARTS: Final = frozenset({"lock", "id", "strategy", ".strategy", ".probe", "clones", "bases", "layers", "lost+found"})
"""What may be in a pool's directory."""
MAKE: Final = declare("clone.after_reference", "clone.after_directory", "clone.after_disk", "clone.after_record")
FREEZE: Final = declare("layer.after_directory", "layer.after_link", "layer.after_next", "layer.after_switch", "layer.after_parent")
DROP: Final = declare("layer.after_refs", "layer.after_removal")
REMOVE: Final = declare("remove.after_record", "remove.after_directory", "remove.after_reference")
LAYER: Final = "layer."
NONE: Final = "-"


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a clone (or frozen layer) besides its disk. ``size``: bytes, 0 where the disk itself tells.
    ``key``: its base, "" for none; ``parent``: the layer below it, "" when that is the base."""

    strategy: Strategy
    size: int
    key: str
    parent: str
    disk: str

    def __str__(self) -> str:
        return f"{self.strategy.value}:{self.size}:{self.key or NONE}:{self.parent or NONE}:{self.disk}"


@contextmanager
def no_space() -> Iterator[None]:
    """A full file system in this project's words."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CapacityExhausted(
            "no_space", f"the pool is full: {e.strerror}", "stoker rm what is not needed, stoker gc, or a larger pool"
        ) from None


class Layout:
    """Names, records and references below one pool's directory. ``device`` and ``inode`` say which directory that is."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clones, self.bases, self.layers = (directory / part for part in ("clones", "bases", "layers"))
        found = os.stat(directory)
        self._identity = (found.st_dev, found.st_ino)

    @classmethod
    def make(cls, directory: Path) -> Layout:
        """The parts of a new pool, where they are missing. The directory itself is there."""
        for part in ("clones", "bases", "layers"):
            (directory / part).mkdir(mode=0o711, exist_ok=True)
        if not (directory / "id").is_symlink():
            os.symlink(secrets.token_hex(4), directory / "id")
        return cls(directory)

    @property
    def id(self) -> str:
        return os.readlink(self.directory / "id")

    def chosen(self) -> Strategy | None:
        """How disks have been made here so far."""
        try:
            return Strategy(os.readlink(self.directory / "strategy"))
        except (FileNotFoundError, ValueError):
            return None

    def choose(self, strategy: Strategy) -> None:
        _relink(self.directory / "strategy", strategy.value)

    def check(self) -> None:
        """Raises ``pool_unmounted`` when the path does not lead to this pool any more."""
        try:
            found = os.stat(self.directory)
        except FileNotFoundError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self._identity:
            raise HostError(
                "pool_unmounted",
                f"the pool {self.directory} is not there any more: it was unmounted or replaced",
                "stop its sandboxes and restart the daemon: it mounts its pools",
            )

    # -- clones -------------------------------------------------------------------------------------------------------

    def place(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise InvalidRequest("bad_name", f"{name!r} is not a name for a clone")
        return self.clones / name

    def names(self) -> list[str]:
        return sorted(name for name in _listed(self.clones) if self.find(name) is not None)

    def find(self, name: str) -> Record | None:
        """The record of a clone that is whole."""
        return _read(self.place(name))

    def record(self, name: str) -> Record:
        found = self.find(name)
        if found is None:
            raise NotFound("clone_unknown", f"there is no disk {name} in the pool {self.directory}", "stoker pool inspect")
        return found

    def layer(self, layer: str) -> Record:
        found = _read(self.layers / layer)
        if found is None:
            raise HostError("clone_corrupt", f"the layer {layer} of pool {self.directory} is missing")
        return found

    def disk(self, name: str, record: Record) -> Path:
        return self.clones / name / record.disk

    @contextmanager
    def new(self, name: str, record: Record) -> Iterator[Path]:
        """Makes a clone: the block makes its disk at the given path. Whatever fails, nothing is left."""
        self.check()
        place = self.place(name)
        if self.find(name) is not None:
            raise Conflict("clone_exists", f"there is a disk {name} in the pool already", f"stoker rm {name}, or another name")
        self.discard(name)
        try:
            with no_space():
                self.refer(name, record)
                trace("clone.after_reference")
                place.mkdir(mode=0o700)
                trace("clone.after_directory")
                yield place / record.disk
                trace("clone.after_disk")
                write(place, record)
                trace("clone.after_record")
        except BaseException:
            self.discard(name)
            self.forget(name, record)
            raise

    def discard(self, name: str) -> None:
        """The files of a clone, and nothing else. There may be none. The record goes first."""
        place = self.place(name)
        (place / "record").unlink(missing_ok=True)
        trace("remove.after_record")
        try:
            shutil.rmtree(place)
        except FileNotFoundError:
            pass
        trace("remove.after_directory")

    # -- references ---------------------------------------------------------------------------------------------------

    def refer(self, name: str, record: Record) -> None:
        """Before something stands on its base and layer, this is written."""
        if record.key:
            _touch(self.bases / record.key / "refs" / name)
        if record.parent:
            _touch(self.layers / record.parent / "refs" / name)

    def forget(self, name: str, record: Record) -> None:
        """After it is gone. A layer that nothing stands on any more goes too."""
        if record.parent:
            self.leave(record.parent, name)
        if record.key:
            (self.bases / record.key / "refs" / name).unlink(missing_ok=True)
        trace("remove.after_reference")

    def leave(self, layer: str, name: str) -> None:
        """``name`` (or, "", nothing) stands on this layer no more."""
        refs = self.layers / layer / "refs"
        if name:
            (refs / name).unlink(missing_ok=True)
        try:
            refs.rmdir()
        except FileNotFoundError:
            pass
        except OSError as e:
            if e.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return
            raise
        trace("layer.after_refs")
        place = self.layers / layer
        record = _read(place)
        if place.exists():
            shutil.rmtree(place)
        trace("layer.after_removal")
        if record is not None:
            self.forget(LAYER + layer, record)

    def users(self, key: str) -> list[str]:
        """What stands on a base."""
        try:
            return sorted(os.listdir(self.bases / key / "refs"))
        except FileNotFoundError:
            return []

    # -- bases --------------------------------------------------------------------------------------------------------

    def keys(self) -> list[str]:
        """The bases that are known here, in whatever state."""
        return sorted(key for key in _listed(self.bases) if KEY.fullmatch(key))

    def image_of(self, key: str) -> Path | None:
        """Where a base is (or was); None for one that a crash left half made."""
        try:
            return Path(os.readlink(self.bases / key / "path"))
        except OSError:
            return None

    def base_key(self, base: Base) -> str:
        """Names a base by path, size and time of writing, and remembers where it is."""
        if base.size <= 0 or base.size % 512:
            raise InvalidRequest("bad_disk_size", f"{base.path} has {base.size} bytes: not a multiple of 512")
        try:
            found = os.stat(base.path)
        except FileNotFoundError:
            raise HostError("base_missing", f"the image {base.path} is not there", "stoker fsck") from None
        if -(-found.st_size // 512) * 512 < base.size:
            raise HostError("base_changed", f"the image {base.path} is smaller than the {base.size} bytes it should have")
        key = _key(base.path, found)
        place = self.bases / key
        if not (place / "path").is_symlink():
            self.check()
            with no_space():
                place.mkdir(mode=0o711, exist_ok=True)
                (place / "refs").mkdir(mode=0o700, exist_ok=True)
                try:
                    os.symlink(os.path.abspath(base.path), place / "path")
                except FileExistsError:
                    pass
        return key

    def base_path(self, key: str) -> Path:
        """Where a base is; that it is still the same one is checked."""
        path = self.image_of(key)
        if path is None:
            raise HostError("clone_corrupt", f"the pool {self.directory} does not know the base {key}", "stoker fsck")
        try:
            found = os.stat(path)
        except FileNotFoundError:
            raise HostError(
                "base_missing", f"the image {path} is gone, and disks stand on it", "put it back: see stoker fsck"
            ) from None
        if _key(path, found) != key:
            raise HostError("base_changed", f"the image {path} was changed, and disks stand on what it was", "put it back")
        return path

    def is_current(self, key: str) -> bool:
        """Whether a base's image is still what it was: then new disks may be about to stand on it."""
        path = self.image_of(key)
        try:
            return path is not None and _key(path, os.stat(path)) == key
        except FileNotFoundError:
            return False

    def drop_base(self, key: str) -> int:
        """Forgets a base that nothing stands on, with its copy here: how many bytes that frees. One in use stays: 0."""
        place = self.bases / key
        try:
            (place / "refs").rmdir()
        except FileNotFoundError:
            pass
        except OSError as e:
            if e.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return 0
            raise
        freed = sum(os.lstat(place / name).st_blocks * 512 for name in _listed(place))
        shutil.rmtree(place)
        return freed

    # -- putting right ------------------------------------------------------------------------------------------------

    def foreign(self) -> list[Path]:
        """What is in the pool's own directories under names that nothing here has. Nobody but its owner removes it."""
        found = [self.directory / name for name in _listed(self.directory) if name not in PARTS]
        for place, names in ((self.bases, KEY), (self.layers, LAYER_ID)):
            found += [place / name for name in _listed(place) if not names.fullmatch(name)]
        return sorted(found)

    def half_made(self) -> list[str]:
        """Names that a crash left a part of: files without a record, references without files."""
        left = {name for name in _listed(self.clones) if (self.clones / name).is_dir()}
        for place in (self.bases, self.layers):
            for entry in _listed(place):
                left |= {name for name in _listed(place / entry / "refs") if not name.startswith(LAYER)}
        return sorted(name for name in left if NAME.fullmatch(name) and self.find(name) is None)

    def sweep(self) -> None:
        """Removes references of what is gone, old disks of clones, layers and bases that nothing stands on."""
        for name in self.half_made():
            self.discard(name)
        for place, what in ((self.layers, "parent"), (self.bases, "key")):
            for entry in _listed(place):
                for name in _listed(place / entry / "refs"):
                    if not self._stands(name, entry, what):
                        (place / entry / "refs" / name).unlink(missing_ok=True)
            if place is self.layers:
                # A layer that goes takes its reference on the one below along.
                for entry in filter(LAYER_ID.fullmatch, _listed(place)):
                    if not _listed(place / entry / "refs"):
                        self.leave(entry, "")
        for name in self.names():
            disk = self.record(name).disk
            for entry in _listed(self.clones / name):
                if entry not in ("record", disk):
                    (self.clones / name / entry).unlink(missing_ok=True)

    def _stands(self, name: str, on: str, what: str) -> bool:
        place = self.layers / name.removeprefix(LAYER) if name.startswith(LAYER) else self.clones / name
        record = _read(place)
        return record is not None and getattr(record, what) == on


def write(place: Path, record: Record) -> None:
    """Makes or replaces a record in one step."""
    _relink(place / "record", str(record))


def _relink(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}")
    new.unlink(missing_ok=True)
    os.symlink(text, new)
    os.replace(new, path)


def _read(place: Path) -> Record | None:
    try:
        words = os.readlink(place / "record").split(":")
        strategy, size, key, parent, disk = words
        record = Record(Strategy(strategy), int(size), key.replace(NONE, ""), parent.replace(NONE, ""), disk)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as e:
        raise HostError("clone_corrupt", f"{place}/record is not a record of this program: {e}") from None
    if "/" in record.disk or not os.path.lexists(place / record.disk):
        return None
    return record


def _touch(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _listed(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _key(path: Path, found: os.stat_result) -> str:
    text = f"{os.path.abspath(path)}\0{found.st_size}\0{found.st_mtime_ns}"
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]
