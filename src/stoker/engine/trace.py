"""Named points in the ways of create and destroy, and of upkeep, so that a test can end the process at every one of them.

``STOKER_TRACE_KILL=create.after_intent`` makes the process kill itself (SIGKILL) when it gets there; ``POINT:N`` on the N-th time.
Armed once, when an engine is opened. The storage has points of its own (:mod:`stoker.storage.layout`).
"""

from __future__ import annotations

from stoker.host import trace as _points
from stoker.host.trace import declare, trace

__all__ = ["POINTS", "POOLS", "UPKEEP", "arm", "trace"]

CREATE = (
    "create.after_admit",
    "create.after_intent",
    "create.after_directory",
    "create.after_cgroup",
    "create.after_slot",
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
    "destroy.after_unit",
    "destroy.after_cgroup",
    "destroy.after_directory",
    "destroy.after_device",
    "destroy.after_loop",
    "destroy.after_clone",
    "destroy.after_forget",
)
STOP = ("stop.after_mark", "stop.after_shutdown", "stop.after_process", "stop.after_stopped")
START = ("start.after_mark", "start.after_running")
PAUSE = (
    "pause.after_mark",
    "pause.after_stop",
    "pause.after_saved",
    "pause.after_process",
    "pause.after_disk",
    "pause.after_paused",
)
RESUME = (
    "resume.after_mark",
    "resume.after_directory",
    "resume.after_launch",
    "resume.after_restore",
    "resume.after_woken",
    "resume.after_thaw",
    "resume.after_hello",
    "resume.after_running",
    "resume.after_saved_gone",
)
FORK = ("fork.after_mark", "fork.after_layer", "fork.after_taken", "fork.after_all")
SNAPSHOT = (
    "snapshot.after_mark",
    "snapshot.after_layer",
    "snapshot.after_taken",
    "snapshot.after_disk",
    "snapshot.after_saved",
    "snapshot.after_ready",
    "snapshot.after_unmark",
    "snapshot.after_gone",
)
TEMPLATE = (
    "template.after_machine",
    "template.after_setup",
    "template.after_start",
    "template.after_snapshot",
    "template.after_row",
    "template.after_replaced",
    "template.after_unmark",
    "template.after_unusable",
    "template.after_again",
)
IMPORT = (
    "import.after_mark",
    "import.after_unpacked",
    "import.after_image",
    "import.after_disk",
    "import.after_ready",
)
POINTS = declare(*CREATE, *DESTROY, *STOP, *START)
MEMORY = declare(*PAUSE, *RESUME, *FORK, *SNAPSHOT, *TEMPLATE, *IMPORT)
"""Only where machines have memory: real ones."""
UNIT = declare("unit.after_enter")
"""Only where machines are units of systemd's."""
WARM = declare("warm.after_intent", "warm.after_frozen", "warm.after_thaw")
VOLUMES = declare(
    "volume.after_intent",
    "volume.after_made",
    "helper.after_boot",
    "volume.after_unpacked",
    "volume.after_row",
    "volume.after_row_gone",
    "volume.after_grown",
)
NETWORK = declare("slot.after_intent")
"""Beside those of slots themselves (:mod:`stoker.network.slot`)."""
POOLS = declare("pool.after_unmount", "pool.after_unlink")
UPKEEP = declare(
    "gc.before_item",
    "gc.after_item",
    "fsck.before_repair",
    "fsck.after_repair",
)


def arm(where: str) -> None:
    """Makes ``where`` deadly, a slot's own points among them; "" disarms. Raises ``bad_trace_point`` (InvalidRequest)."""
    if where:
        import stoker.network.slot  # noqa: F401 (it names its points)
    _points.arm(where)
