"""How ssh reaches a sandbox."""

from __future__ import annotations

from enum import Enum

from stoker.api.types import Model

__all__ = ["DEFAULT_USER", "SshAccess", "SshBy"]

DEFAULT_USER = "@default"
"""The user name that stands for the sandbox's own user: no guest can have one of this name."""


class SshBy(Enum):
    """Who answers: the daemon, by the agent's channel. (An sshd of the image's, over the network, would be another.)"""

    DAEMON = "daemon"


class SshAccess(Model, frozen=True):
    """``host_key`` is the one key that the sandbox's ssh server has, as in a known_hosts file: type and base64."""

    sandbox: str
    host_key: str
    user: str = DEFAULT_USER
    by: SshBy = SshBy.DAEMON
