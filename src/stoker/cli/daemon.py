"""``stoker daemon``: is one running, end it, start it again. Machines outlive all of that."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from stoker.cli.remote import json_option, with_client
from stoker.errors import HostError, InvalidRequest, StokerError

if TYPE_CHECKING:
    from stoker.api.models import Version
    from stoker.client.client import AsyncClient

__all__ = ["daemon"]

NOT_RUNNING = 3
"""As systemctl and init scripts have it."""


@click.group()
def daemon() -> None:
    """Look after the daemon. Sandboxes live on while it is away."""


async def _find(client: AsyncClient) -> Version | None:
    """The daemon's own words; None when nobody listens."""
    try:
        return await client.version()
    except HostError as e:
        if e.code != "daemon_unreachable":
            raise
        return None


def _status_of(version: Version | None, client: AsyncClient) -> dict[str, Any]:
    status: dict[str, Any] = {"running": version is not None, "endpoint": str(client.endpoint)}
    if version is not None:
        status |= {
            "pid": version.pid,
            "version": version.version,
            "api": version.api,
            "uptime": version.uptime,
            "auto_started": version.auto_started,
            "sandboxes": version.sandboxes,
            "facts": version.facts,
        }
    return status


@daemon.command()
@json_option
def status(*, as_json: bool) -> int:
    """Say whether the daemon runs, its pid and version. Exit code 3 when it does not."""

    async def work(client: AsyncClient) -> int:
        from stoker.api.units import format_duration
        from stoker.cli.table import show_json

        version = await _find(client)
        if as_json:
            show_json(_status_of(version, client))
        elif version is None:
            click.echo(f"no daemon runs at {client.endpoint}; it is started when it is needed")
        else:
            how = "started on demand" if version.auto_started else "started by hand or by systemd"
            click.echo(f"running: pid {version.pid}, version {version.version}, for {format_duration(version.uptime)}, {how}")
            click.echo(f"at {client.endpoint}, {version.sandboxes} sandboxes")
        return 0 if version is not None else NOT_RUNNING

    return with_client(work, start=False)


async def _stop(client: AsyncClient) -> int | None:
    """Ends the daemon; its pid, or None when there was none."""
    from stoker.client.launch import stop_daemon

    if client.endpoint.socket is None:
        raise InvalidRequest("daemon_elsewhere", f"the daemon at {client.endpoint} is not this host's", "unset STOKER_URL")
    try:
        version = await _find(client)
        pid = None if version is None else version.pid
    except StokerError:
        # It hangs, or speaks no more: whoever bound the socket is it (or systemd, which is not ours to end).
        listener = client.daemon()
        pid = None if listener is None or listener.pid == 1 else listener.pid
    if pid is None:
        return None
    return pid if await asyncio.to_thread(stop_daemon, pid) else None


@daemon.command()
@json_option
def stop(*, as_json: bool) -> None:
    """End the daemon and wait until it has ended. Sandboxes live on."""

    async def work(client: AsyncClient) -> None:
        from stoker.cli.table import show_json

        pid = await _stop(client)
        if as_json:
            show_json({"stopped": pid is not None, "pid": pid})
        else:
            click.echo("no daemon runs" if pid is None else f"stopped pid {pid}")

    with_client(work, start=False)


@daemon.command()
@json_option
def restart(*, as_json: bool) -> None:
    """End the daemon, start it again and wait until it answers."""

    async def work(client: AsyncClient) -> None:
        from stoker.cli.table import show_json
        from stoker.client.client import AsyncClient as Fresh

        await _stop(client)
        async with Fresh() as fresh:
            version = await fresh.version()
        if as_json:
            show_json(_status_of(version, client))
        else:
            click.echo(f"running: pid {version.pid}, version {version.version}")

    with_client(work, start=False)
