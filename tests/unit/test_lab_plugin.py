"""The lab's pytest plugin, with a directory of this host in place of the machine: what becomes of the reports, and of bad luck."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab_image import requirements

TESTS = Path(__file__).resolve().parents[1]

CONFTEST = """
import os, sys
from pathlib import Path
import pytest
import lab_plugin, lab_session
from lab_inside import Inside, inside

lab_plugin.HERE = Path(__file__).parent

class HereLab(lab_session.Lab):
    def start(self, arguments=""):
        with open("starts", "a") as file:
            file.write(self.flavour.name + "\\n")
        if os.environ.get("FAULT") == "boot":
            raise lab_session.LabError("the lab does not boot")
        self.root.mkdir()
        script = "head -c {size} >/dev/null; cd " + os.getcwd() + lab_session.SERVE
        archive = b"x" * 100_000
        script = script.format(size=len(archive), arguments="").replace("exec python", "exec " + sys.executable)
        self.serve(["/bin/sh", "-c", script], {**os.environ, "STOKER_LAB": self.flavour.name}, archive)

lab_plugin.Lab = HereLab

def pytest_addoption(parser):
    parser.addoption("--full", action="store_true")

def pytest_configure(config):
    config.pluginmanager.register(inside(config) or lab_plugin.HostLab(Path(os.environ["ROOT"])), "lab")

def pytest_sessionfinish(session):
    lab = session.config.pluginmanager.get_plugin("lab")
    if isinstance(lab, Inside):
        lab.left(["a loop device"] if os.environ.get("FAULT") == "leak" else [])
"""
CASES = """
import os
import pytest

def test_passes():
    print("said in", os.environ["STOKER_LAB"])

@pytest.mark.lab("next")
@pytest.mark.parametrize("number", [1, 2])
def test_elsewhere(number, flavour):
    assert flavour == os.environ["STOKER_LAB"] == "next"

@pytest.mark.lab("stable", "next")
def test_fails_in_one(flavour):
    print("about to fail")
    assert flavour != "stable", "as it should"

def test_is_skipped():
    pytest.skip("for a reason")

def test_may_die():
    if os.environ.get("FAULT") == "death":
        os._exit(9)

def test_is_last():
    pass
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    lab = tmp_path / "tests/lab"
    lab.mkdir(parents=True)
    (lab / "conftest.py").write_text(CONFTEST)
    (lab / "test_cases.py").write_text(CASES)
    (tmp_path / "root").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  lab: flavours\n")
    return tmp_path


def run(project: Path, *words: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "ROOT": str(project / "root"), "FAULT": fault}
    environment = {name: value for name, value in environment.items() if not name.startswith(("PYTEST_", "STOKER_LAB"))}
    environment |= {"COLUMNS": "200", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-rA", *words, "tests/lab"]
    return subprocess.run(argv, cwd=project, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)


def starts(project: Path) -> list[str]:
    return sorted((project / "starts").read_text().split())


@pytest.mark.parametrize("workers", [(), ("-p", "xdist", "-n", "2", "--dist", "loadfile")], ids=["alone", "xdist"])
def test_what_happens_inside_is_shown_outside(project: Path, workers: tuple[str, ...]) -> None:
    done = run(project, *workers)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "6 passed, 1 skipped" in done.stdout and "1 failed" in done.stdout, done.stdout + done.stderr
    assert "PASSED tests/lab/test_cases.py::test_elsewhere[next-2]" in done.stdout
    assert "FAILED tests/lab/test_cases.py::test_fails_in_one[stable] - AssertionError: as it should" in done.stdout
    assert "about to fail" in done.stdout and "said in stable" in done.stdout
    assert "test_cases.py:20: for a reason" in done.stdout or "for a reason" in done.stdout
    assert starts(project) == ["next", "stable"], "each flavour is booted once"


def test_selection_on_the_host_is_what_runs_inside(project: Path) -> None:
    done = run(project, "-m", "lab", "-k", "passes or elsewhere and 2")
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
    assert starts(project) == ["next", "stable"]


def test_a_lab_that_does_not_boot_fails_every_test_and_is_tried_once(project: Path) -> None:
    done = run(project, fault="boot")
    assert done.returncode == 1 and "8 errors" in done.stdout, done.stdout
    assert "the lab does not boot" in done.stdout
    assert starts(project) == ["next", "stable"]


def test_a_lab_that_dies_fails_what_was_left(project: Path) -> None:
    done = run(project, "-k", "stable", fault="death")
    assert done.returncode == 1 and "1 passed" in done.stdout and "2 errors" in done.stdout, done.stdout
    assert "the lab stable ended" in done.stdout
    assert starts(project) == ["stable"]


def test_what_is_left_behind_inside_fails_the_last_test(project: Path) -> None:
    done = run(project, "-k", "is_last", fault="leak")
    assert done.returncode == 1 and "1 passed, " in done.stdout and "1 error" in done.stdout, done.stdout
    assert "left behind in the lab stable" in done.stdout and "a loop device" in done.stdout


def test_a_test_that_cannot_be_imported_inside_fails_the_suite(project: Path) -> None:
    cases = project / "tests/lab/test_cases.py"
    cases.write_text("import os\nassert 'STOKER_LAB' not in os.environ, 'not in there'\n" + CASES)
    done = run(project, "-k", "passes")
    assert done.returncode == 1 and "1 error" in done.stdout, done.stdout
    assert "not in there" in done.stdout


LOCK = """alpha==1.0 ; python_full_version < '3.14' \\
    --hash=sha256:aa
beta==2.0 \\
    --hash=sha256:bb \\
    --hash=sha256:cc
gamma==3 ; sys_platform == 'win32' \\
    --hash=sha256:dd"""
DEVELOPMENT = LOCK + "\npytest==9.0 \\\n    --hash=sha256:ee\nruff==1 \\\n    --hash=sha256:ff\n"


@pytest.mark.parametrize(
    ("version", "there"), [("3.13", ["alpha==1.0", "beta==2.0", "pytest==9.0"]), ("3.14", ["beta==2.0", "pytest==9.0"])]
)
def test_the_packages_for_the_labs_python(version: str, there: list[str]) -> None:
    """Conditions are decided for the lab's interpreter; hashes stay; nothing of the development's but what tests there need."""
    text = requirements(LOCK, DEVELOPMENT, version)
    assert [line.removesuffix(" \\") for line in text.splitlines() if "==" in line] == there
    assert "beta==2.0 \\\n    --hash=sha256:bb \\\n    --hash=sha256:cc\n" in text and "sha256:dd" not in text
