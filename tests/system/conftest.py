"""Tests that boot real guests.

Kernels and base systems are built once, in the data directory that ``STOKER_TEST_DATA_DIR`` names (default: that of this user, so
that a CI machine keeps them), under the store's own locks. Each test has a run directory of its own and is
checked for what it left.
"""

from __future__ import annotations

import pytest

from guest_fixtures import accelerator, data_dir, settings, stoker

__all__ = ["accelerator", "data_dir", "settings", "stoker"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None and "system" in item.path.parts:
            item.add_marker(pytest.mark.timeout(300))
