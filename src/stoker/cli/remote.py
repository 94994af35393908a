"""What the words that speak with the daemon share: one client per command line, sandbox names, failures of one of many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stoker.cli.errors import report
from stoker.errors import InvalidRequest, StokerError, exit_code

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from stoker.api.models import Progress
    from stoker.client.client import AsyncClient

__all__ = ["SANDBOX", "SANDBOX_PATH", "Following", "each", "json_option", "labels_of", "with_client"]

T = TypeVar("T")
COMPLETION_TIMEOUT = 1.5

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def with_client(work: Callable[[AsyncClient], Awaitable[T]], *, start: bool = True) -> T:
    """Runs the work of one command line with a client of its own."""

    async def main() -> T:
        from stoker.client.client import AsyncClient

        async with AsyncClient(start=start) as client:
            return await work(client)

    return asyncio.run(main())


async def each(names: Iterable[str], work: Callable[[str], Awaitable[Any]], *, doing: str = "") -> int:
    """Does the same to many, a few at a time; reports what fails and goes on. The exit code is the last failure's.

    ``doing`` is what a person is told after a second.
    """
    limit = asyncio.Semaphore(8)
    wanted = list(dict.fromkeys(names))
    code = done = 0

    async def one(name: str) -> None:
        nonlocal code, done
        async with limit:
            try:
                await work(name)
            except StokerError as e:
                report(e)
                code = exit_code(e)
        done += 1

    async def tell(following: Following) -> None:
        while doing:
            await asyncio.sleep(1.0)
            following.count(doing, done, len(wanted))

    with Following(quiet=False) as following:
        telling = asyncio.create_task(tell(following))
        try:
            await asyncio.gather(*(one(name) for name in wanted))
        finally:
            telling.cancel()
    return code


def labels_of(words: Sequence[str], *, bare: bool = False) -> dict[str, Any]:
    """``KEY=VALUE`` words; with ``bare`` a lone KEY means any value (None)."""
    labels: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not (equals or bare):
            raise InvalidRequest("bad_label", f"--label {word!r} is not KEY=VALUE")
        labels[key] = value if equals else None
    return labels


class _SandboxName(click.ParamType[str]):
    """A sandbox by id or name; the shell completes names."""

    name = "sandbox"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(name, help=text) for name, text in complete_names(incomplete)]


class _SandboxPath(click.ParamType[str]):
    """``SANDBOX:PATH`` or a path of this host; the shell completes the former's names, and files."""

    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        names = [] if "/" in incomplete or ":" in incomplete else complete_names(incomplete)
        return [*(CompletionItem(f"{name}:", help=text) for name, text in names), CompletionItem(incomplete, type="file")]


SANDBOX = _SandboxName()
SANDBOX_PATH = _SandboxPath()


def complete_names(incomplete: str) -> list[tuple[str, str]]:
    """Names (ids where there is none) that begin so, with image and state. No daemon, or a slow one: nothing."""

    async def ask(client: AsyncClient) -> list[tuple[str, str]]:
        async with asyncio.timeout(COMPLETION_TIMEOUT):
            found = await client.sandboxes()
        words = [(info.name or info.id, f"{info.image} {info.state.value}") for info in found]
        if incomplete.startswith("sb-"):
            words += [(info.id, f"{info.image} {info.state.value}") for info in found if info.name]
        return [(word, text) for word, text in words if word.startswith(incomplete)]

    try:
        return with_client(ask, start=False)
    except (StokerError, TimeoutError):
        return []


class Following:
    """Progress of an operation for a person, shown only when it takes longer than a second."""

    def __init__(self, quiet: bool) -> None:
        from stoker.cli.progress import progress_for

        self._progress = progress_for(quiet)
        self._began = time.monotonic()
        self._open: set[str] = set()

    def __enter__(self) -> Following:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()

    def step(self, progress: Progress) -> None:
        """Shows a step; the one before it is done."""
        if time.monotonic() - self._began < 1.0 or not progress.step:
            return
        for name in self._open - {progress.step}:
            self._progress.step(name, 1.0, 1.0)
        self._open = {progress.step}
        self._progress.step(progress.step, progress.done, progress.total, progress.detail)

    def count(self, name: str, done: int, total: int) -> None:
        """Shows so many of so many things; said after a second, and by the caller."""
        if total > 1:
            self._progress.step(name, float(done), float(max(total, done + 1)))
        else:
            self._progress.step(name, None, None)

    def bytes(self, name: str, total: int | None) -> Callable[[int], None]:
        """A callback for bytes that have gone over."""

        def report_bytes(done: int) -> None:
            if time.monotonic() - self._began >= 1.0:
                self._progress.step(name, float(done), None if total is None else float(max(total, done + 1)))

        return report_bytes
