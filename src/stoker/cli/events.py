"""``stoker events``: what happens, as it happens."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from stoker.cli.remote import SANDBOX, with_client
from stoker.cli.table import clean

if TYPE_CHECKING:
    from stoker.api.models import Event
    from stoker.client.client import AsyncClient

__all__ = ["events"]


def _words(event: Event) -> str:
    import json

    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at))
    data = " ".join(f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in event.data.items())
    return clean(f"{moment}  {event.kind}  {event.sandbox or '-'}  {data}".rstrip())


@click.command()
@click.option("--after", type=click.IntRange(min=0), metavar="ID", help="Begin behind this event; 0: with all that are kept.")
@click.option("--count", "-n", type=click.IntRange(min=1), metavar="N", help="End after so many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
@click.argument("sandbox", required=False, type=SANDBOX)
def events(*, after: int | None, count: int | None, as_json: bool, sandbox: str | None) -> None:
    """Print what happens to sandboxes until interrupted."""

    async def work(client: AsyncClient) -> None:
        import msgspec

        seen = 0
        async with await client.events(sandbox=sandbox, after=after) as feed:
            async for event in feed:
                sys.stdout.write((msgspec.json.encode(event).decode() if as_json else _words(event)) + "\n")
                sys.stdout.flush()
                seen += 1
                if seen == count:
                    return

    with_client(work)
