"""Tests that run inside the lab VM, a whole host: systemd is process 1, there are device-mapper, WireGuard, VLANs and KVM.

What is collected here runs there (docs/development.md). Kernel and base ``debian:12`` are in the lab's own data directory.
"""

from __future__ import annotations

import pytest

from guest_fixtures import data_dir, settings, stoker

__all__ = ["accelerator", "data_dir", "settings", "stoker"]


@pytest.fixture(scope="session")
def accelerator() -> str:
    """Known: test_kvm.py proves it, and asking again would cost every run directory half a minute."""
    return "kvm"
