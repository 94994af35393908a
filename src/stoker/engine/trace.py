"""Named points in the ways of create and destroy, so that a test can end the process at every one of them.

``STOKER_TRACE_KILL=create.after_intent`` makes the process kill itself (SIGKILL) when it gets there; ``POINT:N`` on the N-th time.
Armed once, when an engine is opened; unarmed, a point costs one comparison. A point that is not in :data:`POINTS` is a defect.
"""

from __future__ import annotations

import os
import signal

from stoker.errors import InvalidRequest

__all__ = ["POINTS", "arm", "trace"]

CREATE = (
    "create.after_admit",
    "create.after_intent",
    "create.after_directory",
    "create.after_cgroup",
    "boot.after_clone",
    "boot.after_launch",
    "boot.after_hello",
    "boot.after_configure",
    "create.after_boot",
    "create.after_running",
)
DESTROY = (
    "destroy.before_mark",
    "destroy.after_mark",
    "destroy.after_process",
    "destroy.after_cgroup",
    "destroy.after_directory",
    "destroy.after_clone",
    "destroy.after_forget",
)
STOP = ("stop.after_mark", "stop.after_shutdown", "stop.after_process", "stop.after_stopped")
START = ("start.after_mark", "start.after_running")
POINTS = CREATE + DESTROY + STOP + START

_armed = ""
_countdown = 0


def arm(where: str) -> None:
    """Makes ``where`` (``POINT`` or ``POINT:N``) deadly; "" disarms."""
    global _armed, _countdown
    point, _, count = where.partition(":")
    if point and point not in POINTS:
        raise InvalidRequest("bad_trace_point", f"there is no trace point {point!r}", "points: " + ", ".join(POINTS))
    _armed, _countdown = point, int(count or 1)


def trace(point: str) -> None:
    """The process is at ``point`` now."""
    global _countdown
    if point == _armed:
        _countdown -= 1
        if _countdown <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
