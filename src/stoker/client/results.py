"""What a command in a sandbox gave, and the errors that carry it."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, TypeAlias

from stoker.errors import DeadlineExceeded, StokerError

__all__ = ["CommandFailed", "CommandResult", "CommandTimeout", "Data", "OnOutput", "Output"]

OnOutput: TypeAlias = Callable[[str], object]
"""Called with each piece of output as it comes; what it returns is awaited where it can be. Output waits while it runs."""

Data: TypeAlias = str | bytes | bytearray | memoryview | IO[bytes] | Iterable[bytes] | AsyncIterable[bytes]
"""What can be sent into a sandbox. Text is UTF-8; files are open for reading bytes."""


@dataclass(frozen=True, slots=True)
class Output:
    """A piece of a process's output. ``lost``: so many bytes before it were overwritten before anybody read them."""

    stream: str
    """``stdout`` or ``stderr``."""
    data: bytes
    offset: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended. ``exit_code`` is the command's own, or 128 + n after signal n, as in a shell."""

    exit_code: int
    stdout_bytes: bytes = field(default=b"", repr=False)
    stderr_bytes: bytes = field(default=b"", repr=False)
    duration: float = 0.0
    """Seconds, measured in the guest."""
    signal: int | None = None
    timed_out: bool = False
    truncated: bool = False
    """There was more output than is held here."""
    command: str = ""

    @property
    def stdout(self) -> str:
        """As text; bytes that are not UTF-8 become U+FFFD (``stdout_bytes`` has them)."""
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        return self.stderr_bytes.decode("utf-8", "replace")

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    def check(self) -> CommandResult:
        """Itself, or :class:`CommandFailed` when the exit code is not 0."""
        if self.exit_code:
            raise CommandFailed(self)
        return self


class CommandFailed(StokerError):
    """A command ended with another exit code than 0. ``result`` has all of it."""

    def __init__(self, result: CommandResult) -> None:
        how = f"was killed by signal {result.signal}" if result.signal else f"exited with {result.exit_code}"
        last = result.stderr.strip().rpartition("\n")[2][:200]
        super().__init__("command_failed", f"{result.command or 'the command'} {how}" + (f": {last}" if last else ""))
        self.result = result


class CommandTimeout(DeadlineExceeded):
    """A command was killed because its time was over. ``result`` has what it wrote until then."""

    def __init__(self, result: CommandResult, timeout: float) -> None:
        super().__init__("command_timeout", f"{result.command or 'the command'} was killed after {timeout:g} s")
        self.result = result
