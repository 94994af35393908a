"""What the handlers share: the engine, and the few things the server keeps by itself."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from stoker.server.ports import EngineProtocol
from stoker.server.signing import Signer

__all__ = ["Services"]


@dataclass(slots=True)
class Services:
    """Made once by :func:`stoker.server.app.create_app`."""

    engine: EngineProtocol
    signer: Signer
    group: int | None = None
    """Members of this group may use the Unix socket."""
    auto_started: bool = False
    started_at: float = field(default_factory=time.time)
    secret: bytes = b""
    """What the proxy's tokens and the sandboxes' ssh host keys are made with."""
    proxy: str | None = None
    """``DOMAIN:PORT`` of the reverse proxy."""
    documents: dict[str, bytes] = field(default_factory=dict)
    ssh_connections: int = 0
    """How many there are."""
