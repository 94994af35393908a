"""``stoker run``: a machine for one command, on the user's own standard streams."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from stoker.cli.early import create_early
from stoker.cli.mounts import MOUNT, wire_mounts
from stoker.cli.options import (
    DURATION,
    SIZE,
    absolute_image,
    absolute_kernel,
    command_words,
    environment,
    existing_file,
    network_options,
    wire_network,
)
from stoker.settings import load_settings

__all__ = ["run"]

EXIT_FAILED = 125


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--kernel", metavar="K", default="", help="debian:SUITE, a vmlinux or bzImage, or a digest.  [default: debian:12]")
@click.option("--initrd", metavar="FILE", help="An initial RAM disk made elsewhere; the agent is added to it.")
@click.option("--cpus", metavar="N", type=click.IntRange(1, 64), help="Virtual CPUs.  [default: 1, or the template's]")
@click.option("--memory", "-m", type=SIZE, help="Memory, such as 512M or 2G.  [default: 512M, or the template's]")
@click.option("--disk", type=SIZE, help="Size of the root file system.  [default: the image's own]")
@click.option("--env", "-e", metavar="K=V", multiple=True, help="Set a variable; K alone passes yours on.")
@click.option("--env-file", metavar="F", multiple=True, help="Read variables from a file, one K=V a line.")
@click.option("--workdir", "-w", metavar="D", default="", help="Directory to run in.  [default: the image's own]")
@click.option("--user", "-u", metavar="U", default="", help="User, or USER:GROUP, by name or number.  [default: the image's own]")
@click.option("--name", metavar="NAME", help="A name for the machine while it lives.")
@click.option("--hostname", metavar="NAME", default="", help="The guest's host name.")
@network_options
@click.option("--init", type=click.Choice(["agent", "image"]), help="Who is process 1.  [default: agent]")
@click.option("--volume", "-v", "volumes", metavar="NAME:/PATH[:ro]", multiple=True, type=MOUNT, help="Mount a volume.")
@click.option("--app", metavar="FILE|DIR", help="A zip, tar, tar.gz or directory whose content goes into /app.")
@click.option("--detach", "-d", is_flag=True, help="Leave it running, and print its name or id; the command is the process 'main'.")
@click.option("--interactive", "-i", is_flag=True, help="Read standard input, from a terminal too.")
@click.option("--tty", "-t", is_flag=True, help="Give the command a terminal.")
@click.option("--timeout", type=DURATION, metavar="S", help="End the command after so long, with exit code 124.")
@click.option("--cold", is_flag=True, help="Boot, even where a put-away machine could be used.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@click.option("--timings", hidden=True, type=click.Path(path_type=Path))
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(
    *,
    kernel: str,
    initrd: str | None,
    cpus: int | None,
    memory: int | None,
    disk: int | None,
    env: tuple[str, ...],
    env_file: tuple[str, ...],
    workdir: str,
    user: str,
    name: str | None,
    hostname: str,
    init: str | None,
    volumes: tuple[str, ...],
    app: str | None,
    detach: bool,
    interactive: bool,
    tty: bool,
    timeout: float | None,
    cold: bool,
    quiet: bool,
    timings: Path | None,
    image: str,
    command: tuple[str, ...],
    **network: Any,
) -> int:
    """Run a command in a new microVM.

    IMAGE is a template's name, debian:SUITE or ext4:PATH. The exit code is the command's own, 128+N when signal N ended it, 126
    or 127 when it cannot be run or is not there, 124 when --timeout was up, and 125 when Stoker itself failed. Pipes and files on
    standard input go to the command; -i hands over a terminal's too, and -it makes it a session.
    """
    variables, initial = environment(env, env_file), existing_file("--initrd", initrd)
    sandbox: dict[str, Any] = {
        "image": absolute_image(image),
        "kernel": absolute_kernel(kernel),
        "initrd": str(initial or ""),
        "cpus": cpus,
        "memory": memory,
        "disk": disk or 0,
        "init": init,
        "hostname": hostname or None,
        "env": dict(variables),
        "user": user or None,
        "workdir": workdir or None,
        "cold": cold,
    }
    sandbox |= {"volumes": volumes} if volumes else {}
    sandbox |= {"name": name} if name is not None else {}
    sandbox |= {name: given for name, given in network.items() if given or given == ""}
    if detach:
        from stoker.cli.detached import run_detached

        if interactive or tty:
            raise click.UsageError("-d leaves the command in the background, where nobody types: without -i and -t")
        sandbox |= {"app": app} if app is not None else {}
        return run_detached(sandbox, command_words(command), timeout, quiet=quiet)
    parsed = time.monotonic()
    # An app has to be there before it can be named.
    wire = {**sandbox, **wire_network(network), **wire_mounts(volumes), "lease": True}
    early = create_early(load_settings(), wire) if app is None else None
    sandbox |= {"app": app} if app is not None else {}
    # The machine boots while all this is imported.
    import asyncio

    from stoker.cli.errors import report
    from stoker.cli.leased import Marks, Session, run_leased
    from stoker.errors import DeadlineExceeded

    marks = Marks({"parsed": parsed})
    session = Session(command_words(command), interactive, tty, timeout, quiet, timings)
    try:
        return asyncio.run(run_leased(sandbox, session, marks, early))
    except DeadlineExceeded as e:
        # 124 says that the command's own time was up; a machine that did not come up in time is a failure of ours.
        report(e)
        return EXIT_FAILED
