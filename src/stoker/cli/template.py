"""``stoker template``: names that sandboxes are created from."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from stoker.cli.options import DURATION, SIZE, absolute_image, absolute_kernel, environment
from stoker.cli.remote import each, json_option, with_client
from stoker.cli.table import Column, ago, clean, show, show_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from stoker.api.models import Template
    from stoker.client.client import AsyncClient
    from stoker.client.templates import AsyncTemplate

__all__ = ["template"]


def _size(value: int) -> str:
    from stoker.api.units import format_size

    return format_size(value)


COLUMNS: tuple[Column[Template], ...] = (
    Column("NAME", lambda t: t.name),
    Column("ID", lambda t: t.id, full=True),
    Column("IMAGE", lambda t: t.image),
    Column("KIND", lambda t: "disk" if not t.memory else "memory" if not t.unusable else "memory (unusable)"),
    Column("CPUS", lambda t: str(t.resources.cpus), right=True),
    Column("MEMORY", lambda t: _size(t.resources.memory), right=True),
    Column("OWN", lambda t: _size(t.own), right=True),
    Column("SHARED", lambda t: _size(t.shared), right=True),
    Column("AGE", lambda t: ago(t.created_at), right=True),
    Column("START", lambda t: t.start),
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No log.")


def _defaults(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the template's sandboxes have, however it is made."""
    options = (
        click.option("--start", metavar="COMMAND", help="Runs in every sandbox of it, as the process 'start'."),
        click.option("--ready", metavar="COMMAND", help="Ends with 0 once the start command is ready."),
        click.option("--env", "-e", metavar="K=V", multiple=True, help="Set a variable; K alone passes yours on."),
        click.option("--env-file", metavar="F", multiple=True, help="Read variables from a file, one K=V a line."),
        click.option("--workdir", "-w", metavar="D", help="Default directory.  [default: the image's own]"),
        click.option("--user", "-u", metavar="U", help="Default user.  [default: the image's own]"),
        click.option("--disk-only", is_flag=True, help="Leave memory and processes out: its sandboxes boot."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.group()
def template() -> None:
    """Names that sandboxes are created from, with everything set up and started: stoker create NAME."""


def _line(text: str) -> None:
    sys.stderr.write(f"{clean(text)}\n")
    sys.stderr.flush()


def _print(work: Callable[[AsyncClient], Any], as_json: bool) -> None:
    made: AsyncTemplate = with_client(work)
    if as_json:
        show_json(made.info)
    else:
        click.echo(made.name)


@template.command("build")
@click.option("--setup", "-s", metavar="COMMAND", multiple=True, help="A step, by /bin/sh -c as root; may be given several times.")
@click.option("--setup-user", metavar="U", default="root", show_default=True, help="Who does the steps.")
@_defaults
@click.option("--kernel", metavar="K", default="", help="debian:SUITE, a vmlinux or bzImage, or a digest.  [default: debian:12]")
@click.option("--cpus", metavar="N", type=click.IntRange(1, 256), help="Virtual CPUs.  [default: 1]")
@click.option("--memory", "-m", type=SIZE, help="Memory, such as 512M or 2G.  [default: 512M]")
@click.option("--disk", type=SIZE, default=0, help="Size of the root file system.  [default: the image's own]")
@click.option("--network", type=click.Choice(["none", "user", "nat"]), help="The guest's network.  [default: user]")
@click.option("--step-timeout", type=DURATION, default="30m", show_default=True, help="Each step must have ended by then.")
@click.option("--ready-timeout", type=DURATION, default="2m", show_default=True, help="It must be ready by then.")
@quiet_option
@json_option
@click.argument("name")
@click.argument("image")
def build(
    *,
    name: str,
    image: str,
    env: tuple[str, ...],
    env_file: tuple[str, ...],
    kernel: str,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a template of an image: run steps in a machine of it, start a command, keep memory and disk.

    A template of this name is replaced once the new one is whole. IMAGE may be another template.
    """
    variables = dict(environment(env, env_file))

    async def work(client: AsyncClient) -> AsyncTemplate:
        from stoker.client.templates import AsyncTemplate

        return await AsyncTemplate.build(
            name,
            image=absolute_image(image),
            kernel=absolute_kernel(kernel),
            env=variables,
            on_log=None if quiet else _line,
            client=client,
            **options,
        )

    _print(work, as_json)


@template.command("create")
@_defaults
@quiet_option
@json_option
@click.argument("name")
@click.argument("source", metavar="SNAPSHOT|SANDBOX")
def create(
    *, name: str, source: str, env: tuple[str, ...], env_file: tuple[str, ...], quiet: bool, as_json: bool, **options: Any
) -> None:
    """Make a template of a snapshot, or of a sandbox as it is now, which goes on."""
    variables = dict(environment(env, env_file))

    async def work(client: AsyncClient) -> AsyncTemplate:
        from stoker.client.templates import AsyncTemplate

        on_log = None if quiet else _line
        return await AsyncTemplate.create(name, source, env=variables, on_log=on_log, client=client, **options)

    _print(work, as_json)


@template.command("ls")
@click.option("--quiet", "-q", is_flag=True, help="Names only.")
@json_option
def ls(*, quiet: bool, as_json: bool) -> None:
    """List templates, newest first."""

    async def work(client: AsyncClient) -> list[Template]:
        from stoker.client.templates import AsyncTemplate

        return await AsyncTemplate.list(client=client)

    found = with_client(work)
    if as_json:
        show_json(found)
    elif quiet:
        click.echo("".join(f"{one.name}\n" for one in found), nl=False)
    else:
        show(COLUMNS, found, empty="no templates; make one: stoker template build NAME debian:12 --setup COMMAND")


@template.command("inspect")
@click.argument("templates", nargs=-1, required=True)
def inspect(*, templates: tuple[str, ...]) -> int:
    """Print all that is known of templates, the end of their builds' logs too, as a JSON array."""
    found: dict[str, Template] = {}

    async def work(client: AsyncClient) -> int:
        from stoker.client.templates import AsyncTemplate

        async def one(name: str) -> None:
            found[name] = (await AsyncTemplate.get(name, client=client)).info

        return await each(templates, one)

    code = with_client(work)
    show_json([found[name] for name in dict.fromkeys(templates) if name in found])
    return code


@template.command("rm")
@click.option("--force", "-f", is_flag=True, help="No error for what is not there.")
@click.argument("templates", nargs=-1, required=True)
def rm(*, force: bool, templates: tuple[str, ...]) -> int:
    """Remove templates. Sandboxes that were made from them stay."""
    from stoker.errors import NotFound

    async def work(client: AsyncClient) -> int:
        from stoker.client.templates import AsyncTemplate

        async def one(name: str) -> None:
            try:
                await (await AsyncTemplate.get(name, client=client)).remove()
                click.echo(name)
            except NotFound:
                if not force:
                    raise

        return await each(templates, one)

    return with_client(work)
