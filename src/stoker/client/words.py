"""Words that a program passes as text, as what they mean."""

from __future__ import annotations

from stoker.api.models import InitMode, NetworkMode, Transport
from stoker.errors import InvalidRequest

__all__ = ["init_mode", "network_mode", "transport"]


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


def transport(protocol: str) -> Transport:
    """``bad_target`` (InvalidRequest) for anything but ``tcp`` and ``udp``."""
    try:
        return Transport(protocol)
    except ValueError:
        raise InvalidRequest("bad_target", f"there are no ports of {protocol!r}", "tcp or udp") from None
