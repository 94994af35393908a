"""The file that a snapshot travels in. It may come from anybody: everything in it is checked against bounds before it is used.

One zstd frame. In it: ``STKSNAP`` and a byte with the format's version, the manifest's length (u32, little endian as all numbers),
the manifest (JSON, :class:`Manifest`), and then each part that it lists, in its order. A part is a sparse file as records of 16
bytes: offset (u64), length (u32), kind (u32); ``DATA`` has so many bytes behind it, ``ZEROS`` says that they read as zeros,
whatever the part lies above; what no record names is a hole. Records ascend. ``END`` (with the part's size as its offset) closes a
part. Its digest is the SHA-256 of all its records. Behind the last part the frame ends, and so does the file.

Names of files are not in it. What the guest sees of a host (digests of image and kernel, the VMM) is in the manifest.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from stoker.api.models import CreateSandbox
from stoker.errors import HostError, InvalidRequest
from stoker.host.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

__all__ = [
    "DATA",
    "END",
    "LONGEST",
    "MAGIC",
    "MOST_IMAGE",
    "MOST_ZEROS",
    "ZEROS",
    "Image",
    "Machine",
    "Manifest",
    "Part",
    "Program",
    "Reader",
    "damaged",
    "encode",
    "record",
]

MAGIC: Final = b"STKSNAP\x01"
RECORD: Final = struct.Struct("<QII")
DATA, ZEROS, END = 1, 2, 3
LONGEST: Final = 1 << 20
"""Bytes of data in one record; of zeros it may say more."""
MOST_ZEROS: Final = 1 << 31
MOST_MANIFEST: Final = 1 << 20
WINDOW: Final = 23
"""Most that unpacking may have to remember: 8 MiB."""
MOST_SIZE: Final = 64 << 40
MOST_IMAGE: Final = 256 << 30
"""All of an image is read, its holes included, to know it by its digest."""

Size = Annotated[int, Meta(ge=0, le=MOST_SIZE)]
Hex = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Word = Annotated[str, Meta(max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*\Z")]
Name = Literal["image", "disk", "memory", "delta", "state"]


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    """``size``: how long the file is; ``bytes``: of all its data records; ``sha256``: of all its records."""

    name: Name
    size: Size
    bytes: Size
    sha256: Hex


class Image(Struct, frozen=True, forbid_unknown_fields=True):
    """What the disk lies above. ``entry``: the manifest of the store's entry that has it, or would; ``digest``: of that; ``label``:
    what it was asked for by."""

    digest: Hex
    size: Annotated[int, Meta(ge=512, le=MOST_SIZE)]
    entry: Annotated[str, Meta(max_length=65536)]
    label: Word = ""


class Program(Struct, frozen=True, forbid_unknown_fields=True):
    """The VMM that made the devices' state, by its content, and the clock that the guest was told of (kHz; 0: not known)."""

    sha256: Hex
    tsc_khz: Annotated[int, Meta(ge=0, le=1 << 32)] = 0


class Machine(Struct, frozen=True, forbid_unknown_fields=True):
    """What the sandbox was."""

    id: Annotated[str, Meta(pattern=r"^sb-[a-z2-7]{20}\Z")]
    request: CreateSandbox
    cpus: Annotated[int, Meta(ge=1, le=256)]
    memory: Annotated[int, Meta(ge=16 << 20, le=MOST_SIZE)]
    disk: Size
    env: Annotated[dict[str, str], Meta(max_length=4096)] = {}
    user: Word = ""
    workdir: Word = ""
    command: Annotated[list[str], Meta(max_length=4096)] = []
    kernel: Word = ""
    kernel_digest: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    generation: Annotated[int, Meta(ge=0, le=1 << 60)] = 0
    accelerator: Word = ""
    agent: Word = ""


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """``made_by``: see :func:`stoker.vmm.saved.portable`; there with the memory."""

    id: Annotated[str, Meta(pattern=r"^sn-[a-z2-7]{20}\Z")]
    created_at: float
    machine: Machine
    image: Image
    parts: Annotated[list[Part], Meta(min_length=1, max_length=5)]
    name: Word | None = None
    tags: Annotated[list[Word], Meta(max_length=32)] = []
    made_by: dict[str, Any] = {}
    program: Program | None = None

    def part(self, name: str) -> Part | None:
        return next((part for part in self.parts if part.name == name), None)


