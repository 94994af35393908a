"""What ``stoker run -d`` does: a sandbox that stays, with one command in its background."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from stoker.cli.exec import process_request
from stoker.cli.remote import Following, with_client
from stoker.errors import InvalidRequest

if TYPE_CHECKING:
    from stoker.api.models import Sandbox
    from stoker.client.client import AsyncClient

__all__ = ["run_detached"]


def run_detached(sandbox: dict[str, Any], words: tuple[str, ...], timeout: float | None, *, quiet: bool) -> int:
    """``sandbox`` are the words of :meth:`AsyncSandbox.create`. Where the command cannot be started, nothing is left."""

    async def work(client: AsyncClient) -> Sandbox:
        from stoker.client.sandbox import AsyncSandbox

        with Following(quiet) as following:
            box = await AsyncSandbox.create(client=client, on_progress=following.step, **sandbox)
        try:
            argv = words or tuple(box.info.command)
            if not argv:
                raise InvalidRequest("no_command", f"{box.info.image} has no command of its own", "stoker run -d IMAGE -- COMMAND")
            await client.start_process(box.id, process_request(argv, stdin=False, tty=False, tag="main", timeout=timeout))
        except BaseException:
            await box.kill()
            raise
        return box.info

    info = with_client(work)
    click.echo(info.name or info.id)
    if info.address:
        click.echo(f"address: {info.address}", err=True)
    return 0
