"""``stoker logs``: a sandbox's serial console, or the output of one of its processes."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import click

from stoker.cli.remote import SANDBOX, with_client
from stoker.cli.terminal import is_terminal

if TYPE_CHECKING:
    from stoker.client.client import AsyncClient
    from stoker.client.sandbox import AsyncSandbox

__all__ = ["logs", "tame"]

# Colours may pass; whatever else a guest tells the terminal (titles, answers, clipboard, cursor) may not.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_STRINGS = r"\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?"
_CONTROL = re.compile(_STRINGS + r"|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[ -Z\\-~]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def tame(text: str) -> str:
    """A console's text without what could take over a person's terminal."""
    colours = _COLOUR.findall(text)
    parts = [_CONTROL.sub("", part).replace("\r\n", "\n") for part in _COLOUR.split(text)]
    return "".join(part + colour for part, colour in zip(parts, [*colours, ""], strict=True))


def _write(text: str) -> None:
    sys.stdout.write(tame(text) if is_terminal(1) else text)
    sys.stdout.flush()


async def _console(box: AsyncSandbox, follow: bool, whole: bool) -> None:
    if follow:
        async with await box.follow_logs(offset=0 if whole else None) as parts:
            async for part in parts:
                _write(part.text)
    elif whole:
        await _whole(box)
    else:
        _write(await box.logs())


async def _whole(box: AsyncSandbox) -> None:
    offset = 0
    while True:
        part = await box.console(offset=offset, limit=1 << 20)
        if not part.text:
            return
        _write(part.text)
        offset = part.next


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes, until the machine ends.")
@click.option("--all", "-a", "whole", is_flag=True, help="From the oldest byte held, not only the last 64 KiB.")
@click.option("--process", "-p", metavar="P", help="The output of a process, by number or tag, not the console.")
@click.argument("sandbox", type=SANDBOX)
def logs(*, follow: bool, whole: bool, process: str | None, sandbox: str) -> None:
    """Print a sandbox's serial console, or the output of one of its processes."""

    async def work(client: AsyncClient) -> None:
        from stoker.client.sandbox import AsyncSandbox

        box = await AsyncSandbox.connect(sandbox, client=client)
        if process is None:
            return await _console(box, follow, whole)
        handle = await box.commands.connect(process)
        ends = (handle.info.stdout_bytes, handle.info.stderr_bytes)
        seen = {"stdout": handle.info.stdout_oldest, "stderr": handle.info.stderr_oldest}
        if not follow and (seen["stdout"], seen["stderr"]) == ends:
            return None
        async for output in handle:
            stream = sys.stdout if output.stream == "stdout" else sys.stderr
            stream.buffer.write(output.data)
            stream.flush()
            seen[output.stream] = output.offset + len(output.data)
            if not follow and seen["stdout"] >= ends[0] and seen["stderr"] >= ends[1]:
                break
        return await handle.disconnect()

    with_client(work)
