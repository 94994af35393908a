"""Which blocks of a file are its own and which it shares with others (FIEMAP)."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import struct

__all__ = ["own_and_shared"]

FS_IOC_FIEMAP = 0xC020660B
SYNC, LAST, SHARED = 1, 1, 0x2000
_HEAD = struct.Struct("=QQIIII")
_EXTENT = struct.Struct("=QQQ16xI12x")
AT_ONCE = 512


def own_and_shared(fd: int) -> tuple[int, int]:
    """Bytes of blocks that only this file has, and that others have too. Where the file system cannot tell, all are its own."""
    total = os.fstat(fd).st_blocks * 512
    buffer = array.array("B", bytes(_HEAD.size + AT_ONCE * _EXTENT.size))
    shared, start = 0, 0
    while True:
        _HEAD.pack_into(buffer, 0, start, (1 << 64) - 1 - start, SYNC, 0, AT_ONCE, 0)
        try:
            fcntl.ioctl(fd, FS_IOC_FIEMAP, buffer)
        except OSError as e:
            if e.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADR):
                return total, 0
            raise
        mapped = _HEAD.unpack_from(buffer, 0)[3]
        flags = LAST
        for index in range(mapped):
            logical, _, length, flags = _EXTENT.unpack_from(buffer, _HEAD.size + index * _EXTENT.size)
            shared += length if flags & SHARED else 0
            start = logical + length
        if not mapped or flags & LAST:
            # Blocks that were not allocated before the walk began may have been by its end.
            return max(0, max(total, os.fstat(fd).st_blocks * 512) - shared), shared
