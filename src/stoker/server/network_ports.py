"""What the server needs of an engine for the networks of sandboxes; a part of :mod:`stoker.server.ports`."""

from __future__ import annotations

from typing import Protocol

from stoker.api.models import ExplainNetwork, Explanation, LearnedNetwork, NetworkStatus, Principal, Sandbox, SetNetwork

__all__ = ["NetworkEngine", "NetworksSeen"]


class NetworksSeen(Protocol):
    """``bad_network`` (InvalidRequest) for a sandbox without an interface on the host."""

    async def show(self, who: Principal, sandbox: str) -> NetworkStatus: ...

    async def explain(self, who: Principal, sandbox: str, request: ExplainNetwork) -> Explanation:
        """Within 10 s, whatever does not answer. ``bad_target`` (InvalidRequest)."""

    async def learned(self, who: Principal, sandbox: str) -> LearnedNetwork:
        """``not_learned`` (Conflict) unless ``learn`` was set for it in this run of the daemon."""


class NetworkEngine(Protocol):
    @property
    def networks(self) -> NetworksSeen: ...

    async def set_network(self, who: Principal, sandbox: str, request: SetNetwork) -> Sandbox: ...
