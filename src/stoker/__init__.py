"""Stoker: microVMs for Linux people. ``Sandbox`` is the front door.

::

    from stoker import Sandbox

    with Sandbox.create("debian:12", memory="512M") as box:
        print(box.commands.run("uname -r").stdout)

``AsyncSandbox`` is the same for asyncio. Names are imported when they are first used: ``import stoker`` costs nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing for it would cost half of what `stoker --version` may take

if TYPE_CHECKING:
    from stoker.client.client import AsyncClient as AsyncClient
    from stoker.client.commands import AsyncCommands as AsyncCommands
    from stoker.client.commands import AsyncPty as AsyncPty
    from stoker.client.feed import AsyncFeed as AsyncFeed
    from stoker.client.files import AsyncFiles as AsyncFiles
    from stoker.client.process import AsyncProcess as AsyncProcess
    from stoker.client.results import CommandFailed as CommandFailed
    from stoker.client.results import CommandResult as CommandResult
    from stoker.client.results import CommandTimeout as CommandTimeout
    from stoker.client.results import Output as Output
    from stoker.client.sandbox import AsyncSandbox as AsyncSandbox
    from stoker.client.sync import Client as Client
    from stoker.client.sync import Commands as Commands
    from stoker.client.sync import Feed as Feed
    from stoker.client.sync import Files as Files
    from stoker.client.sync import Process as Process
    from stoker.client.sync import Pty as Pty
    from stoker.client.sync import Sandbox as Sandbox
    from stoker.client.sync import Template as Template
    from stoker.client.sync import Volumes as Volumes
    from stoker.client.templates import AsyncTemplate as AsyncTemplate
    from stoker.client.volumes import AsyncVolumes as AsyncVolumes
    from stoker.errors import CapacityExhausted as CapacityExhausted
    from stoker.errors import CommandNotExecutable as CommandNotExecutable
    from stoker.errors import CommandNotFound as CommandNotFound
    from stoker.errors import Conflict as Conflict
    from stoker.errors import DeadlineExceeded as DeadlineExceeded
    from stoker.errors import Forbidden as Forbidden
    from stoker.errors import GuestError as GuestError
    from stoker.errors import HostError as HostError
    from stoker.errors import InternalError as InternalError
    from stoker.errors import InvalidRequest as InvalidRequest
    from stoker.errors import NotFound as NotFound
    from stoker.errors import StokerError as StokerError
    from stoker.errors import TooLarge as TooLarge
    from stoker.errors import Unauthenticated as Unauthenticated

__version__ = "0.1.0"

_HOMES = {
    "stoker.client.client": ("AsyncClient",),
    "stoker.client.commands": ("AsyncCommands", "AsyncPty"),
    "stoker.client.feed": ("AsyncFeed",),
    "stoker.client.files": ("AsyncFiles",),
    "stoker.client.process": ("AsyncProcess",),
    "stoker.client.results": ("CommandFailed", "CommandResult", "CommandTimeout", "Output"),
    "stoker.client.sandbox": ("AsyncSandbox",),
    "stoker.client.sync": ("Client", "Commands", "Feed", "Files", "Process", "Pty", "Sandbox", "Template", "Volumes"),
    "stoker.client.templates": ("AsyncTemplate",),
    "stoker.client.volumes": ("AsyncVolumes",),
    "stoker.errors": (
        "CapacityExhausted",
        "CommandNotExecutable",
        "CommandNotFound",
        "Conflict",
        "DeadlineExceeded",
        "Forbidden",
        "GuestError",
        "HostError",
        "InternalError",
        "InvalidRequest",
        "NotFound",
        "StokerError",
        "TooLarge",
        "Unauthenticated",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'stoker' has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
