"""Templates on the wire: names that sandboxes are created from, with everything that was set up and started in them."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta, field

from stoker.api.sandboxes import Resources
from stoker.api.types import (
    END,
    KIB,
    Cpus,
    DiskSize,
    Environment,
    GuestUser,
    ImageReference,
    KernelReference,
    MemorySize,
    Model,
    Name,
    NetworkMode,
    OperationId,
    UnixTime,
)

__all__ = ["BuildTemplate", "OperationLog", "Script", "Template", "TemplateId", "TemplateList"]

TemplateId: TypeAlias = Annotated[
    str, Meta(pattern=r"^tp-[a-z2-7]{20}" + END, description="A template: `tp-` and 20 base32 characters.")
]
Script: TypeAlias = Annotated[
    str, Meta(min_length=1, max_length=64 * KIB, pattern=r"^[^\x00]+" + END, description="For `/bin/sh -c`.")
]
TemplateSeconds: TypeAlias = Annotated[float, Meta(gt=0.0, le=86400.0)]


class BuildTemplate(Model, frozen=True):
    """What a template is made from: an ``image`` (or another template) and what is done in a machine of it; or a snapshot or a
    sandbox (``from``) as it is.

    The machine is created as any sandbox; each step of ``setup`` runs in it, then ``start`` in the background, and once ``ready``
    ends with 0 its memory and disk are the template. A template of this name is replaced once the new one is whole.
    """

    name: Name
    image: ImageReference | None = None
    source: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*" + END)] | None = field(
        name="from", default=None
    )
    """A snapshot's name or id, or a sandbox's: it goes on as it was."""
    setup: Annotated[list[Script], Meta(max_length=128)] = field(default_factory=list)
    setup_user: GuestUser = "root"
    start: Script | None = None
    """Runs as the process ``start``, and in every sandbox of the template goes on. Its standard input stays open."""
    ready: Script | None = None
    env: Environment = field(default_factory=dict)
    """Over the image's; of the steps and of every sandbox. ``workdir`` likewise; ``user`` is not the steps' (``setup_user``)."""
    user: GuestUser | None = None
    workdir: Annotated[str, Meta(max_length=4096, pattern=r"^/[^\x00]*" + END)] | None = None
    """Made where there is none."""
    kernel: KernelReference = ""
    cpus: Cpus | None = None
    memory: MemorySize | None = None
    disk: DiskSize = 0
    network: NetworkMode | None = None
    disk_only: bool = False
    """Without memory: its sandboxes boot, and ``start`` and ``ready`` are run in each."""
    step_timeout: TemplateSeconds = 1800.0
    ready_timeout: TemplateSeconds = 120.0


class Template(Model, frozen=True):
    """One template. ``own`` bytes are freed with it, ``shared`` ones belong to its sandboxes, too."""

    id: TemplateId
    name: str
    created_at: UnixTime
    owner: str = ""
    image: str = ""
    image_digest: str = ""
    kernel: str = ""
    made_from: str = ""
    """The image, template, snapshot or sandbox."""
    memory: bool = True
    resources: Resources = field(default_factory=Resources)
    network: NetworkMode = NetworkMode.USER
    env: dict[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = ""
    setup: list[str] = field(default_factory=list)
    start: str = ""
    ready: str = ""
    unusable: str = ""
    """Why its memory cannot be used on this host, where that was found: sandboxes boot from its disk then."""
    own: int = 0
    shared: int = 0
    operation: OperationId | None = None
    steps: dict[str, float] = field(default_factory=dict)
    """Milliseconds that the parts of making it took."""
    log: list[str] = field(default_factory=list)
    """The end of what its build said. Not in lists."""


class TemplateList(Model, frozen=True):
    """Templates, newest first."""

    items: list[Template]


class OperationLog(Model, frozen=True):
    """Lines that an operation said. ``next`` is the number of the line after them; those before ``oldest`` are gone."""

    lines: list[str]
    next: int
    oldest: int = 0
