"""Files on the wire. Contents travel as plain HTTP bodies; these are everything around them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from msgspec import Meta

from stoker.api.processes import MAX_INLINE
from stoker.api.types import FileMode, FilePath, GuestUser, Model, UnixTime

__all__ = [
    "ChangeMode",
    "ChangeOwner",
    "FileContent",
    "FileExists",
    "FileInfo",
    "FileList",
    "FileType",
    "MakeDirectory",
    "MakeSymlink",
    "MoveFile",
    "SignUrl",
    "SignedOperation",
    "SignedUrl",
    "WatchEvent",
    "WatchKind",
    "WriteFiles",
]


class FileType(StrEnum):
    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    FIFO = "fifo"
    SOCKET = "socket"
    CHARACTER = "character"
    BLOCK = "block"
    UNKNOWN = "unknown"


class FileInfo(Model, frozen=True):
    """One entry. ``path`` is absolute; ``etag`` changes with the content; a path that is not UTF-8 has U+FFFD in it."""

    path: str
    name: str
    type: FileType
    size: int
    mode: FileMode
    uid: int
    gid: int
    modified_at: UnixTime
    etag: str = ""
    user: str = ""
    group: str = ""
    target: str | None = None
    """Where a symbolic link points."""


class FileList(Model, frozen=True):
    """``truncated``: there was more than the listing's limit."""

    items: list[FileInfo]
    truncated: bool = False


class FileExists(Model, frozen=True):
    """Whether something of that name is there, and what."""

    exists: bool
    type: FileType | None = None


class FileContent(Model, frozen=True):
    """One file of a small batch."""

    path: FilePath
    data: Annotated[str, Meta(max_length=MAX_INLINE * 4 // 3 + 4)] = ""
    base64: bool = False
    mode: FileMode | None = None
    append: bool = False


class WriteFiles(Model, frozen=True):
    """Several files at once; missing directories are made. They belong to ``user``, else to the sandbox's user."""

    files: Annotated[list[FileContent], Meta(min_length=1, max_length=1024)]
    user: GuestUser | None = None


class MakeDirectory(Model, frozen=True):
    """A directory to be."""

    path: FilePath
    parents: bool = True
    """Missing parents are made, and a directory that is there already is no error."""
    mode: FileMode | None = None
    user: GuestUser | None = None


class MoveFile(Model, frozen=True):
    """From here to there; without ``overwrite`` what is there stays and it is an error."""

    source: FilePath
    destination: FilePath
    overwrite: bool = True
    user: GuestUser | None = None


class MakeSymlink(Model, frozen=True):
    """``path`` becomes a link to ``target``, whatever that is."""

    path: FilePath
    target: FilePath
    user: GuestUser | None = None


class ChangeMode(Model, frozen=True):
    """New permission bits."""

    path: FilePath
    mode: FileMode
    recursive: bool = False
    user: GuestUser | None = None


class ChangeOwner(Model, frozen=True):
    """``owner`` is ``user``, ``user:group`` or numbers. Links are changed themselves, not what they point to."""

    path: FilePath
    owner: GuestUser
    recursive: bool = False


class SignedOperation(StrEnum):
    READ = "read"
    WRITE = "write"


class SignUrl(Model, frozen=True):
    """Asks for a URL that reads or writes one file without a key, until it expires."""

    path: FilePath
    operation: SignedOperation = SignedOperation.READ
    expires_in: Annotated[int, Meta(ge=1, le=7 * 86400)] = 3600
    user: GuestUser | None = None


class SignedUrl(Model, frozen=True):
    """``url`` is relative to the daemon's address."""

    url: str
    method: str
    expires_at: UnixTime


class WatchKind(StrEnum):
    """``overflow``: events were lost, look again; ``ended``: the watched path itself is gone."""

    CREATED = "created"
    MODIFIED = "modified"
    REMOVED = "removed"
    MOVED = "moved"
    ATTRIBUTES = "attributes"
    OVERFLOW = "overflow"
    ENDED = "ended"


class WatchEvent(Model, frozen=True):
    """A change below a watched directory. ``moved`` has both names where both are known."""

    kind: WatchKind
    path: str = ""
    directory: bool = False
    old_path: str | None = None
