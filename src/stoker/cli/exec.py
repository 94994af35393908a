"""``stoker exec`` and ``stoker attach``: a command in a sandbox that is there, on the user's own standard streams."""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING

import click

from stoker.cli.options import DURATION, command_words, environment
from stoker.cli.remote import SANDBOX, with_client

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stoker.api.models import StartProcess
    from stoker.client.client import AsyncClient
    from stoker.client.process import AsyncProcess

__all__ = ["attach", "exec_command", "process_request", "reads_input"]


def reads_input(interactive: bool) -> bool:
    """Whether the command reads our standard input: when asked to, and when it is a pipe, a file or a socket anyway."""
    mode = os.fstat(0).st_mode
    return interactive or stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


async def on_streams(process: AsyncProcess, *, stdin: bool, tty: bool, timeout: float | None) -> int:
    """Joins a process with our standard streams until it ends; the result is our exit code."""
    from stoker.cli.attach import Signals
    from stoker.cli.attach import attach as join
    from stoker.cli.streamed import Streamed

    task = asyncio.current_task()
    caught: list[int] = []
    assert task is not None

    def early(number: int) -> None:
        caught.append(number)
        task.cancel()

    with Signals(early) as signals:
        try:
            async with Streamed(process) as streamed:
                code = await join(streamed, signals, stdin=stdin, tty=tty, timeout=timeout)
        except asyncio.CancelledError:
            if not caught:
                raise
            return 128 + caught[0]
    if streamed.lost:
        click.echo(f"stoker: {streamed.lost} bytes of output were overwritten before they could be read", err=True)
    return code


def process_request(
    argv: tuple[str, ...],
    *,
    stdin: bool,
    tty: bool,
    env: Mapping[str, str] | None = None,
    workdir: str | None = None,
    user: str | None = None,
    tag: str | None = None,
    timeout: float | None = None,
) -> StartProcess:
    """What starts a command for a person: a terminal gets our size and kind."""
    from stoker.api.models import StartProcess, Terminal
    from stoker.cli.terminal import size

    terminal = None
    variables = dict(env or {})
    if tty:
        rows, cols = size()
        terminal = Terminal(rows=rows, cols=cols)
        variables = {**{name: os.environ[name] for name in ("TERM", "COLORTERM") if os.environ.get(name)}, **variables}
    return StartProcess(
        argv=list(argv), env=variables, cwd=workdir, user=user, tag=tag, stdin=stdin, terminal=terminal, timeout=timeout
    )


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("--interactive", "-i", is_flag=True, help="Read standard input, from a terminal too.")
@click.option("--tty", "-t", is_flag=True, help="Give the command a terminal.")
@click.option("--detach", "-d", is_flag=True, help="Start it in the background and print its number.")
@click.option("--env", "-e", metavar="K=V", multiple=True, help="Set a variable; K alone passes yours on.")
@click.option("--env-file", metavar="F", multiple=True, help="Read variables from a file, one K=V a line.")
@click.option("--workdir", "-w", metavar="D", help="Directory to run in.")
@click.option("--user", "-u", metavar="U", help="User, or USER:GROUP, by name or number.")
@click.option("--tag", metavar="TAG", help="A name for the process.")
@click.option("--timeout", type=DURATION, metavar="T", help="End the command after so long, with exit code 124.")
@click.argument("sandbox", type=SANDBOX)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_command(
    *,
    interactive: bool,
    tty: bool,
    detach: bool,
    env: tuple[str, ...],
    env_file: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    tag: str | None,
    timeout: float | None,
    sandbox: str,
    command: tuple[str, ...],
) -> int:
    """Run a command in a sandbox.

    The exit code is the command's own, 128+N when signal N ended it, 126 or 127 when it cannot be run or is not there, 124 when
    --timeout was up, and 125 when Stoker itself failed. A command whose stoker is killed goes on; 'stoker attach' finds it.
    """
    words = command_words(command)
    if not words:
        raise click.UsageError("name a command")
    stdin = reads_input(interactive) and not detach
    request = process_request(
        words,
        env=dict(environment(env, env_file)),
        workdir=workdir,
        user=user,
        tag=tag,
        stdin=stdin or (detach and interactive),
        tty=tty,
        timeout=timeout if detach else None,
    )

    async def work(client: AsyncClient) -> int:
        if detach:
            click.echo((await client.start_process(sandbox, request)).id)
            return 0
        process = await client.open_process(sandbox, request)
        return await on_streams(process, stdin=stdin, tty=tty, timeout=timeout)

    return with_client(work)


@click.command()
@click.option("--interactive", "-i", is_flag=True, help="Write standard input to it, from a terminal too.")
@click.argument("sandbox", type=SANDBOX)
@click.argument("process")
def attach(*, interactive: bool, sandbox: str, process: str) -> int:
    """Join a process of a sandbox, by number or tag: what it wrote lately, and all that it writes from now on."""

    async def work(client: AsyncClient) -> int:
        from stoker.client.commands import AsyncCommands

        handle = await AsyncCommands(client.api, sandbox).connect(process)
        stdin = handle.info.stdin and reads_input(interactive)
        return await on_streams(handle, stdin=stdin, tty=handle.info.terminal, timeout=None)

    return with_client(work)
