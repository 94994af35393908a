"""``stoker warm``: machines that are up and wait for a create."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stoker.cli.options import SIZE, absolute_image, absolute_kernel
from stoker.cli.remote import json_option, with_client
from stoker.cli.table import Column, show, show_json

if TYPE_CHECKING:
    from stoker.api.models import WarmSet
    from stoker.client.client import AsyncClient

__all__ = ["warm"]


def _shape(one: WarmSet) -> str:
    from stoker.api.units import format_size

    wanted = one.sandbox
    words = [f"{wanted.cpus} CPU{'s' if wanted.cpus > 1 else ''}"] if wanted.cpus else []
    if wanted.memory:
        words.append(format_size(wanted.memory))
    if wanted.disk:
        words.append(f"disk {format_size(wanted.disk)}")
    words += [wanted.kernel] if wanted.kernel else []
    if wanted.network is not None:
        words.append(f"network {wanted.network.value}")
    return ", ".join(words) or "-"


def _state(one: WarmSet) -> str:
    if one.problem is not None:
        return one.problem.message
    return "making one" if one.making else "-"


COLUMNS: tuple[Column[WarmSet], ...] = (
    Column("IMAGE", lambda w: w.sandbox.image, full=True),
    Column("SHAPE", _shape, full=True),
    Column("READY", lambda w: f"{w.ready}/{w.size}", right=True),
    Column("TAKEN", lambda w: str(w.taken), right=True),
    Column("NOW", _state),
)


@click.command()
@click.option("--size", "-s", metavar="N", type=click.IntRange(0, 256), help="How many wait; 0: none any more.")
@click.option("--kernel", metavar="K", default="", help="As for create.")
@click.option("--cpus", metavar="N", type=click.IntRange(1, 256), help="Virtual CPUs.")
@click.option("--memory", "-m", type=SIZE, help="Memory.")
@click.option("--disk", type=SIZE, default=0, help="Size of the root file system.  [default: the image's own]")
@click.option("--network", type=click.Choice(["none", "user", "nat"]), help="The guest's network.")
@json_option
@click.argument("image", required=False)
def warm(
    *,
    size: int | None,
    kernel: str,
    cpus: int | None,
    memory: int | None,
    disk: int,
    network: str | None,
    as_json: bool,
    image: str | None,
) -> None:
    """Have machines of an image (or template) wait for creates that ask for the same; without an image, list what waits.

    A create (and a run) that asks for the same image, kernel, CPUs, memory, disk and network takes one over.
    They use memory and count as sandboxes; they end with the daemon, and are made again when it starts.
    """
    if (image is None) != (size is None):
        raise click.UsageError("name an image and a --size, or neither")

    async def work(client: AsyncClient) -> list[WarmSet]:
        if image is None or size is None:
            return await client.warm_sets()
        made = await client.keep_warm(
            absolute_image(image),
            size,
            kernel=absolute_kernel(kernel),
            cpus=cpus,
            memory=memory,
            disk=disk,
            network=network,
        )
        return [made]

    found = with_client(work)
    if as_json:
        show_json(found if image is None else found[0])
    elif image is None:
        show(COLUMNS, found, empty="no machines wait; have some: stoker warm IMAGE --size 4")
