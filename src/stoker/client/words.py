"""Words that a program passes as text, as what they mean."""

from __future__ import annotations

from stoker.api.models import InitMode, NetworkMode, Transport
from stoker.errors import InvalidRequest

__all__ = ["bridge_name", "init_mode", "network_mode", "transport"]


def network_mode(mode: str) -> NetworkMode:
    """Of ``none``, ``user``, ``nat`` and ``bridge:NAME``. ``bad_network`` (InvalidRequest) for anything else."""
    try:
        return NetworkMode(mode.partition(":")[0])
    except ValueError:
        hint = "none, user, nat or bridge:NAME"
        raise InvalidRequest("bad_network", f"there is no network mode {mode!r}", hint) from None


def bridge_name(mode: str | None) -> str | None:
    """That of ``bridge:NAME``."""
    return mode.partition(":")[2] if mode is not None and mode.startswith("bridge:") else None


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
