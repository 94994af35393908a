"""``stoker run``: a machine for one command, on the user's own standard streams."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stoker.cli.options import DURATION, SIZE, command_words, environment, existing_file
from stoker.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from stoker.cli.attach import Signals
    from stoker.engine.boot import LiveMachine, MachineRequest
    from stoker.settings import Settings

__all__ = ["run"]

MIB = 1 << 20
EXIT_FAILED = 125


@dataclass(frozen=True, slots=True)
class Streams:
    """How the command meets the user's terminal and files."""

    interactive: bool
    tty: bool
    timeout: float | None
    quiet: bool
    timings: Path | None = None


@dataclass(slots=True)
class Marks:
    """Seconds of CLOCK_MONOTONIC at which things happened: what ``stoker bench`` puts together."""

    at: dict[str, float] = field(default_factory=dict)

    def now(self, name: str) -> None:
        self.at.setdefault(name, time.monotonic())


def _streams_in(interactive: bool) -> bool:
    """Whether the command reads our standard input: when asked to, and when it is a pipe, a file or a socket anyway."""
    mode = os.fstat(0).st_mode
    return interactive or stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


async def _marked(stream: AsyncIterator[bytes], marks: Marks) -> AsyncIterator[bytes]:
    async for data in stream:
        marks.now("first_byte")
        yield data


def _write_timings(path: Path, live: LiveMachine, marks: Marks) -> None:
    import json

    welcome = live.agent.welcome
    guest = {"started": welcome.started_us / 1e6, "ready": welcome.ready_us / 1e6}
    path.write_text(json.dumps({"marks": marks.at, "laps": live.timings, "guest": guest}))


async def _command(live: LiveMachine, words: tuple[str, ...], streams: Streams, signals: Signals, marks: Marks) -> int:
    from stoker.cli.attach import attach
    from stoker.cli.terminal import size
    from stoker.errors import InvalidRequest
    from stoker.guest.messages import ExecRequest

    argv = words or live.rootfs.command
    if not argv:
        raise InvalidRequest(
            "no_command", f"{live.request.image} has no command of its own", f"stoker run {live.request.image} -- sh"
        )
    rows, columns = size() if streams.tty else (0, 0)
    terminal = {name: os.environ[name] for name in ("TERM", "COLORTERM") if os.environ.get(name)} if streams.tty else {}
    stdin = _streams_in(streams.interactive)
    request = ExecRequest(
        argv=argv, env={**terminal, **dict(live.request.env)}, tty=streams.tty, rows=rows, cols=columns, stdin=stdin
    )
    marks.now("exec")
    process = await live.agent.exec(request)
    marks.now("started")
    if streams.timings is not None:
        process.stdout = _marked(process.stdout, marks)  # type: ignore[assignment]
    code = await attach(process, signals, stdin=stdin, tty=streams.tty, timeout=streams.timeout)
    if streams.timings is not None:
        _write_timings(streams.timings, live, marks)
    return code


async def _run(request: MachineRequest, settings: Settings, words: tuple[str, ...], streams: Streams, marks: Marks) -> int:
    from stoker.cli.attach import Signals
    from stoker.cli.progress import progress_for
    from stoker.engine.run import running

    task = asyncio.current_task()
    caught: list[int] = []
    assert task is not None

    def early(number: int) -> None:
        if not caught:
            caught.append(number)
            task.cancel()

    progress = progress_for(streams.quiet)
    marks.now("imported")
    with Signals(early) as signals:
        try:
            async with running(request, settings, progress) as live:
                progress.close()
                marks.now("booted")
                return await _command(live, words, streams, signals, marks)
        except asyncio.CancelledError:
            if not caught:
                raise
            return 128 + caught[0]
        finally:
            progress.close()


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--kernel", metavar="K", default="", help="debian:SUITE, a vmlinux or bzImage, or a digest.  [default: debian:12]")
@click.option("--initrd", metavar="FILE", help="An initial RAM disk made elsewhere; the agent is added to it.")
@click.option("--cpus", metavar="N", type=click.IntRange(1, 64), default=1, show_default=True, help="Virtual CPUs.")
@click.option("--memory", "-m", type=SIZE, default="512M", show_default=True, help="Memory, such as 512M or 2G.")
@click.option("--disk", type=SIZE, help="Size of the root file system.  [default: the image's own]")
@click.option("--env", "-e", metavar="K=V", multiple=True, help="Set a variable; K alone passes yours on.")
@click.option("--env-file", metavar="F", multiple=True, help="Read variables from a file, one K=V a line.")
@click.option("--workdir", "-w", metavar="D", default="", help="Directory to run in.  [default: the image's own]")
@click.option("--user", "-u", metavar="U", default="", help="User, or USER:GROUP, by name or number.  [default: the image's own]")
@click.option("--hostname", metavar="NAME", default="", help="The guest's host name.")
@click.option("--network", type=click.Choice(["none", "user"]), default="user", show_default=True, help="The guest's network.")
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
    cpus: int,
    memory: int,
    disk: int | None,
    env: tuple[str, ...],
    env_file: tuple[str, ...],
    workdir: str,
    user: str,
    hostname: str,
    network: str,
    interactive: bool,
    tty: bool,
    timeout: float | None,
    cold: bool,
    quiet: bool,
    timings: Path | None,
    image: str,
    command: tuple[str, ...],
) -> int:
    """Run a command in a new microVM.

    IMAGE is debian:SUITE or ext4:PATH. The exit code is the command's own, 128+N when signal N ended it, 126 or 127 when it cannot
    be run or is not there, 124 when --timeout was up, and 125 when Stoker itself failed. Pipes and files on standard input go to
    the command; -i hands over a terminal's too, and -it makes it a session.
    """
    marks = Marks()
    marks.now("parsed")
    settings = load_settings()
    variables, initial = environment(env, env_file), existing_file("--initrd", initrd)
    from stoker.cli.errors import report
    from stoker.engine.boot import MachineRequest
    from stoker.errors import DeadlineExceeded

    request = MachineRequest(
        name=f"run-{os.getpid()}",
        image=image,
        kernel=kernel,
        initrd=initial,
        cpus=cpus,
        memory=memory,
        disk=disk or 0,
        network=network,
        hostname=hostname,
        env=variables,
        user=user,
        workdir=workdir,
        cold=cold,
    )
    streams = Streams(interactive, tty, timeout, quiet, timings)
    try:
        return asyncio.run(_run(request, settings, command_words(command), streams, marks))
    except DeadlineExceeded as e:
        # 124 says that the command's own time was up; a machine that did not come up in time is a failure of ours.
        report(e)
        return EXIT_FAILED
