"""Ports inside sandboxes, and how they are reached."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from stoker.api.types import Model

__all__ = ["PortAccess"]


class PortAccess(Model, frozen=True):
    """Where the proxy serves a port of a sandbox. Whether somebody listens there shows when it is used.

    ``token`` goes into the header ``X-Stoker-Token`` or the cookie ``stoker-token``; without ``token_needed`` it may be left out.
    """

    port: Annotated[int, Meta(ge=1, le=65535)]
    url: str | None = None
    """None: this daemon has no proxy, or the sandbox keeps away from it (label ``stoker.proxy``)."""
    token: str = ""
    token_needed: bool = False
