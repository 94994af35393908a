"""``stoker ps`` and ``stoker kill``: the processes of a sandbox."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from stoker.cli.remote import SANDBOX, each, json_option, with_client
from stoker.cli.table import Column, ago, show, show_json

if TYPE_CHECKING:
    from stoker.api.models import ProcessInfo
    from stoker.client.client import AsyncClient

__all__ = ["kill", "ps"]


def _state(process: ProcessInfo) -> str:
    if process.running:
        return "running"
    if process.timed_out:
        return "timed out"
    return f"signal {process.signal}" if process.signal is not None else f"exit {process.exit_code}"


COLUMNS: tuple[Column[ProcessInfo], ...] = (
    Column("ID", lambda p: str(p.id), right=True),
    Column("PID", lambda p: str(p.pid), right=True),
    Column("STATE", _state, full=True),
    Column("TAG", lambda p: p.tag or "-"),
    Column("USER", lambda p: p.user or "-"),
    Column("AGE", lambda p: ago(p.started_at), right=True),
    Column("COMMAND", lambda p: shlex.join(p.argv)),
)


@click.command()
@click.option("--all", "-a", "everything", is_flag=True, help="Those that have ended, too.")
@json_option
@click.argument("sandbox", type=SANDBOX)
def ps(*, everything: bool, as_json: bool, sandbox: str) -> None:
    """List the processes of a sandbox that were started through Stoker."""

    async def work(client: AsyncClient) -> list[ProcessInfo]:
        from stoker.client.commands import AsyncCommands

        return await AsyncCommands(client.api, sandbox).list()

    found = [process for process in with_client(work) if everything or process.running]
    if as_json:
        show_json(found)
    else:
        show(COLUMNS, found, empty="no processes; 'stoker ps -a' shows those that have ended")


@click.command()
@click.option("--signal", "-s", metavar="SIGNAL", default="TERM", show_default=True, help="Name or number.")
@click.argument("sandbox", type=SANDBOX)
@click.argument("processes", nargs=-1, required=True)
def kill(*, signal: str, sandbox: str, processes: tuple[str, ...]) -> int:
    """Send a signal to processes of a sandbox, by number or tag ('rm' destroys a sandbox)."""

    async def work(client: AsyncClient) -> int:
        from stoker.client.commands import AsyncCommands

        commands = AsyncCommands(client.api, sandbox)

        async def one(process: str) -> None:
            await (await commands.connect(process)).signal(int(signal) if signal.isdigit() else signal.upper())

        return await each(processes, one)

    return with_client(work)
