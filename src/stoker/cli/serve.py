"""``stoker serve``: the daemon, in the foreground. The only word that imports the server."""

from __future__ import annotations

import dataclasses
import gc

import click

__all__ = ["serve"]


@click.command()
@click.option("--listen", metavar="HOST:PORT", help="Listen on TCP too; every client there needs an API key.")
@click.option("--auto", is_flag=True, hidden=True, help="Started by a client: end when idle, log to a file.")
@click.option("--ready-fd", type=int, hidden=True, metavar="FD", help="Where to say 'ready'.")
def serve(*, listen: str | None, auto: bool, ready_fd: int | None) -> None:
    """Run the daemon until SIGTERM or Ctrl-C. Sandboxes live on, and the next one takes them over.

    It listens on its Unix socket (see 'stoker daemon status'). Clients start it by themselves when none runs; run it openly for
    TCP, or under systemd.
    """
    from stoker.server.daemon import run_daemon
    from stoker.settings import load_settings

    gc.set_threshold(700, 10, 10)  # main() raised it for short lives; this one is long
    settings = load_settings()
    if listen is not None:
        settings = dataclasses.replace(settings, listen=listen)
    run_daemon(settings, auto=auto, ready_fd=ready_fd)
