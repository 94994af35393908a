"""Network namespaces that are held by a descriptor, and threads that are inside one.

A namespace made here has no name and no process: it lives as long as its descriptor (or a descriptor of a TAP in it) is open, and
goes with everything that is in it. So a crash leaves nothing, and letting go is closing a file, which does not wait: the kernel
dismantles the rest behind us.

Only a thread that was made for the purpose ever leaves the namespace it was born in, and it ends when its work is done: no
thread of a pool can be left in the wrong one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from stoker.errors import HostError

__all__ = ["Namespace", "own_namespace"]

CLONE_NEWNET: Final = 0x40000000
TUNGETDEVNETNS: Final = 0x54E3
T = TypeVar("T")


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def own_namespace() -> int:
    """A descriptor of the calling thread's network namespace."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _in_a_thread(enter: Callable[[], None], work: Callable[[], T]) -> T:
    """Runs ``work`` in a thread that first does ``enter``, and hands over what came of it."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            enter()
            result.append(work())
        except BaseException as e:  # raised again in the thread that waits
            failure.append(e)

    thread = threading.Thread(target=body, name="namespace", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


class Namespace:
    """One network namespace, held open by ``fd``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls, work: Callable[[Namespace], T]) -> tuple[Namespace, T]:
        """Makes one and does ``work`` inside; when that fails, the namespace is gone with what was made in it."""
        made: list[Namespace] = []

        def inside() -> T:
            made.append(cls(own_namespace()))
            return work(made[0])

        try:
            result = _in_a_thread(lambda: _call("unshare", CLONE_NEWNET), inside)
        except BaseException as e:
            for namespace in made:
                namespace.close()
            if isinstance(e, OSError) and not made:
                raise _refused(e) from None
            raise
        return made[0], result

    @classmethod
    def of_tap(cls, tap: int) -> Namespace:
        """That of an open TAP: how a machine that outlived its daemon leads back to its namespace."""
        try:
            return cls(fcntl.ioctl(tap, TUNGETDEVNETNS))
        except OSError as e:
            raise HostError("namespace_unknown", f"the namespace of a TAP cannot be told: {e.strerror}") from None

    def run(self, work: Callable[[], T]) -> T:
        """Does ``work`` inside: in this thread when it is there already, in one made for it otherwise."""
        here = os.stat("/proc/thread-self/ns/net")
        if (here.st_dev, here.st_ino) == self.identity:
            return work()
        return _in_a_thread(lambda: _call("setns", self.fd, CLONE_NEWNET), work)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: the same for every descriptor of the same namespace."""
        found = os.fstat(self.fd)
        return found.st_dev, found.st_ino

    def close(self) -> None:
        """Lets go. Twice is fine."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            with contextlib.suppress(OSError):
                os.close(fd)

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refused(error: OSError) -> HostError:
    hint = "network namespaces need root" if error.errno in (errno.EPERM, errno.EACCES) else ""
    if error.errno == errno.ENOSPC:
        hint = "sysctl user.max_net_namespaces"
    return HostError("namespace_refused", f"no network namespace can be made: {error.strerror}", hint)
