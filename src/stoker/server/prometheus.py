"""Figures for Prometheus, from what the engine has in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import CollectorRegistry

import stoker
from stoker.api.models import Metrics, Principal, Sandbox, SandboxState
from stoker.server.ports import EngineProtocol

__all__ = ["CONTENT_TYPE", "render_metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_SANDBOXES = 10_000

_GAUGES = {
    "memory_host": ("stoker_sandbox_memory_host_bytes", "Resident memory of the VMM."),
    "memory_guest_used": ("stoker_sandbox_memory_guest_used_bytes", "Memory in use as the guest sees it."),
    "memory_guest_total": ("stoker_sandbox_memory_guest_total_bytes", "Memory of the guest."),
    "disk_host": ("stoker_sandbox_disk_host_bytes", "What the sandbox's files hold on the host."),
}
_COUNTERS = {
    "cpu_seconds": ("stoker_sandbox_cpu_seconds", "CPU time of the VMM."),
    "disk_read": ("stoker_sandbox_disk_read_bytes", "Read from disks."),
    "disk_written": ("stoker_sandbox_disk_written_bytes", "Written to disks."),
    "network_received": ("stoker_sandbox_network_received_bytes", "Received by the guest."),
    "network_sent": ("stoker_sandbox_network_sent_bytes", "Sent by the guest."),
}


async def _sandboxes(engine: EngineProtocol, who: Principal) -> list[Sandbox]:
    found: list[Sandbox] = []
    cursor: str | None = None
    while len(found) < MAX_SANDBOXES:
        page = await engine.list(who, labels={}, limit=1000, cursor=cursor)
        found += page.items
        cursor = page.next
        if cursor is None:
            break
    return found


class _Collected:
    """What one scrape says; the registry only renders it."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _of_host(sandboxes: list[Sandbox]) -> list[Metric]:
    info = GaugeMetricFamily("stoker_build_info", "The daemon's version.", labels=["version"])
    info.add_metric([stoker.__version__], 1)
    states = GaugeMetricFamily("stoker_sandboxes", "Sandboxes by state.", labels=["state"])
    counts = Counter(sandbox.state for sandbox in sandboxes)
    for state in SandboxState:
        states.add_metric([state.value], counts[state])
    cpus = GaugeMetricFamily("stoker_cpus_allocated", "Virtual CPUs of sandboxes that hold any.")
    memory = GaugeMetricFamily("stoker_memory_allocated_bytes", "Memory of sandboxes that hold any.")
    active = (SandboxState.CREATING, SandboxState.RUNNING, SandboxState.FROZEN, SandboxState.STOPPING)
    cpus.add_metric([], sum(s.resources.cpus for s in sandboxes if s.state in active))
    memory.add_metric([], sum(s.resources.memory for s in sandboxes if s.state in active))
    return [info, states, cpus, memory]


def _of_sandboxes(latest: dict[str, Metrics], names: dict[str, str]) -> list[Metric]:
    families: list[Metric] = []
    tables: tuple[tuple[dict[str, tuple[str, str]], type[GaugeMetricFamily] | type[CounterMetricFamily]], ...] = (
        (_GAUGES, GaugeMetricFamily),
        (_COUNTERS, CounterMetricFamily),
    )
    for table, kind in tables:
        for attribute, (name, text) in table.items():
            family = kind(name, text, labels=["sandbox", "name"])
            for sandbox, metrics in latest.items():
                value = getattr(metrics.samples[-1], attribute) if metrics.samples else None
                if value is not None:
                    family.add_metric([sandbox, names.get(sandbox, "")], value)
            families.append(family)
    return families


async def render_metrics(engine: EngineProtocol, who: Principal) -> bytes:
    sandboxes = await _sandboxes(engine, who)
    names = {sandbox.id: sandbox.name or "" for sandbox in sandboxes}
    latest = dict(await engine.latest_metrics(who))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(_of_host(sandboxes) + _of_sandboxes(latest, names)))
    return generate_latest(registry)
