"""``stoker network``: policies and ports of sandboxes with an interface on the host."""

from __future__ import annotations

import json
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
@click.option("--host-access/--no-host-access", default=None, help="Whether it may connect to the host itself.")
@json_option
@click.argument("sandbox", type=SANDBOX)
def network_set(
    *, egress: str | None, publish: tuple[str, ...], no_ports: bool, host_access: bool | None, as_json: bool, sandbox: str
) -> None:
    """Change where a sandbox may connect to, and its published ports, while it runs.

    Connections that it may not have any more are cut.
    """
    if publish and no_ports:
        raise click.UsageError("--publish and --no-ports exclude each other")

    async def work(client: AsyncClient) -> Sandbox:
        from stoker.client.sandbox import AsyncSandbox

        box = await AsyncSandbox.connect(sandbox, client=client)
        ports = publish if publish or no_ports else None
        return await box.set_network(egress=egress, publish=ports, host_access=host_access)

    info = with_client(work)
    if as_json:
        show_json(info)


@network.command("plan")
@click.option("--run-id", metavar="ID", required=True, help="What the machines of one test run share.")
@click.option("--range", "address_range", metavar="RANGE", help="Which range of the configuration.  [default: default]")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def network_plan(*, run_id: str, address_range: str | None, names: tuple[str, ...]) -> None:
    """Print, as JSON, the interfaces and addresses that machines of a run get.

    It follows from the run id and the names alone, but where something on this host is in the way: then the next free ones.
    """
    from stoker.engine import host_network
    from stoker.settings import load_settings

    plans = host_network.plan(load_settings(), run_id, names, address_range)
    show_json([plan.as_dict() for plan in plans])


@network.command("check")
@click.option("--fix", is_flag=True, help="Apply the mends, for good.")
@click.option("--undo", is_flag=True, help="Take back what --fix ever did.")
@json_option
def network_check(*, fix: bool, undo: bool, as_json: bool) -> int:
    """Look at what the host's network needs for machines with an interface on it, and at what other tools do against them.

    Every mend is shown as the command that makes it. Exits with 1 when something speaks against them (still).
    """
    from stoker.engine import host_network
    from stoker.settings import load_settings

    if fix and undo:
        raise click.UsageError("--fix and --undo exclude each other")
    settings = load_settings()
    if undo:
        click.echo(f"{host_network.unfix(settings)} steps taken back")
        return 0
    found = host_network.findings(settings)
    done = host_network.fix(settings, found) if fix else []
    if done:
        found = host_network.findings(settings)
    if as_json:
        rows = [{"name": one.name, "ok": one.ok, "says": one.says, "mends": [str(mend) for mend in one.mends]} for one in found]
        click.echo(json.dumps({"findings": rows, "done": done}))
    else:
        for line in done:
            click.echo(f"done: {line}")
        for one in found:
            click.echo(f"{'ok  ' if one.ok else 'FAIL'} {one.name}: {one.says}")
            for mend in one.mends if not one.ok else ():
                click.echo(f"     {mend}")
    return 0 if all(one.ok for one in found) else 1
