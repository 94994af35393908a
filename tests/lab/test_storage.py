"""The storage's conformance corpus (``tests/conformance``) with device-mapper snapshots, which need a kernel that has them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stoker.storage.strategy import Strategy
from storage_places import Place, a_place

pytestmark = pytest.mark.lab("stable")
CORPUS = Path(__file__).parent.parent / "conformance"
HOST_ONLY = ("test_a_strategy_that_does_not_work_here_is_refused_in_words",)


def _corpus() -> dict[str, Any]:
    """Tests and fixtures of the corpus."""
    found: dict[str, Any] = {}
    for name in ("test_semantics", "test_bad_luck"):
        spec = importlib.util.spec_from_file_location(f"corpus_{name}", CORPUS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.update({key: value for key, value in vars(module).items() if key.startswith("test_") or key == "narrow"})
    return {key: value for key, value in found.items() if key not in HOST_ONLY}


globals().update(_corpus())


@pytest.fixture
def place(short_dir: Path) -> Iterator[Place]:
    """The test's own place; when it is over, nothing of any disk may be left in it."""
    with a_place(Strategy.DM_SNAPSHOT, short_dir) as found:
        yield found
