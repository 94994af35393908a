"""Files that are whole or not there, and sizes of disks: what the strategies share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stoker.errors import Conflict, InvalidRequest
from stoker.host.trace import declare, trace
from stoker.storage.layout import no_space

__all__ = ["FLATTEN", "new_file", "raised_to"]

FLATTEN = declare("file.after_content", "file.after_link")


def raised_to(size: int, least: int) -> int:
    """The size of a disk that must not be smaller than ``least``; 0 means just that."""
    if size % 512:
        raise InvalidRequest("bad_disk_size", f"a disk of {size} bytes cannot be made", "give a multiple of 512 bytes")
    if size and size < least:
        raise InvalidRequest("disk_too_small", f"the disk has {least} bytes and cannot be made smaller", f"{least} or more")
    return size or least


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """An open, empty file without a name, which gets one when the block ends well. A failure or a crash leaves nothing."""
    with no_space():
        fd = os.open(path.parent, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        try:
            yield fd
            trace("file.after_content")
            try:
                # With a directory's descriptor, which an absolute name does not use, links are followed.
                os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
            except FileExistsError:
                raise Conflict("file_exists", f"there is a file {path} already", "another name") from None
            trace("file.after_link")
        finally:
            os.close(fd)
