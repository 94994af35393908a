"""``-v NAME:/path[:ro]``: checked at once, completed by the shell, without what the word's own model takes to import."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from stoker.client.client import AsyncClient

__all__ = ["MOUNT", "VOLUME", "wire_mounts"]

SHAPE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63}):(/[^\0]+?)(?::(ro|rw))?")


def _names(incomplete: str) -> list[tuple[str, str]]:
    """Volumes that begin so. No daemon, or a slow one: nothing."""
    from stoker.api.units import format_size
    from stoker.cli.remote import COMPLETION_TIMEOUT, with_client
    from stoker.errors import StokerError

    async def ask(client: AsyncClient) -> list[tuple[str, str]]:
        async with asyncio.timeout(COMPLETION_TIMEOUT):
            return [(one.name, format_size(one.size)) for one in await client.volumes.list()]

    try:
        return [(name, text) for name, text in with_client(ask, start=False) if name.startswith(incomplete)]
    except (StokerError, TimeoutError):
        return []


class _Volume(click.ParamType[str]):
    """A volume by name or id."""

    name = "volume"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(name, help=text) for name, text in _names(incomplete)]


class _Mount(click.ParamType[str]):
    """A volume and its place in the guest."""

    name = "mount"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if SHAPE.fullmatch(value) is None:
            self.fail(f"{value!r} is not NAME:/path or NAME:/path:ro", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [] if ":" in incomplete else [CompletionItem(f"{name}:/", help=text) for name, text in _names(incomplete)]


VOLUME = _Volume()
MOUNT = _Mount()


def wire_mounts(mounts: Sequence[str]) -> dict[str, Any]:
    """The same as the API has it; nothing for none."""
    found = [SHAPE.fullmatch(mount) for mount in mounts]
    volumes = [{"name": m[1], "path": m[2], "read_only": m[3] == "ro"} for m in found if m is not None]
    return {"volumes": volumes} if volumes else {}
