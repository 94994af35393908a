"""``stoker network``: policies and ports of sandboxes with an interface on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stoker.cli.remote import SANDBOX, json_option, with_client
from stoker.cli.table import show_json

if TYPE_CHECKING:
    from stoker.api.models import Sandbox
    from stoker.client.client import AsyncClient

__all__ = ["network"]


@click.group()
def network() -> None:
    """Look after the networks of sandboxes that have an interface on the host."""


@network.command("set")
@click.option("--egress", metavar="RULES", help="all, none, or 'allow: 10.1.0.0/16, *.example.org:443; deny: ...'.")
@click.option("--publish", "-p", metavar="[IP:]PORT:PORT", multiple=True, help="All ports of the host that lead into it.")
@click.option("--no-ports", is_flag=True, help="None does any more.")
@json_option
@click.argument("sandbox", type=SANDBOX)
def network_set(*, egress: str | None, publish: tuple[str, ...], no_ports: bool, as_json: bool, sandbox: str) -> None:
    """Change where a sandbox may connect to, and its published ports, while it runs.

    Connections that it may not have any more are cut.
    """
    if publish and no_ports:
        raise click.UsageError("--publish and --no-ports exclude each other")

    async def work(client: AsyncClient) -> Sandbox:
        from stoker.client.sandbox import AsyncSandbox

        box = await AsyncSandbox.connect(sandbox, client=client)
        return await box.set_network(egress=egress, publish=publish if publish or no_ports else None)

    info = with_client(work)
    if as_json:
        show_json(info)
