"""The words about sandboxes: create, ls, inspect, rm, stop, start, resize, freeze, thaw, pause, resume, timeout, wait."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from stoker.cli.mounts import MOUNT
from stoker.cli.options import DURATION, SIZE, absolute_image, absolute_kernel, environment, existing_file, network_options
from stoker.cli.remote import SANDBOX, Following, each, json_option, labels_of, with_client
from stoker.cli.table import Column, ago, show, show_json

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stoker.api.models import Sandbox
    from stoker.client.client import AsyncClient
    from stoker.client.sandbox import AsyncSandbox

__all__ = [
    "create",
    "fork",
    "freeze",
    "inspect",
    "ls",
    "pause",
    "resize",
    "resume",
    "rm",
    "start",
    "stop",
    "thaw",
    "timeout",
    "wait",
]

STATES = ("creating", "running", "frozen", "pausing", "paused", "resuming", "stopping", "stopped", "failed", "lost")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress.")


@click.command()
@click.option("--name", "-n", metavar="NAME", help="A name, unique among yours.")
@click.option("--label", "-l", metavar="K=V", multiple=True, help="A label; ls and rm find it again.")
@click.option("--timeout", type=DURATION, metavar="T", help="Destroy it after so long, such as 30m.")
@click.option("--idle-timeout", type=DURATION, metavar="T", help="Pause it when it has not been used for so long.")
@click.option("--kernel", metavar="K", default="", help="debian:SUITE, a vmlinux or bzImage, or a digest.  [default: debian:12]")
@click.option("--initrd", metavar="FILE", help="An initial RAM disk made elsewhere; the agent is added to it.")
@click.option("--cpus", metavar="N", type=click.IntRange(1, 256), help="Virtual CPUs.  [default: 1, or the template's]")
@click.option("--memory", "-m", type=SIZE, help="Memory, such as 512M or 2G.  [default: 512M, or the template's]")
@click.option("--disk", type=SIZE, default=0, help="Size of the root file system.  [default: the image's own]")
@click.option("--env", "-e", metavar="K=V", multiple=True, help="Set a variable; K alone passes yours on.")
@click.option("--env-file", metavar="F", multiple=True, help="Read variables from a file, one K=V a line.")
@click.option("--workdir", "-w", metavar="D", help="Default directory.  [default: the image's own]")
@click.option("--user", "-u", metavar="U", help="Default user.  [default: the image's own]")
@click.option("--hostname", metavar="NAME", help="The guest's host name.")
@network_options
@click.option("--init", type=click.Choice(["agent", "image"]), help="Who is process 1.  [default: agent]")
@click.option("--volume", "-v", "volumes", metavar="NAME:/PATH[:ro]", multiple=True, type=MOUNT, help="Mount a volume.")
@click.option("--app", metavar="FILE|DIR", help="A zip, tar, tar.gz or directory whose content goes into /app.")
@click.option("--start", is_flag=True, help="Run the image's own command, as the process 'main'.")
@click.option("--cold", is_flag=True, help="Boot, even where a put-away machine could be used.")
@click.option("--from", "snapshot", metavar="SNAPSHOT", help="Go on where a snapshot was taken, instead of an image.")
@quiet_option
@json_option
@click.argument("image", required=False)
def create(
    *,
    label: tuple[str, ...],
    env: tuple[str, ...],
    env_file: tuple[str, ...],
    initrd: str | None,
    image: str | None,
    kernel: str,
    quiet: bool,
    as_json: bool,
    snapshot: str | None,
    **options: Any,
) -> None:
    """Create a sandbox of an image or a template, and print its name, or its id where it has none."""
    if (image is None) == (snapshot is None):
        raise click.UsageError("name an image, or --from a snapshot")
    if snapshot is not None:
        _refuse_with_snapshot()
    variables, initial = dict(environment(env, env_file)), existing_file("--initrd", initrd)

    async def work(client: AsyncClient) -> Sandbox:
        from stoker.client.sandbox import AsyncSandbox

        with Following(quiet) as following:
            if image is None:
                taken = {name: options[name] for name in ("name", "hostname", "timeout", "idle_timeout", "cold")}
                labels = labels_of(label) if label else None
                box = await AsyncSandbox.from_snapshot(
                    str(snapshot), client=client, labels=labels, on_progress=following.step, **taken
                )
                return box.info
            box = await AsyncSandbox.create(
                absolute_image(image),
                client=client,
                kernel=absolute_kernel(kernel),
                env=variables,
                labels=labels_of(label),
                initrd=str(initial or ""),
                on_progress=following.step,
                **options,
            )
        return box.info

    info = with_client(work)
    if as_json:
        show_json(info)
    else:
        click.echo(info.name or info.id)


_OF_A_SNAPSHOT = ("snapshot", "name", "hostname", "label", "timeout", "idle_timeout", "cold", "quiet", "as_json", "image")


def _refuse_with_snapshot() -> None:
    """What a snapshot has already cannot be chosen."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is click.core.ParameterSource.COMMANDLINE
        if given and parameter.name not in _OF_A_SNAPSHOT:
            raise click.UsageError(f"{parameter.opts[-1]} cannot be chosen with --from: it is as in the snapshot")


