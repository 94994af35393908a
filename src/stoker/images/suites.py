"""The Debian suites there are bases and kernels for. A module of its own: the warm path needs the table and nothing else."""

from __future__ import annotations

from stoker.errors import NotFound

__all__ = ["SUITES", "known_references", "parse_suite"]

SUITES = {"11": "bullseye", "12": "bookworm", "13": "trixie", "unstable": "sid"}
"""Version to suite; the suites' own names are taken too."""


def known_references() -> str:
    """What can be asked for, in words for a hint."""
    return "there is " + ", ".join(f"debian:{version}" for version in SUITES) + " (or by name: " + ", ".join(SUITES.values()) + ")"


def parse_suite(version: str, code: str, what: str) -> str:
    """The suite for a version or name. Nothing is asked of the network: an unknown one is :class:`NotFound` at once."""
    suite = SUITES.get(version, version)
    if suite not in SUITES.values():
        raise NotFound(code, f"there is no {what} debian:{version}", known_references())
    return suite
