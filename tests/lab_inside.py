"""pytest inside the lab: only the tests of its flavour; told by the host, or, in a developer's shell there, by hand.

The host sends one line of JSON a test on descriptor 4 and gets its answers on descriptor 3.
"""

from __future__ import annotations

import json
import os
from typing import Any, TextIO

import pytest

from lab_plugin import flavour, parametrize

VARIABLE = "STOKER_LAB"
"""The environment variable that names the flavour; where it is set, we are inside."""
ORDERED = "STOKER_LAB_ORDERED"
"""Set when the host is at the other end of descriptors 3 and 4."""
LIMIT = 300
"""Seconds a test has unless it says otherwise."""


class Inside:
    """The plugin that chooses the tests."""

    def __init__(self, name: str) -> None:
        self.name = name

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        parametrize(metafunc, self.name)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if flavour(item) == self.name]
        for item in items:
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(LIMIT))

    def left(self, problems: list[str]) -> None:
        """What was left behind; the terminal shows it."""


class Ordered(Inside):
    """The plugin that also runs them as the host says, and reports."""

    def __init__(self, name: str, config: pytest.Config) -> None:
        super().__init__(name)
        for fd in (3, 4):
            os.set_inheritable(fd, False)
        self.config = config
        self.answers: TextIO = os.fdopen(3, "w")
        self.orders: TextIO = os.fdopen(4)
        self.broken: list[str] = []

    def say(self, **words: Any) -> None:
        self.answers.write(json.dumps(words) + "\n")
        self.answers.flush()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken.append(f"{report.nodeid}: {report.longreprtext}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if self.broken:
            self.say(broken="\n".join(self.broken))
            return True
        items = {item.nodeid: item for item in session.items}
        self.say(collected=len(items))
        for line in self.orders:
            order = json.loads(line)
            item = items.get(order["run"])
            if item is None:
                self.say(broken=f"there is no test {order['run']} inside")
                break
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=items.get(order["next"]))
            self.say(done=item.nodeid)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.say(report=self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    def left(self, problems: list[str]) -> None:
        self.say(left=problems)


def inside(config: pytest.Config) -> Inside | None:
    """The plugin for this process; None: it is on the host."""
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    return Ordered(name, config) if os.environ.get(ORDERED) else Inside(name)