def _limit(info: Sandbox) -> str:
    if info.expires_at is None:
        return "-"
    from stoker.api.units import format_duration

    return format_duration(max(0.0, info.expires_at - time.time()))


def _size(value: int) -> str:
    from stoker.api.units import format_size

    return format_size(value)


COLUMNS: tuple[Column[Sandbox], ...] = (
    Column("NAME", lambda s: s.name or "-"),
    Column("ID", lambda s: s.id, full=True),
    Column("STATE", lambda s: s.state.value, full=True),
    Column("IMAGE", lambda s: s.image),
    Column("CPUS", lambda s: str(s.resources.cpus), right=True),
    Column("MEMORY", lambda s: _size(s.resources.memory), right=True),
    Column("ADDRESS", lambda s: s.address or "-"),
    Column("AGE", lambda s: ago(s.created_at), right=True),
    Column("LEFT", _limit, right=True),
    Column("LABELS", lambda s: ",".join(f"{k}={v}" for k, v in sorted(s.labels.items()))),
)


@click.command()
@click.option("--state", "-s", type=click.Choice(STATES), multiple=True, help="Only those in this state.")
@click.option("--label", "-l", metavar="K[=V]", multiple=True, help="Only those with this label.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many.")
@click.option("--quiet", "-q", is_flag=True, help="Ids only.")
@json_option
def ls(*, state: tuple[str, ...], label: tuple[str, ...], limit: int | None, quiet: bool, as_json: bool) -> None:
    """List sandboxes, newest first."""
    labels = labels_of(label, bare=True)

    async def work(client: AsyncClient) -> list[Sandbox]:
        return await client.sandboxes(states=state, labels=labels, limit=limit)

    found = with_client(work)
    if as_json:
        show_json(found)
    elif quiet:
        click.echo("".join(f"{info.id}\n" for info in found), nl=False)
    else:
        show(COLUMNS, found, empty="no sandboxes; make one: stoker create debian:12")


@click.command()
@click.argument("sandboxes", nargs=-1, required=True, type=SANDBOX)
def inspect(*, sandboxes: tuple[str, ...]) -> int:
    """Print all that is known of sandboxes, as a JSON array."""
    found: list[Sandbox] = []

    async def work(client: AsyncClient) -> int:
        from stoker.client.sandbox import AsyncSandbox

        async def one(name: str) -> None:
            found.append((await AsyncSandbox.connect(name, client=client)).info)

        return await each(sandboxes, one)

    code = with_client(work)
    order = {name: i for i, name in enumerate(sandboxes)}
    found.sort(key=lambda info: order.get(info.name or "", order.get(info.id, 0)))
    show_json(found)
    return code


def _on_each(
    sandboxes: tuple[str, ...], act: Callable[[AsyncSandbox], Awaitable[Any]], *, echo: bool = True, doing: str = ""
) -> int:
    async def work(client: AsyncClient) -> int:
        from stoker.client.sandbox import AsyncSandbox

        async def one(name: str) -> None:
            await act(await AsyncSandbox.connect(name, client=client))
            if echo:
                click.echo(name)

        return await each(sandboxes, one, doing=doing)

    return with_client(work)


@click.command()
@click.option("--force", "-f", is_flag=True, help="No error for what is not there.")
@click.option("--all", "-a", "everything", is_flag=True, help="All of yours.")
@click.option("--label", "-l", metavar="K[=V]", multiple=True, help="All with this label.")
@click.argument("sandboxes", nargs=-1, type=SANDBOX)
def rm(*, force: bool, everything: bool, label: tuple[str, ...], sandboxes: tuple[str, ...]) -> int:
    """Destroy sandboxes: the machines, their disks, everything."""
    from stoker.errors import NotFound

    if not (sandboxes or everything or label):
        raise click.UsageError("name sandboxes, or --label, or --all")

    async def work(client: AsyncClient) -> int:
        from stoker.client.sandbox import AsyncSandbox

        names = list(sandboxes)
        if everything or label:
            names += [box.id for box in await AsyncSandbox.list(labels=labels_of(label, bare=True), client=client)]

        async def one(name: str) -> None:
            try:
                if await (await AsyncSandbox.connect(name, client=client)).kill():
                    click.echo(name)
            except NotFound:
                if not force:
                    raise

        return await each(names, one, doing="destroying")

    return with_client(work)


@click.command()
@click.option("--grace", "-g", type=DURATION, default="10s", show_default=True, help="Time its processes get to end.")
@click.argument("sandboxes", nargs=-1, required=True, type=SANDBOX)
def stop(*, grace: float, sandboxes: tuple[str, ...]) -> int:
    """Shut sandboxes down; their disks stay."""
    return _on_each(sandboxes, lambda box: box.stop(grace=grace), doing="shutting down")