def encode(manifest: Manifest) -> bytes:
    """What the file begins with."""
    data = msgspec.json.encode(manifest)
    if len(data) > MOST_MANIFEST:
        raise HostError("snapshot_too_large", f"what is to be told of the snapshot has {len(data)} bytes", "a smaller environment")
    return MAGIC + len(data).to_bytes(4, "little") + data


def record(offset: int, length: int, kind: int) -> bytes:
    return RECORD.pack(offset, length, kind)


def damaged(why: str) -> InvalidRequest:
    return InvalidRequest("bad_snapshot_file", f"this is not a whole snapshot file: {why}", "export it again")


class Reader:
    """Takes such a file apart. ``more`` gives its next bytes, nothing at its end; it may block, and raise what it likes."""

    def __init__(self, more: Callable[[], bytes]) -> None:
        self._more = more
        self._unpack = ZstdDecompressor(options={DecompressionParameter.window_log_max: WINDOW})
        self._rest = bytearray()

    def _fill(self) -> bool:
        """Unpacks a little more; False at the end of the frame."""
        if self._unpack.eof:
            return False
        packed = self._more() if self._unpack.needs_input else b""
        if not packed and self._unpack.needs_input:
            raise damaged("it is cut off")
        try:
            self._rest += self._unpack.decompress(packed, LONGEST)
        except ZstdError as error:
            raise damaged(str(error)) from None
        return True

    def take(self, size: int) -> bytes:
        while len(self._rest) < size:
            if not self._fill():
                raise damaged("it is cut off")
        data = bytes(self._rest[:size])
        del self._rest[:size]
        return data

    def manifest(self) -> Manifest:
        head = self.take(len(MAGIC))
        if head[:7] != MAGIC[:7]:
            raise damaged("it begins with something else")
        if head != MAGIC:
            why = f"this file is of format {head[7]}, this Stoker reads {MAGIC[7]}"
            raise InvalidRequest("snapshot_format", why, "import it with a newer Stoker")
        size = int.from_bytes(self.take(4), "little")
        if size > MOST_MANIFEST:
            raise damaged(f"its manifest has {size} bytes")
        try:
            return msgspec.json.decode(self.take(size), type=Manifest)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise damaged(f"its manifest: {error}") from None

    def part(self, part: Part, grain: int) -> Iterator[tuple[int, int, bytes | None]]:
        """The records of the next part: offset, length, and data or None for zeros. It is what its manifest says when this ends.

        Each record begins at a multiple of ``grain``, and ends at one or with the part.
        """
        digest, at, size = hashlib.sha256(), 0, 0
        while True:
            head = self.take(RECORD.size)
            digest.update(head)
            offset, length, kind = RECORD.unpack(head)
            if kind == END:
                break
            if kind not in (DATA, ZEROS) or offset % grain or (length % grain and offset + length != part.size):
                raise damaged(f"a record of its {part.name}")
            if offset < at or not 0 < length <= (LONGEST if kind == DATA else MOST_ZEROS) or offset + length > part.size:
                raise damaged(f"the records of its {part.name} are not in order")
            at, data = offset + length, None
            if kind == DATA:
                size += length
                if size > part.bytes:
                    raise damaged(f"its {part.name} has more than the {part.bytes} bytes it should have")
                data = self.take(length)
                digest.update(data)
            yield offset, length, data
        if (offset, length) != (part.size, 0) or size != part.bytes or digest.hexdigest() != part.sha256:
            raise damaged(f"its {part.name} is not what it was")

    def end(self) -> None:
        """Nothing comes any more."""
        while not self._rest and self._fill():
            pass
        if self._rest or self._unpack.unused_data or self._more():
            raise damaged("something follows behind its end")
