"""What an engine has, in figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from stoker.host.process import boot_id

if TYPE_CHECKING:
    from stoker.engine.core import Core

__all__ = ["facts"]


def facts(core: Core) -> Mapping[str, object]:
    """Counts by state, what is held and what there is."""
    states: dict[str, int] = {}
    seen = [box for box in core.boxes.values() if not box.record.warm]
    for box in seen:
        states[box.record.state.value] = states.get(box.record.state.value, 0) + 1
    held, budget = core.admission.totals(), core.admission.budget()
    return {
        "sandboxes": sum(box.live is not None or box.work is not None for box in seen),
        "states": states,
        "boot_id": boot_id(),
        "held": {"sandboxes": held.sandboxes, "memory": held.memory, "cpus": held.cpus, "disk": held.disk},
        "budget": {"sandboxes": budget.sandboxes, "memory": budget.memory, "cpus": budget.cpus, "disk": budget.disk},
    }
