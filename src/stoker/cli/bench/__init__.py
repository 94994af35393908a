"""``stoker bench``: every figure that the README and the documents give is printed by one of these."""

from __future__ import annotations

from stoker.cli.commands import LazyGroup

__all__ = ["bench"]

bench = LazyGroup(
    "bench",
    table={
        "start": ("stoker.cli.bench.start:start", "From the start of `stoker run` to its command's first byte."),
        "channel": ("stoker.cli.bench.channel:channel", "The channel to the guest: round trips, throughput, the agent's size."),
        "clone": ("stoker.cli.bench.clone:clone", "Disks by each strategy: to make, to use, to keep many of, to flatten."),
        "create": ("stoker.cli.bench.create:create", "Creates, one by one and many at once."),
        "restore": ("stoker.cli.bench.restore:restore", "Creates from golden memory, against cold ones."),
        "fork": ("stoker.cli.bench.memory:fork", "Copies of a running machine."),
        "pause": ("stoker.cli.bench.memory:pause", "Machines put away, and taken up again."),
        "density": ("stoker.cli.bench.density:density", "Many idle machines at once: the memory of each."),
        "api": ("stoker.cli.bench.api:api", "Lists, `stoker ls`, and the daemon at rest."),
        "proxy": ("stoker.cli.bench.proxy:proxy", "The reverse proxy: requests per second over kept connections."),
        "files": ("stoker.cli.bench.files:files", "A big file in and out, and small ones."),
        "network": ("stoker.cli.bench.network:network", "Network slots: made, used again, given back, and many at once."),
        "exec": ("stoker.cli.bench.exec:exec_bench", "A command in a running sandbox, against the agent's own work and SSH."),
    },
    help="Measure. With --json each verb prints one object: name, n, failures, p50_ms, p90_ms, p99_ms, ratios and more.",
    no_args_is_help=True,
)