@click.command()
@quiet_option
@click.argument("sandboxes", nargs=-1, required=True, type=SANDBOX)
def start(*, quiet: bool, sandboxes: tuple[str, ...]) -> int:
    """Boot stopped sandboxes again."""
    with Following(quiet) as following:
        return _on_each(sandboxes, lambda box: box.start(on_progress=following.step))


@click.command()
@click.option("--disk", type=SIZE, required=True, help="The new size, such as 20G.")
@click.argument("sandboxes", nargs=-1, required=True, type=SANDBOX)
def resize(*, sandboxes: tuple[str, ...], disk: int) -> int:
    """Give sandboxes a larger disk. The file system of a running one grows with it."""
    return _on_each(sandboxes, lambda box: box.resize(disk=disk), doing="resizing")


@click.command()
@click.argument("sandboxes", nargs=-1, required=True, type=SANDBOX)
def freeze(*, sandboxes: tuple[str, ...]) -> int:
    """Stop the CPUs of sandboxes; their memory stays."""
    return _on_each(sandboxes, lambda box: box.freeze(), doing="freezing")


@click.command()
@click.argument("sandboxes", nargs=-1, required=True, type=SANDBOX)
def thaw(*, sandboxes: tuple[str, ...]) -> int:
    """Let the CPUs of frozen sandboxes go on."""
    return _on_each(sandboxes, lambda box: box.thaw(), doing="thawing")


@click.command()
@click.argument("sandboxes", nargs=-1, required=True, type=SANDBOX)
def pause(*, sandboxes: tuple[str, ...]) -> int:
    """Put sandboxes away, memory and all; whatever uses one takes it up again."""
    return _on_each(sandboxes, lambda box: box.pause(), doing="pausing")


@click.command()
@click.argument("sandboxes", nargs=-1, required=True, type=SANDBOX)
def resume(*, sandboxes: tuple[str, ...]) -> int:
    """Take paused sandboxes up again where they were."""
    return _on_each(sandboxes, lambda box: box.resume(), doing="resuming")


@click.command()
@click.option("--count", "-n", type=click.IntRange(1, 100), default=1, show_default=True, help="How many.")
@click.option("--name", metavar="NAME", help="Their name; with several NAME-1, NAME-2...")
@click.option("--label", "-l", metavar="K=V", multiple=True, help="Labels of theirs, instead of the original's.")
@json_option
@click.argument("sandbox", type=SANDBOX)
def fork(*, count: int, name: str | None, label: tuple[str, ...], as_json: bool, sandbox: str) -> None:
    """Copy a running sandbox as it is: memory, disk, processes; print the copies' names."""

    async def work(client: AsyncClient) -> list[Sandbox]:
        from stoker.client.sandbox import AsyncSandbox

        box = await AsyncSandbox.connect(sandbox, client=client)
        copies = await box.fork(count, name=name, labels=labels_of(label) if label else None)
        return [copy.info for copy in copies]

    made = with_client(work)
    if as_json:
        show_json(made)
    else:
        click.echo("".join(f"{info.name or info.id}\n" for info in made), nl=False)


@click.command()
@click.option("--idle", is_flag=True, help="Count from its last use, not from now.")
@click.argument("sandbox", type=SANDBOX)
@click.argument("duration", metavar="DURATION|none")
def timeout(*, idle: bool, sandbox: str, duration: str) -> int:
    """Destroy a sandbox after so long (30m, 2h), with --idle pause it, or with 'none' leave it alone."""
    if duration == "none":
        return _on_each((sandbox,), lambda box: box.set_timeout(None), echo=False)
    seconds: Any = DURATION.convert(duration, None, click.get_current_context())
    if idle:
        return _on_each((sandbox,), lambda box: box.set_timeout(idle_timeout=seconds), echo=False)
    return _on_each((sandbox,), lambda box: box.set_timeout(seconds), echo=False)


@click.command()
@click.option("--state", "-s", type=click.Choice(STATES), multiple=True, help="Wait for this state.  [default: until it is gone]")
@click.option("--process", "-p", metavar="P", help="Wait for a process, by id or tag, and exit with its code.")
@click.option("--timeout", type=DURATION, metavar="T", help="Give up after so long, with exit code 124.")
@click.argument("sandbox", type=SANDBOX)
def wait(*, state: tuple[str, ...], process: str | None, timeout: float | None, sandbox: str) -> int:
    """Wait until a sandbox is in a state (or gone), or one of its processes has ended."""

    async def work(client: AsyncClient) -> int:
        from stoker.client.sandbox import AsyncSandbox

        box = await AsyncSandbox.connect(sandbox, client=client)
        if process is not None:
            return (await (await box.commands.connect(process)).wait(timeout=timeout)).exit_code
        info = await box.wait(*state, timeout=timeout)
        if state:
            click.echo(info.state.value)
        return 0

    return with_client(work)
