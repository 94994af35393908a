"""Files that are whole or not there, and sizes of disks: what the strategies share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stoker.errors import Conflict, InvalidRequest
from stoker.storage.layout import no_space

__all__ = ["new_file", "raised_to"]


def raised_to(size: int, least: int) -> int:
    """The size of a disk that must not be smaller than ``least``; 0 means just that."""
    if size % 512:
        raise InvalidRequest("bad_disk_size", f"a disk of {size} bytes cannot be made", "give a multiple of 512 bytes")
    if size and size < least:
        raise InvalidRequest("disk_too_small", f"the disk has {least} bytes and cannot be made smaller", f"{least} or more")
    return size or least


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """An open, empty file that appears under its name when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    with no_space():
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                yield fd
            finally:
                os.close(fd)
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise Conflict("file_exists", f"there is a file {path} already", "another name") from None
        finally:
            os.unlink(temporary)
