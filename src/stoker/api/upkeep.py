"""Looking after a host on the wire: what differs between the books and the host, and what a clean-up freed."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from stoker.api.types import ByteCount, Model

__all__ = ["Difference", "Freed", "Fsck", "FsckReport", "Gc", "GcReport"]


class Fsck(Model, frozen=True):
    """A check to be. ``repair``: what differs is mended."""

    repair: Annotated[bool, Meta(description="Mend what differs.")] = False


class Difference(Model, frozen=True):
    """One thing that is not as the books have it.

    ``kind`` is the ledger's word (``process``, ``directory``, ``clone``, ``cgroup``...) or that of a part of the data directory
    (``sandbox``, ``staging``, ``image-name``, ``admission``, ``database``...); ``name`` is exact. ``sandbox`` is its owner, as far
    as that is known. ``repair`` says what mends it; empty: nothing does by itself. ``error``: why mending failed.
    """

    kind: str
    name: str
    expected: str
    found: str
    sandbox: str | None = None
    repair: str = ""
    repaired: bool = False
    error: str = ""


class FsckReport(Model, frozen=True):
    """``clean``: nothing differs, or everything that did is mended. ``checked`` counts what was looked at, by kind; ``busy`` are
    the sandboxes that were not looked at because something was just being done to them."""

    clean: bool
    repair: bool
    differences: list[Difference]
    checked: dict[str, int] = field(default_factory=dict)
    busy: list[str] = field(default_factory=list)


class Gc(Model, frozen=True):
    """A clean-up to be. ``dry_run``: only say what would go."""

    dry_run: Annotated[bool, Meta(description="Only say what would go.")] = False


class Freed(Model, frozen=True):
    """One thing that nothing refers to. ``bytes`` are the blocks it took; ``error``: why it is still there."""

    kind: str
    name: str
    why: str
    bytes: ByteCount
    error: str = ""


class GcReport(Model, frozen=True):
    """``freed`` is the sum of bytes (with ``dry_run``: what would be freed), ``by_kind`` its parts. ``skipped`` says what was left
    alone although it could be looked through, and why."""

    dry_run: bool
    items: list[Freed]
    freed: ByteCount = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
