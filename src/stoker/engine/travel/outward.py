"""A snapshot as one file: read twice, first for the digests that its manifest begins with, then as it goes out. Memory is constant.

The disk leaves as what it has besides its image, all layers in one; the image too, unless its reader has it. Everything is open
before the first byte goes, so a snapshot that is removed meanwhile leaves whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from stoker.engine.pause import saved_place
from stoker.engine.travel.format import (
    DATA,
    END,
    LONGEST,
    MOST_IMAGE,
    MOST_ZEROS,
    ZEROS,
    Image,
    Machine,
    Manifest,
    Part,
    Program,
    encode,
    record,
)
from stoker.errors import Conflict, HostError
from stoker.host.reflink import data_ranges
from stoker.host.zstd import CompressionParameter, ZstdCompressor
from stoker.images.store import MAIN, Store, described
from stoker.vmm.kept import opened
from stoker.vmm.qemu.facts import QemuFacts, qemu_facts
from stoker.vmm.saved import program

if TYPE_CHECKING:
    from stoker.api.models import CreateSandbox
    from stoker.engine.core import Core
    from stoker.engine.state import Record, SnapshotRecord

__all__ = ["FACTS", "exported", "portable_request"]

LEVEL: Final = 3
PIECE: Final = 1 << 20
"""Bytes that are gathered before they go."""
FACTS: Final = frozenset({"size", "suite", "fstype"})
"""What an image's entry in the store may say of it."""
IMPORTED: Final = "imported"
"""What the store's entry is called of an image that was a file of its user's."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A part: where its content is. Pieces are offset, length and the open file with its place there; None: zeros."""

    name: Any
    size: int
    pieces: list[tuple[int, int, tuple[int, int] | None]]

    def records(self) -> Iterator[bytes]:
        for start, length, place in self.pieces:
            if place is None:
                for offset in range(0, length, MOST_ZEROS):
                    yield record(start + offset, min(MOST_ZEROS, length - offset), ZEROS)
                continue
            fd, at = place
            for offset in range(0, length, LONGEST):
                size = min(LONGEST, length - offset)
                data = os.pread(fd, size, at + offset)
                if len(data) != size:
                    raise HostError("snapshot_changed", f"the snapshot's {self.name} was cut off while it was read", "try again")
                yield record(start + offset, size, DATA)
                yield data
        yield record(self.size, 0, END)

    def part(self) -> Part:
        digest = hashlib.sha256()
        for piece in self.records():
            digest.update(piece)
        data = sum(length for _, length, place in self.pieces if place is not None)
        return Part(self.name, self.size, data, digest.hexdigest())


@dataclass(slots=True)
class _Departure:
    head: bytes = b""
    sources: list[_Source] = field(default_factory=list)

    def packed(self) -> Iterator[bytes]:
        """The file, piece by piece."""
        pack = ZstdCompressor(options={CompressionParameter.compression_level: LEVEL, CompressionParameter.checksum_flag: 1})
        ready = bytearray(pack.compress(self.head))
        for source in self.sources:
            for piece in source.records():
                ready += pack.compress(piece)
                if len(ready) >= PIECE:
                    yield bytes(ready)
                    ready.clear()
        yield bytes(ready) + pack.flush()


def portable_request(request: CreateSandbox) -> CreateSandbox:
    """What of a request means the same on every host."""
    image = IMPORTED if request.image.startswith(("ext4:", "/", ".")) else request.image
    return replace(
        request, image=image, name=None, kernel="", initrd="", volumes=[], app=None, timeout=None, lease=False, start=False
    )


def _check(found: SnapshotRecord) -> None:
    request = found.box.request
    what = "volumes" if found.box.volumes else "an initrd of its own" if request.initrd else "an app" if request.app else ""
    if what:
        raise Conflict(
            "snapshot_tied", f"the snapshot {found.label} has {what}, which cannot go with it", "stoker snapshot inspect"
        )


