"""One corpus for every strategy. dm-snapshot runs where the kernel has it: in the lab (``./test -m lab``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from stoker.host import devicemapper
from stoker.storage.strategy import Strategy
from storage_places import Place, file_system, left_over, make_base

HERE = [s for s in Strategy if s is not Strategy.DM_SNAPSHOT or devicemapper.available("snapshot") is not None]


@pytest.fixture(params=HERE, ids=str)
def place(request: pytest.FixtureRequest, short_dir: Path) -> Iterator[Place]:
    """The test's own place; when it is over, nothing of any disk may be left in it once all are removed."""
    strategy: Strategy = request.param
    directory = short_dir / "pool"
    with ExitStack() as stack:
        if strategy is Strategy.REFLINK:
            stack.enter_context(file_system(short_dir / "pool.xfs", directory, 0, "xfs"))
        else:
            directory.mkdir()
        found = Place(strategy, directory, make_base(short_dir / "base.img"), short_dir)
        yield found
        with found.pool() as pool:
            for name in pool.names():
                pool.remove(name)
            pool.collect()
        assert left_over(found) == []
        assert list((directory / "bases").iterdir()) == []
