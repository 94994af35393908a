"""``stoker image`` and ``stoker kernel``: what the store holds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import click

from stoker.cli.remote import each, json_option, with_client
from stoker.cli.table import Column, ago, show, show_json

if TYPE_CHECKING:
    from stoker.api.models import Image, Kernel
    from stoker.client.client import AsyncClient

__all__ = ["image", "kernel"]

T = TypeVar("T")
SHORT = 12


def _size(value: int) -> str:
    from stoker.api.units import format_size

    return format_size(value)


def _names(entry: Image | Kernel) -> str:
    return ", ".join(entry.names) or "-"


def _reference(entry: Image | Kernel) -> str:
    return "(damaged)" if entry.damaged else entry.reference


def _used(entry: Image | Kernel) -> str:
    return ", ".join(entry.used_by) or "-"


IMAGES: tuple[Column[Image], ...] = (
    Column("DIGEST", lambda i: i.digest[:SHORT], full=True),
    Column("IMAGE", _reference),
    Column("NAMES", _names),
    Column("SIZE", lambda i: _size(i.size), right=True),
    Column("ON DISK", lambda i: _size(i.disk), right=True),
    Column("AGE", lambda i: ago(i.created_at), right=True),
    Column("USED BY", _used),
)
KERNELS: tuple[Column[Kernel], ...] = (
    Column("DIGEST", lambda k: k.digest[:SHORT], full=True),
    Column("KERNEL", _reference),
    Column("RELEASE", lambda k: k.release or "-"),
    Column("NAMES", _names),
    Column("ON DISK", lambda k: _size(k.disk), right=True),
    Column("AGE", lambda k: ago(k.created_at), right=True),
    Column("USED BY", _used),
)


async def _all(references: tuple[str, ...], ask: Callable[[str], Awaitable[T]]) -> tuple[list[T], int]:
    """Every one that there is, and the exit code."""
    found: list[T] = []

    async def one(reference: str) -> None:
        found.append(await ask(reference))

    return found, await each(references, one)


@click.group()
def image() -> None:
    """List, look at and remove the images in the store."""


@image.command("ls")
@json_option
def list_images(*, as_json: bool) -> None:
    """List images, the newest first. SIZE is the guest's view; ON DISK is what it takes on this host."""

    async def work(client: AsyncClient) -> list[Image]:
        return await client.images()

    found = with_client(work)
    if as_json:
        show_json(found)
    else:
        show(IMAGES, found, empty="no images; the first create fetches one")


@image.command("inspect")
@click.argument("images", nargs=-1, required=True)
def inspect_images(*, images: tuple[str, ...]) -> int:
    """Print all that is known of images: named (debian:12), or by digest."""

    async def work(client: AsyncClient) -> tuple[list[Image], int]:
        return await _all(images, client.image)

    found, code = with_client(work)
    show_json(found)
    return code


@image.command("rm")
@click.argument("images", nargs=-1, required=True)
def remove_images(*, images: tuple[str, ...]) -> int:
    """Remove images. One that a sandbox uses is refused."""

    async def work(client: AsyncClient) -> int:
        return await each(images, client.remove_image, doing="removing images")

    return with_client(work)


@click.group()
def kernel() -> None:
    """List, look at and remove the kernels in the store."""


@kernel.command("ls")
@json_option
def list_kernels(*, as_json: bool) -> None:
    """List kernels, the newest first. ON DISK is what one takes with its modules."""

    async def work(client: AsyncClient) -> list[Kernel]:
        return await client.kernels()

    found = with_client(work)
    if as_json:
        show_json(found)
    else:
        show(KERNELS, found, empty="no kernels; the first create fetches one")


@kernel.command("inspect")
@click.argument("kernels", nargs=-1, required=True)
def inspect_kernels(*, kernels: tuple[str, ...]) -> int:
    """Print all that is known of kernels: named (debian:12), or by digest."""

    async def work(client: AsyncClient) -> tuple[list[Kernel], int]:
        return await _all(kernels, client.kernel)

    found, code = with_client(work)
    show_json(found)
    return code


@kernel.command("rm")
@click.argument("kernels", nargs=-1, required=True)
def remove_kernels(*, kernels: tuple[str, ...]) -> int:
    """Remove kernels. One that a sandbox uses is refused."""

    async def work(client: AsyncClient) -> int:
        return await each(kernels, client.remove_kernel, doing="removing kernels")

    return with_client(work)
