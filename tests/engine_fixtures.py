"""Data directories for engines of a test's own that share the session's kernels and images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stoker.settings import Settings

SHARED = ("images", "kernels", "cache", "locks", "staging", "golden")


def own_data(settings: Settings, short_dir: Path) -> Settings:
    """The database and the pool are the test's; what is made once is the session's."""
    data = short_dir / "data"
    data.mkdir(mode=0o700)
    for name in SHARED:
        (settings.data_dir / name).mkdir(exist_ok=True)
        (data / name).symlink_to(settings.data_dir / name)
    return replace(settings, data_dir=data)
