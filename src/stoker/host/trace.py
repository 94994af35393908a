"""Named points in the program's ways, so that a test can end the process at every one of them.

A module names its points when it is imported; :func:`arm` makes one deadly (``POINT``, or ``POINT:N`` for the N-th time): there the
process kills itself (SIGKILL). Unarmed, a point costs one comparison. A point that nobody named is a defect.
"""

from __future__ import annotations

import os
import signal

from stoker.errors import InvalidRequest

__all__ = ["arm", "declare", "trace"]

_points: dict[str, None] = {}
_armed = ""
_countdown = 0


def declare(*points: str) -> tuple[str, ...]:
    """Names points; gives them back."""
    _points.update(dict.fromkeys(points))
    return points


def arm(where: str) -> None:
    """Makes ``where`` deadly; "" disarms."""
    global _armed, _countdown
    point, _, count = where.partition(":")
    if point and point not in _points:
        raise InvalidRequest("bad_trace_point", f"there is no trace point {point!r}", "points: " + ", ".join(_points))
    _armed, _countdown = point, int(count or 1)


def trace(point: str) -> None:
    """The process is at ``point`` now."""
    global _countdown
    if point == _armed:
        _countdown -= 1
        if _countdown <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
