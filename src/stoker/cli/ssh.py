"""``stoker ssh`` and ``stoker ssh-config``: this host's own ssh, with the daemon in the place of a network.

ssh runs us twice more: as its proxy command (``--proxy``), and to learn the sandbox's host key (``--known-hosts``), which comes by
the daemon's API. So there is nothing to be asked, and nothing is trusted blindly.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stoker.cli.options import command_words
from stoker.cli.remote import SANDBOX, with_client
from stoker.errors import HostError

if TYPE_CHECKING:
    from stoker.api.models import SshAccess
    from stoker.client.client import AsyncClient

__all__ = ["ssh", "ssh_config"]

SUFFIX = ".stoker"
"""``NAME.stoker`` is always a sandbox, in a configuration that other hosts are in too."""
CIPHER = "aes128-gcm@openssh.com"


def _name(host: str) -> str:
    return host.removesuffix(SUFFIX)


def _common(key: Path) -> dict[str, str]:
    """What holds for every sandbox."""
    from stoker.api.ssh import DEFAULT_USER

    return {
        "User": DEFAULT_USER,
        "IdentityFile": str(key),
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "PreferredAuthentications": "publickey",
        "HostKeyAlgorithms": "ssh-ed25519",
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": "none",
        "GlobalKnownHostsFile": "none",
        "UpdateHostKeys": "no",
        "CheckHostIP": "no",
        "Ciphers": f"^{CIPHER}",
        "Compression": "no",
        "LogLevel": "ERROR",
    }


def _ourselves() -> list[str]:
    """The words that run this very program, whatever PATH says then, with the settings that were in the environment."""
    program = Path(sys.argv[0])
    words = [str(program.resolve())] if program.is_file() and os.access(program, os.X_OK) else [sys.executable, "-m", "stoker.cli"]
    kept = [
        f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("STOKER_") and name != "STOKER_API_KEY"
    ]
    return ["/usr/bin/env", *kept, *words] if kept else words


def _quoted(words: list[str]) -> str:
    """For a shell, in a configuration, where a per cent sign is ssh's own."""
    return shlex.join(words).replace("%", "%%")


@click.command("ssh", context_settings={"allow_interspersed_args": False})
@click.option("--login", "-l", metavar="USER", help="User in the guest (default: the sandbox's).")
@click.option("--tty", "-t", is_flag=True, help="Give the command a terminal.")
@click.option("--no-command", "-N", is_flag=True, help="Run nothing: forward ports only.")
@click.option("--local", "-L", metavar="SPEC", multiple=True, help="Forward a local port, as ssh's -L.")
@click.option("--dynamic", "-D", metavar="SPEC", multiple=True, help="A local SOCKS proxy, as ssh's -D.")
@click.option("--option", "-o", metavar="K=V", multiple=True, help="An option of ssh's own.")
@click.option("--verbose", "-v", count=True, help="As ssh's -v.")
@click.option("--proxy", is_flag=True, hidden=True)
@click.option("--known-hosts", "host", metavar="HOST", hidden=True)
@click.argument("sandbox", type=SANDBOX)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def ssh(
    *,
    login: str | None,
    tty: bool,
    no_command: bool,
    local: tuple[str, ...],
    dynamic: tuple[str, ...],
    option: tuple[str, ...],
    verbose: int,
    proxy: bool,
    host: str | None,
    sandbox: str,
    command: tuple[str, ...],
) -> int:
    """Log in to a sandbox, or run a command in it, with this host's ssh.

    It goes by the agent's channel: the sandbox needs no network, and nothing of ssh in its image. A paused one is resumed.
    """
    user, at, sandbox = sandbox.rpartition("@")
    login = login or (user if at else None)
    if proxy:
        return _proxy(_name(sandbox))
    if host is not None:
        return _tell_key(_name(sandbox), host)
    from stoker.client.ssh import client_key, ssh_access

    program = shutil.which("ssh")
    if program is None:
        raise HostError("tool_missing", "ssh is not installed", "apt-get install openssh-client, or: stoker exec -it")

    async def ask(client: AsyncClient) -> tuple[SshAccess, Path]:
        return await ssh_access(client.api, _name(sandbox)), await client_key()

    access, key = with_client(ask)
    # What is known by now need not be asked again: this host key, and no other name than the id.
    options = {
        **_common(key),
        "User": login or access.user,
        "HostKeyAlias": access.sandbox,
        "KnownHostsCommand": f"{shutil.which('echo') or '/bin/echo'} {access.sandbox} {access.host_key}",
        "ProxyCommand": _quoted([*_ourselves(), "ssh", "--proxy", access.sandbox]),
    }
    if verbose:
        del options["LogLevel"]
    words = [program, "-F", "none"]
    for pair in (*option, *(f"{name}={value}" for name, value in options.items())):
        words += ["-o", pair]
    for flag, values in (("-L", local), ("-D", dynamic)):
        for value in values:
            words += [flag, value]
    words += ["-t"] * tty + ["-N"] * no_command + ["-v"] * verbose
    sys.stdout.flush()
    os.execv(program, [*words, "--", _name(sandbox), *command_words(command)])


def _proxy(sandbox: str) -> int:
    async def work(client: AsyncClient) -> int:
        from stoker.cli.streams import Reader, Writer
        from stoker.client.ssh import client_key, relay

        public = (await client_key()).with_suffix(".pub").read_text().strip()
        with Reader(0) as reader, Writer(1) as writer:
            try:
                await relay(client.api, sandbox, public, reader.read, writer.write)
            except BrokenPipeError:
                return 1  # ssh is gone
        return 0

    return with_client(work)


def _tell_key(sandbox: str, host: str) -> int:
    from stoker.client.ssh import ssh_access

    access = with_client(lambda client: ssh_access(client.api, sandbox))
    sys.stdout.write(f"{host} {access.host_key}\n")
    return 0


@click.command("ssh-config")
@click.option("--file", "-f", is_flag=True, help="Write it into a file of this user's, and print the file's name.")
@click.argument("sandboxes", type=SANDBOX, nargs=-1)
def ssh_config(*, file: bool, sandboxes: tuple[str, ...]) -> None:
    """Print a configuration for OpenSSH: scp -F $(stoker ssh-config -f) file web:/tmp

    It is for the sandboxes named (all there are, without a name), and NAME.stoker stands for any other, so that it can be included
    in ~/.ssh/config for good. Names are looked up when they are used. (ssh closes what a shell's <(...) opens before it reads it.)
    """
    from stoker.client.ssh import client_key
    from stoker.host.durable import write_atomically

    async def ask(client: AsyncClient) -> tuple[list[str], Path]:
        hosts = sandboxes or [word for info in await client.sandboxes() for word in (info.name, info.id) if word]
        return list(hosts), await client_key()

    hosts, key = with_client(ask)
    us = _ourselves()
    options = {
        **_common(key),
        "KnownHostsCommand": _quoted([*us, "ssh", "--known-hosts"]) + " %H %n",
        "ProxyCommand": _quoted([*us, "ssh", "--proxy"]) + " %n",
    }
    lines = [f"Host {' '.join(hosts)} *{SUFFIX}".replace("  ", " "), *(f"    {name} {value}" for name, value in options.items())]
    text = "\n".join(lines) + "\n"
    if file:
        path = key.with_name("config")
        write_atomically(path, text.encode(), 0o600)
        text = f"{path}\n"
    sys.stdout.write(text)
