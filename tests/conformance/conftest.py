"""One corpus for every strategy. dm-snapshot, which this kernel may not have, runs in the lab (``tests/lab/test_storage.py``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker.storage.strategy import Strategy
from storage_places import Place, a_place


@pytest.fixture(params=[Strategy.QCOW2, Strategy.REFLINK, Strategy.COPY], ids=str)
def place(request: pytest.FixtureRequest, short_dir: Path) -> Iterator[Place]:
    """The test's own place; when it is over, nothing of any disk may be left in it."""
    with a_place(request.param, short_dir) as found:
        yield found
