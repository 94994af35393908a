"""Scheduling of the calling thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["urgent"]


@contextmanager
def urgent() -> Iterator[None]:
    """For some milliseconds of work that others begin to work upon while it is not done: making a block device wakes udev three
    times, which would take the processor each time. The thread runs before all ordinary ones meanwhile, where that is allowed
    (it takes CAP_SYS_NICE, and a control group with time for such threads); what it starts does not."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    if before[0] != os.SCHED_OTHER:
        yield
        return
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
    try:
        yield
    finally:
        with suppress(PermissionError):
            os.sched_setscheduler(0, *before)
