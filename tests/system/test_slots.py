"""Slots of both plans with a real IP stack behind their TAP, in a world of network namespaces."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from network_world import PORT, Guest, World, world

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


@pytest.fixture
def made() -> Iterator[World]:
    with world() as one:
        yield one


KINDS = pytest.mark.parametrize("kind", ["run", "ns"])


@KINDS
def test_out(made: World, kind: str) -> None:
    guest = made.machine(kind)
    assert guest.ask("1.1.1.1") == "5.5.5.5"
    assert guest.ask_udp("8.8.8.8") == "5.5.5.5"
