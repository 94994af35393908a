"""Words that a program passes as text, as what they mean."""

from __future__ import annotations

from stoker.api.models import InitMode, NetworkMode
from stoker.errors import InvalidRequest

__all__ = ["init_mode", "network_mode"]


def network_mode(mode: str) -> NetworkMode:
    """``bad_network`` (InvalidRequest) for anything but a mode's name."""
    try:
        return NetworkMode(mode)
    except ValueError:
        raise InvalidRequest("bad_network", f"there is no network mode {mode!r}", "none, user or nat") from None


def init_mode(mode: str) -> InitMode:
    """``bad_init`` (InvalidRequest) for anything but a mode's name."""
    try:
        return InitMode(mode)
    except ValueError:
        raise InvalidRequest("bad_init", f"process 1 cannot be {mode!r}", "agent or image") from None
