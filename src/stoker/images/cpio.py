"""The ``newc`` cpio format, as far as an initramfs needs it (Documentation/driver-api/early-userspace/buffer-format.rst).

Deterministic: owner 0:0, time 0, inode numbers counted up, entries in the order they are added.
"""

from __future__ import annotations

import stat

__all__ = ["Archive", "pad"]


def pad(data: bytes | bytearray, multiple: int) -> bytes:
    """The zeros that bring ``data`` to a multiple."""
    return b"\0" * (-len(data) % multiple)


class Archive:
    """Collects entries; :meth:`finish` gives the file."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def directory(self, name: str, mode: int = 0o755) -> None:
        self._add(name, stat.S_IFDIR | mode)

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, content)

    def character_device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._add(name, stat.S_IFCHR | mode, device=(major, minor))

    def _add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0), inode: int | None = None) -> None:
        if inode is None:
            self._inode += 1
            inode = self._inode
        path = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + path
        self._data += header + pad(header, 4) + content + pad(content, 4)

    def finish(self) -> bytes:
        """The archive, padded to 512 bytes so that another may follow it."""
        self._add("TRAILER!!!", 0, inode=0)
        self._data += pad(self._data, 512)
        return bytes(self._data)
