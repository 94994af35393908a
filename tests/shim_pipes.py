"""What a machine's supervisor needs of a test, and waiting for its end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from stoker.vmm.shim import ShimOptions, Supervised, find

__all__ = ["ENVIRONMENT", "Pipes", "ended", "gone", "pipes"]

ENVIRONMENT = {"PATH": "/usr/bin:/bin"}


@dataclass
class Pipes:
    """A machine's directory and the ends the test holds."""

    directory: Path
    stack: ExitStack
    console: int
    """Write end; ``console_read`` is the shim's."""
    console_read: int

    def options(self, **more: object) -> ShimOptions:
        return replace(ShimOptions(self.directory, self.console_read, 4096, passed=(self.console,)), **more)  # type: ignore[arg-type]

    def owner(self) -> tuple[int, int]:
        """(the shim's end, ours): closing ours is the owner's death."""
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        self.stack.callback(os.close, theirs)
        return theirs, ours


@pytest.fixture
def pipes(short_dir: Path) -> Iterator[Pipes]:
    with ExitStack() as stack:
        read, write = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, read)
        stack.callback(os.close, write)
        directory = short_dir / "m"
        directory.mkdir(mode=0o700)
        yield Pipes(directory, stack, write, read)
        pair = find(directory)
        if pair is not None:
            os.kill(pair.shim.pid, signal.SIGKILL)
            os.waitpid(pair.shim.pid, 0)


async def gone(check: Callable[[], bool], seconds: float = 5.0) -> float:
    """Waits until the check is true and gives how long that took."""
    begin = time.monotonic()
    while not check():
        assert time.monotonic() - begin < seconds, "it did not happen"
        await asyncio.sleep(0.005)
    return time.monotonic() - begin


async def ended(pair: Supervised) -> None:
    await gone(lambda: not pair.vmm.alive() and not pair.shim.alive())
    os.waitpid(pair.shim.pid, os.WNOHANG)  # noqa: ASYNC222
