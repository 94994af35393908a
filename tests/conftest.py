"""What all tests share: options, one temporary root for everything they make, and the proof that nothing was left behind.

Every file, socket and process of a test carries the path of the session's root (its run directories are below it), so what is
left over can be told from what other programs of this host do. Kernel objects without a path (links, namespaces, nftables tables)
are compared before and after the session.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab_inside import Inside, inside
from lab_plugin import FLAVOURS, HostLab, of_flavour
from leaks import HostObjects, assert_gone, end_left

ROOT_VARIABLE = "STOKER_TEST_ROOT"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long tests too")
    parser.addoption("--whole", action="store_true", help="fail when a whole suite ran no test")


def pytest_configure(config: pytest.Config) -> None:
    # A shell that has started all this in its background had these ignored, and so would every program of a test's.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    # Workers of xdist inherit the root of the process that started them.
    if not hasattr(config, "workerinput"):
        root = tempfile.mkdtemp(prefix="stk-", dir="/tmp")
        os.chmod(root, 0o755)
        os.environ[ROOT_VARIABLE] = root
        # Most tests count the machines that there are. (tests/system/test_parked.py has some.)
        os.environ["STOKER_PARKED"] = "0"
        # A daemon of a test makes no file system by itself, but where that is what is tested.
        os.environ.setdefault("STOKER_POOL", "directory")
        config.stash[_ROOT] = Path(root)
        config.stash[_BEFORE] = HostObjects.now()
    config.pluginmanager.register(inside(config) or HostLab(Path(os.environ[ROOT_VARIABLE])), "lab")


_ROOT: pytest.StashKey[Path] = pytest.StashKey()
_BEFORE: pytest.StashKey[HostObjects] = pytest.StashKey()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="a long test: ./test --full")
    for item in items:
        if "full" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """The controller's last word: nothing left of this session, and no suite that silently ran nothing."""
    config = session.config
    if hasattr(config, "workerinput"):
        return
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    problems = assert_gone(config.stash[_ROOT], config.stash[_BEFORE])
    if config.getoption("--whole") and reporter is not None:
        passed = [report.nodeid for report in reporter.stats.get("passed", [])]
        problems += [
            f"the suite tests/{suite} ran no test"
            for suite in ("unit", "system", "conformance", "lab")
            if not any(node.startswith(f"tests/{suite}/") for node in passed)
        ]
        problems += [f"no test ran in the lab {name}" for name in FLAVOURS if not any(of_flavour(node, name) for node in passed)]
    lab = config.pluginmanager.get_plugin("lab")
    if isinstance(lab, Inside):
        lab.left(problems)
    if problems and reporter is not None:
        reporter.section("left behind", red=True)
        for problem in problems:
            reporter.line(problem, red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    end_left(config.stash[_ROOT])
    shutil.rmtree(config.stash[_ROOT], ignore_errors=True)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def session_root() -> Path:
    """The directory that holds everything this session makes, short enough for socket paths."""
    return Path(os.environ[ROOT_VARIABLE])


@pytest.fixture
def short_dir(session_root: Path) -> Iterator[Path]:
    """A directory of the test's own whose path leaves room for socket names (108 bytes)."""
    path = Path(tempfile.mkdtemp(prefix="t", dir=session_root))
    yield path
    shutil.rmtree(path, ignore_errors=True)
