"""pytest on the host: the tests of ``tests/lab`` are collected here and run inside the lab, each shown as a test of this run.

A test there runs in the flavours its mark names (``@pytest.mark.lab("stable", "next")``; without one: stable), each a parameter of
its name. A flavour is booted by the first of its tests and ended after the last. They are the first of a run: with xdist each
worker boots a lab of its own and takes the flavour's files one by one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lab_image import FLAVOURS
from lab_session import Lab, LabError

HERE = Path(__file__).parent / "lab"


def flavours_of(item: Any) -> tuple[str, ...]:
    """The flavours a test's mark names."""
    mark = item.get_closest_marker("lab")
    names = tuple(mark.args) if mark is not None and mark.args else ("stable",)
    assert all(name in FLAVOURS for name in names), f"{item.nodeid}: the lab's flavours are {', '.join(FLAVOURS)}"
    return names


def parametrize(metafunc: pytest.Metafunc, only: str = "") -> None:
    """Makes the flavour a parameter of every test of the lab, whether it asks for it or not."""
    if HERE in metafunc.definition.path.parents:
        names = [name for name in flavours_of(metafunc.definition) if not only or name == only]
        if "flavour" not in metafunc.fixturenames:
            metafunc.fixturenames.append("flavour")
        metafunc.parametrize("flavour", names, scope="session")


def flavour(item: pytest.Item) -> str:
    """The flavour an item runs in; empty: it is not the lab's."""
    if HERE not in item.path.parents:
        return ""
    return str(item.callspec.params["flavour"])  # type: ignore[attr-defined]


def of_flavour(node: str, name: str) -> bool:
    """Whether a test's identifier is that of one in this flavour."""
    path, _, function = node.partition("::")
    return path.startswith("tests/lab/") and name in function.rpartition("[")[2].rstrip("]").split("-")


class HostLab:
    """The plugin."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lab: Lab | None = None
        self.name = ""
        self.failed: dict[str, str] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        parametrize(metafunc)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if flavour(item):
                if item.get_closest_marker("lab") is None:
                    item.add_marker(pytest.mark.lab)
                # Inside, the test's own limit holds; here the first one may build and boot.
                item.add_marker(pytest.mark.timeout(0), append=False)
        order = [*FLAVOURS, ""]
        items.sort(key=lambda item: order.index(flavour(item)))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        name = flavour(item)
        if not name:
            return None
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        following = nextitem.nodeid if nextitem is not None and flavour(nextitem) == name else None
        for report in self._reports(item, name, following):
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _reports(self, item: pytest.Item, name: str, following: str | None) -> list[pytest.TestReport]:
        try:
            reports = [_report(item, data) for data in self._ready(item.config, name).run(item.nodeid, following)]
        except LabError as e:
            self.failed[name] = str(e)
            self._close()
            return [_failure(item, "setup", str(e))]
        if following is None and (left := self._close()):
            reports.append(_failure(item, "teardown", "\n".join([f"left behind in the lab {name}:", *left])))
        return reports

    def _ready(self, config: pytest.Config, name: str) -> Lab:
        if name in self.failed:
            raise LabError(self.failed[name])  # once is enough
        if self.lab is None or self.name != name:
            self._close()
            # Kept before it starts: what a start that fails leaves is ended like any other.
            worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
            self.lab, self.name = Lab(name, self.root / f"lab-{name}-{worker}"), name
            self.lab.start("--full" if config.getoption("--full") else "")
        return self.lab

    def _close(self) -> list[str]:
        lab, self.lab = self.lab, None
        return lab.close() if lab is not None else []

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self._close()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        if config.getoption("dist") != "loadfile":
            return None
        from xdist.scheduler import LoadFileScheduling

        class FilesOfTheLab(LoadFileScheduling):
            """By file and, in the lab, by flavour: a worker boots each at most once, for those that are next to each other."""

            def _split_scope(self, nodeid: str) -> str:
                file = nodeid.partition("::")[0]
                return next((f"{file} in {name}" for name in FLAVOURS if of_flavour(nodeid, name)), file)

        return FilesOfTheLab(config, log)


def _report(item: pytest.Item, data: dict[str, Any]) -> pytest.TestReport:
    report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
    if isinstance(report.longrepr, list):
        report.longrepr = tuple(report.longrepr)  # where it was skipped, which JSON cannot say
    return report  # type: ignore[no-any-return]


def _failure(item: pytest.Item, when: Any, text: str) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", text, when)
