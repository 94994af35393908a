"""What the host's own network has to be like for machines with an interface on it: looked at, mended, undone.

What was changed is written to ``DATA_DIR/network-undo.json``; what lasts over a restart of the host, to :data:`SYSCTL`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stoker.engine.network_words import range_of, ranges
from stoker.errors import Forbidden, HostError
from stoker.host.durable import write_atomically
from stoker.network import host
from stoker.network.host import Finding
from stoker.network.plan import RunPlan, Taken, first_guess, plan_run

if TYPE_CHECKING:
    from stoker.settings import Settings

__all__ = ["SYSCTL", "findings", "fix", "plan", "unfix"]

SYSCTL: Final = Path("/etc/sysctl.d/90-stoker.conf")


def _record(settings: Settings) -> Path:
    return settings.data_dir / "network-undo.json"


def plan(settings: Settings, run_id: str, names: Sequence[str], address_range: str | None = None) -> list[RunPlan]:
    """What machines of a run would get now. Raises ``range_unknown``, ``name_twice`` (InvalidRequest), ``slots_exhausted``."""
    from stoker.host.netlink import Netlink

    within = range_of(ranges(settings), address_range)
    # What of the run is up already has what is asked for.
    own = {first_guess(run_id, name)[0] for name in names}
    with Netlink() as link:
        taken = Taken({one.name for one in link.links()} - own, [one.network for one in host.foreign_networks(link, own)])
    return list(plan_run(run_id, names, taken, within).values())


def findings(settings: Settings, *, ipv6: bool = False) -> list[Finding]:
    """Everything that was looked at, good and bad; ``ipv6``: also what machines with IPv6 need."""
    if os.geteuid() != 0:
        raise Forbidden("root_needed", "the host's firewall is root's to look at", "sudo stoker network check")
    from stoker.host.netlink import Netlink

    with Netlink() as link:
        ours = [one.name for one in link.links() if one.name.startswith(("stk", "tap"))]
        foreign = host.foreign_networks(link, ours)
    return host.judge(host.observe(foreign), list(ranges(settings).values()), ipv6=ipv6)


def fix(settings: Settings, found: Sequence[Finding]) -> list[str]:
    """Applies every mend there is; what was done, in words."""
    mends = [mend for one in found if not one.ok for mend in one.mends]
    if not mends:
        return []
    record = _record(settings)
    before: list[dict[str, Any]] = json.loads(record.read_bytes()) if record.exists() else []
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    done = [*before, *host.mend(mends)]
    write_atomically(record, json.dumps(done).encode(), 0o600)
    try:
        write_atomically(SYSCTL, host.sysctl_file(done).encode(), 0o644)
    except OSError as error:
        raise HostError(
            "setting_refused", f"{SYSCTL}: {error.strerror}", "what was set holds until the host is restarted"
        ) from None
    return [str(mend) for mend in mends]


def unfix(settings: Settings) -> int:
    """Takes back what :func:`fix` ever did; how many steps."""
    record = _record(settings)
    steps: list[dict[str, Any]] = json.loads(record.read_bytes()) if record.exists() else []
    host.undo(steps)
    SYSCTL.unlink(missing_ok=True)
    record.unlink(missing_ok=True)
    return len(steps)
