"""What a sandbox's words are as parts of a request."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stoker.api.models import SetNetwork, Timeout, TimeoutMode
from stoker.api.units import parse_duration, parse_size
from stoker.client.api import Api
from stoker.errors import InvalidRequest

if TYPE_CHECKING:
    from stoker.client.lease import Lease

__all__ = ["app_of", "hold", "network_change", "timeout_of"]


async def app_of(api: Api, source: str | os.PathLike[str]) -> str:
    """Uploads an app; its digest."""
    from stoker.client.volumes import upload_app

    return await upload_app(api, source)


async def hold(api: Api, sandbox: str) -> Lease:
    from stoker.client.lease import Lease

    return await Lease.hold(api, sandbox)


def timeout_of(absolute: float | str | None, idle: float | str | None) -> Timeout | None:
    """Raises ``two_timeouts`` (InvalidRequest)."""
    if absolute is not None and idle is not None:
        raise InvalidRequest("two_timeouts", "a sandbox has one timeout, absolute or idle", "leave out timeout or idle_timeout")
    given, mode = (absolute, TimeoutMode.ABSOLUTE) if idle is None else (idle, TimeoutMode.IDLE)
    return None if given is None else Timeout(seconds=parse_duration(given), mode=mode)


def network_change(
    egress: str | None,
    publish: Sequence[str] | None,
    host_access: bool | None,
    learn: bool | None,
    rate_in: str | int | None,
    rate_out: str | int | None,
    connections: int | None,
) -> SetNetwork:
    """None leaves what it is. Rates are bytes a second, or such as ``10M``."""
    return SetNetwork(
        egress=egress,
        publish=None if publish is None else list(publish),
        host_access=host_access,
        learn=learn,
        rate_in=None if rate_in is None else parse_size(rate_in),
        rate_out=None if rate_out is None else parse_size(rate_out),
        connections=connections,
    )
