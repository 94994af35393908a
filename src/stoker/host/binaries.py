"""Where the programs are that Stoker brings along: the guest's agent, the VMM's supervisor, and what is loaded into the VMM.

The first two are static. All are built from ``agent/`` by the build hook (``hatch_build.py``) into ``stoker/_bin``, and are part of
the wheel.
"""

from __future__ import annotations

import os
from pathlib import Path

from stoker.errors import HostError

__all__ = ["agent_path", "shim_path", "zygote_path"]

DIRECTORY = Path(__file__).resolve().parent.parent / "_bin"


def _program(name: str) -> Path:
    path = DIRECTORY / name
    if not os.access(path, os.X_OK):
        raise HostError(
            "binary_missing",
            f"{name} is not part of this installation",
            "in a checkout: make -C agent; otherwise install a wheel built by `uv build`",
            details={"path": str(path)},
        )
    return path


def agent_path() -> Path:
    """The guest's agent, which becomes ``/init`` of the initramfs."""
    return _program("stoker-agent")


def shim_path() -> Path:
    """The supervisor that every VMM of ours runs under."""
    return _program("stoker-shim")


def zygote_path() -> Path:
    """What is preloaded into a VMM's program that many machines begin from."""
    return _program("stoker-zygote.so")
