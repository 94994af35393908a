"""pytest inside the lab: runs the tests it is told to, one line of JSON on descriptor 4 each, and answers on descriptor 3."""

from __future__ import annotations

import json
import os
from typing import Any, TextIO

import pytest

from lab_plugin import flavour, parametrize

VARIABLE = "STOKER_LAB"
"""The environment variable that names the flavour; where it is set, we are inside."""
LIMIT = 300
"""Seconds a test has unless it says otherwise."""


class Inside:
    """The plugin."""

    def __init__(self, name: str) -> None:
        self.name = name
        for fd in (3, 4):
            os.set_inheritable(fd, False)
        self.answers: TextIO = os.fdopen(3, "w")
        self.orders: TextIO = os.fdopen(4)
        self.broken: list[str] = []

    def say(self, **words: Any) -> None:
        self.answers.write(json.dumps(words) + "\n")
        self.answers.flush()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        parametrize(metafunc, self.name)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if flavour(item) == self.name]
        for item in items:
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(LIMIT))

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

    def pytest_configure(self, config: pytest.Config) -> None:
        self.config = config

    def left(self, problems: list[str]) -> None:
        """Tells the host what was left behind."""
        self.say(left=problems)
