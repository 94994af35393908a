"""``stoker network``: policies and ports of sandboxes with an interface on the host."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import click

from stoker.cli.options import SIZE
from stoker.cli.remote import SANDBOX, json_option, with_client
from stoker.cli.table import clean, show_json

if TYPE_CHECKING:
    from stoker.api.models import Denial, Sandbox
    from stoker.client.client import AsyncClient
    from stoker.client.sandbox import AsyncSandbox

__all__ = ["network"]

T = TypeVar("T")


@click.group()
def network() -> None:
    """Look after the networks of sandboxes that have an interface on the host."""


@network.command("set")
@click.option("--egress", metavar="RULES", help="all, none, or 'allow: 10.1.0.0/16, *.example.org:443; deny: ...'.")
@click.option("--publish", "-p", metavar="[IP:]PORT:PORT", multiple=True, help="All ports of the host that lead into it.")
@click.option("--no-ports", is_flag=True, help="None does any more.")
@click.option("--host-access/--no-host-access", default=None, help="Whether it may connect to the host itself.")
@click.option("--rate-in", type=SIZE, help="Bytes a second it may get, such as 10M; 0: no limit.")
@click.option("--rate-out", type=SIZE, help="Bytes a second it may send.")
@click.option("--connections", type=click.IntRange(0, 1 << 20), help="How many it may have open at once; 0: no limit.")
@click.option("--learn/--no-learn", default=None, help="Let through what the policy denies of the public, and record it.")
@json_option
@click.argument("sandbox", type=SANDBOX)
def network_set(
    *,
    egress: str | None,
    publish: tuple[str, ...],
    no_ports: bool,
    host_access: bool | None,
    rate_in: int | None,
    rate_out: int | None,
    connections: int | None,
    learn: bool | None,
    as_json: bool,
    sandbox: str,
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
        limits = {"rate_in": rate_in, "rate_out": rate_out, "connections": connections}
        return await box.set_network(egress=egress, publish=ports, host_access=host_access, learn=learn, **limits)

    info = with_client(work)
    if as_json:
        show_json(info)


def _of(sandbox: str, ask: Callable[[AsyncSandbox], Awaitable[T]]) -> T:
    async def work(client: AsyncClient) -> T:
        from stoker.client.sandbox import AsyncSandbox

        return await ask(await AsyncSandbox.connect(sandbox, client=client))

    return with_client(work)


@network.command("show")
@json_option
@click.argument("sandbox", type=SANDBOX)
def network_show(*, as_json: bool, sandbox: str) -> None:
    """Show a sandbox's address, policy and published ports, and what was sent, denied and refused."""
    found = _of(sandbox, lambda box: box.network())
    if as_json:
        return show_json(found)
    counted = found.counters
    words = {
        "interface": found.interface or "-",
        "address": found.address or "-",
        "slot": found.slot or "-",
        "egress": found.egress + (" (learning)" if found.learn else ""),
        "ports": ", ".join(found.publish) or "-",
        "sent": f"{counted.sent} packets, {counted.sent_bytes} bytes",
        "denied": f"{counted.denied} packets",
        "refused": f"{counted.refused} packets that came for it",
    }
    for name, value in words.items():
        click.echo(f"{name + ':':<11}{clean(value)}")
    if found.denials:
        click.echo(f"of late denied: {', '.join(_where(one) for one in found.denials[:5])}")


def _where(one: Denial) -> str:
    port = f":{one.port}" if one.port is not None else ""
    return f"{one.destination or ''}{port}/{one.protocol}"


@network.command("denials")
@click.option("--follow", "-f", is_flag=True, help="Go on with those that come.")
@json_option
@click.argument("sandbox", type=SANDBOX)
def network_denials(*, follow: bool, as_json: bool, sandbox: str) -> None:
    """List what a sandbox's firewall denied of late: when last, how often, where to.

    A few a second are recorded; `show` counts all.
    """

    async def work(box: AsyncSandbox) -> None:
        seen: dict[tuple[str, str | None, int | None], float] = {}
        while True:
            for one in reversed((await box.network()).denials):
                key = (one.protocol, one.destination, one.port)
                if seen.get(key) == one.last_at:
                    continue
                seen[key] = one.last_at
                if as_json:
                    show_json(one)
                else:
                    at = time.strftime("%H:%M:%S", time.localtime(one.last_at))
                    click.echo(f"{at}  {one.times:>5}x  {_where(one)}")
            if not follow:
                return
            sys.stdout.flush()
            await asyncio.sleep(0.5)

    _of(sandbox, work)


@network.command("learned")
@json_option
@click.argument("sandbox", type=SANDBOX)
def network_learned(*, as_json: bool, sandbox: str) -> None:
    """Print the egress policy that a sandbox would have needed, after `network set --learn`: its own, with exact rules in front."""
    found = _of(sandbox, lambda box: box.learned())
    if as_json:
        show_json(found)
    elif found.egress:
        click.echo(found.egress)
    else:
        click.echo("\n".join(found.rules) if found.rules else "nothing was needed beyond its policy", err=not found.rules)


@network.command("explain")
@click.option("--udp", is_flag=True, help="A UDP port; nothing is sent to it.")
@json_option
@click.argument("sandbox", type=SANDBOX)
@click.argument("target", metavar="HOST:PORT")
def network_explain(*, udp: bool, as_json: bool, sandbox: str, target: str) -> int:
    """Walk the way from a sandbox to a port, for real, and say why it is reached or not.

    Every step is shown as it is, and with the command that mends it. Takes 10 s at most. Exits with 1 when something fails.
    """
    found = _of(sandbox, lambda box: box.explain(target, protocol="udp" if udp else "tcp"))
    if as_json:
        show_json(found)
    else:
        marks = {"pass": "ok  ", "fail": "FAIL", "unknown": "?   "}
        for step in found.steps:
            click.echo(f"{marks[step.verdict.value]} {step.name}: {clean(step.says)}")
            if step.mend:
                click.echo(f"     {clean(step.mend)}")
    return 0 if found.fault is None else 1


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
@click.option("--ipv6", is_flag=True, help="Also what machines with --ipv6 need.")
@json_option
def network_check(*, fix: bool, undo: bool, ipv6: bool, as_json: bool) -> int:
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
    found = host_network.findings(settings, ipv6=ipv6)
    done = host_network.fix(settings, found) if fix else []
    if done:
        found = host_network.findings(settings, ipv6=ipv6)
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