@asynccontextmanager
async def exported(core: Core, found: SnapshotRecord, *, image: bool) -> AsyncIterator[AsyncIterator[bytes]]:
    """The file, packed. ``image``: with the image that its disk lies above."""
    _check(found)
    with ExitStack() as stack:
        facts = await qemu_facts(core.settings)
        departure = await asyncio.to_thread(_depart, core, found, image, facts, stack)
        packed = departure.packed()

        async def pieces() -> AsyncIterator[bytes]:
            while piece := await asyncio.to_thread(next, packed, b""):
                yield piece

        yield pieces()


def _depart(core: Core, found: SnapshotRecord, image: bool, facts: QemuFacts, stack: ExitStack) -> _Departure:
    base, about = _image(core, found.box, image, stack)
    size, written = core.pools.open(found.box.pool).written(found.id, stack)
    disk = [(piece.start, piece.length, None if piece.at is None else (fd, piece.at)) for fd, piece in written]
    sources = [_whole("image", base)] if image else []
    sources.append(_Source("disk", size, disk))
    made_by: dict[str, Any] = {}
    if found.memory:
        manifest, files = stack.enter_context(opened(saved_place(core, found.id)))
        sources += [_whole(name, files[name]) for name in ("memory", "delta", "state") if name in files]
        made_by = manifest["made_by"]
    words = Manifest(
        id=found.id,
        created_at=found.created_at,
        name=found.name,
        tags=found.tags,
        machine=_machine(found.box),
        image=about,
        parts=[source.part() for source in sources],
        made_by=made_by,
        program=_program(made_by, facts),
    )
    return _Departure(encode(words), sources)


def _whole(name: str, fd: int) -> _Source:
    pieces: list[tuple[int, int, tuple[int, int] | None]] = [(start, length, (fd, start)) for start, length in data_ranges(fd)]
    return _Source(name, os.fstat(fd).st_size, pieces)


def _machine(box: Record) -> Machine:
    return Machine(
        id=box.id,
        request=portable_request(box.request),
        cpus=box.resources.cpus,
        memory=box.resources.memory,
        disk=box.resources.disk,
        env=box.env,
        user=box.user,
        workdir=box.workdir,
        command=box.command,
        kernel=box.kernel,
        kernel_digest=box.kernel_path,
        generation=box.generation,
        accelerator=box.versions.accelerator,
        agent=box.versions.agent,
    )


def _image(core: Core, box: Record, included: bool, stack: ExitStack) -> tuple[int, Image]:
    """The image's file, open, and what it is called here and anywhere."""
    path = Path(box.image_path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise HostError("base_missing", f"the image {path} is gone", "stoker fsck") from None
    stack.callback(os.close, fd)
    size = os.fstat(fd).st_size
    if size > MOST_IMAGE:
        raise Conflict(
            "image_too_large", f"the image of {box.label} has {size} bytes, {MOST_IMAGE} at most can go", "a smaller image"
        )
    store = Store(core.settings)
    entry = store.entry("images", path.parent.name)
    label = portable_request(box.request).image
    if path.parent.resolve() == entry.resolve() and (found := store.lookup("images", entry.name)) is not None:
        if found[1].facts.keys() <= FACTS:
            data = (entry / "manifest.json").read_bytes()
            return fd, Image(digest=hashlib.sha256(data).hexdigest(), size=size, entry=data.decode(), label=label)
    if not included:
        raise Conflict(
            "image_unnamed",
            f"the image of {box.label} is a file that no other host has by its digest",
            "export the snapshot with its image",
        )
    with open(fd, "rb", closefd=False) as file:
        sums = [(MAIN["images"], hashlib.file_digest(file, "sha256").hexdigest())]
    _, data, digest = described("images", IMPORTED, {"size": size, "fstype": "ext4"}, sums)
    return fd, Image(digest=digest, size=size, entry=data.decode(), label=label)


def _program(made_by: dict[str, Any], facts: QemuFacts) -> Program | None:
    """The VMM, if it is still the one that made the memory."""
    if made_by.get("program") != program(facts):
        return None
    with open(facts.path, "rb") as file:
        return Program(hashlib.file_digest(file, "sha256").hexdigest(), facts.tsc_khz)
