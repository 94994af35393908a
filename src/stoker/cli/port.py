"""``stoker port-forward`` and ``stoker url``: ports inside sandboxes, from this host."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import click

from stoker.cli.remote import SANDBOX, json_option, with_client
from stoker.errors import InvalidRequest

if TYPE_CHECKING:
    from stoker.client.client import AsyncClient
    from stoker.errors import StokerError

__all__ = ["port_forward", "url"]


def _places(word: str) -> tuple[str, int]:
    """``[LOCAL:]PORT``: LOCAL is a port, ``HOST:PORT`` or the path of a socket; by itself PORT is the local one too."""
    local, _, port = word.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InvalidRequest("bad_port", f"{word!r} is not [LOCAL:]PORT", "such as 8080:80, 0.0.0.0:8080:80 or /tmp/web.sock:80")
    return (local if ":" in local or "/" in local else f"127.0.0.1:{local or port}"), int(port)


@click.command("port-forward")
@click.argument("sandbox", type=SANDBOX)
@click.argument("ports", nargs=-1, required=True, metavar="[LOCAL:]PORT...")
def port_forward(*, sandbox: str, ports: tuple[str, ...]) -> None:
    """Listen here for ports inside a sandbox, until interrupted.

    It goes by the agent's channel: the sandbox needs no network, and its service may listen on localhost only. A paused sandbox is
    resumed when somebody connects.
    """
    wanted = [_places(word) for word in ports]

    async def work(client: AsyncClient) -> None:
        from stoker.cli.errors import report
        from stoker.client.api import path
        from stoker.client.forward import listen
        from stoker.client.sandbox import AsyncSandbox

        box = await AsyncSandbox.connect(sandbox, client=client)
        last = ""

        def tell(error: StokerError) -> None:
            nonlocal last
            if str(error) != last:
                last = str(error)
                report(error)

        async with AsyncExitStack() as stack:
            for local, port in wanted:
                target = path("sandboxes", box.id, "ports", str(port), "stream")
                forward = await stack.enter_async_context(await listen(client.api, target, local, tell))
                sys.stdout.write(f"{forward.address} -> {box.name or box.id}:{port}\n")
            sys.stdout.flush()
            await asyncio.Event().wait()

    with_client(work)


@click.command("url")
@json_option
@click.argument("sandbox", type=SANDBOX)
@click.argument("port", type=click.IntRange(1, 65535))
def url(*, sandbox: str, port: int, as_json: bool) -> None:
    """Print where the daemon's proxy serves a port of a sandbox."""

    async def work(client: AsyncClient) -> None:
        import msgspec

        from stoker.client.sandbox import AsyncSandbox

        access = await (await AsyncSandbox.connect(sandbox, client=client)).port(port)
        if as_json:
            sys.stdout.write(msgspec.json.encode(access).decode() + "\n")
            return
        if access.url is None:
            raise InvalidRequest(
                "no_proxy", f"the proxy does not serve {sandbox}", "see `proxy` in the settings, and its label stoker.proxy"
            )
        sys.stdout.write(access.url + "\n")
        if access.token_needed:
            sys.stdout.write(f"X-Stoker-Token: {access.token}\n")

    with_client(work)
