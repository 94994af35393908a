"""What ``uv build`` makes: a wheel that holds the agent, and works in an environment that has never seen the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from command_line import CommandLine

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"stoker/_bin/stoker-agent", "stoker/_bin/stoker-shim", "stoker/_bin/stoker-zygote.so"}


def run(*words: str | Path, **options: object) -> str:
    __tracebackhide__ = True
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, words))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}", pytrace=False)
    return str(done.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``uv build`` in a copy of the tracked files: sdist, and the wheel from it, with the test environment's build requirements."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    names = run("git", "-c", f"safe.directory={ROOT}", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    environment = Path(sys.executable).parent
    env = {**os.environ, "VIRTUAL_ENV": str(environment.parent), "PATH": f"{environment}:{os.environ['PATH']}"}
    run(environment / "uv", "build", "--quiet", "--offline", "--no-build-isolation", "--out-dir", out, source, env=env)
    return out


def test_wheel_and_sdist_hold_what_they_need(built: Path) -> None:
    [wheel], [sdist] = built.glob("*.whl"), built.glob("*.tar.gz")
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl") or "x86_64" not in sysconfig.get_platform()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        modes = {name: archive.getinfo(name).external_attr >> 16 & 0o777 for name in PROGRAMS}
    assert names >= PROGRAMS | {"stoker/py.typed", "stoker/engine/migrations/0001_first.sql"}
    assert all(mode & 0o111 for mode in modes.values())
    assert not any(name.startswith(("tests/", "agent/")) for name in names)
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert members >= {"agent/Makefile", "agent/agent.c", "hatch_build.py", "LICENSE", "README.md", "src/stoker/_bin/stoker-agent"}


def test_the_wheel_works_elsewhere(built: Path, stoker: CommandLine, tmp_path: Path) -> None:
    """In another environment, whose dependencies are borrowed from this one; the project itself comes from the wheel only."""
    [wheel] = built.glob("*.whl")
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(Path(sys.executable).parent / "uv", "pip", "install", "--quiet", "--offline", "--no-deps", "--python", python, wheel)
    # Packages only: .pth files of a directory on PYTHONPATH are not read, so the editable install stays out.
    env = {**stoker.environment(), "PYTHONPATH": sysconfig.get_path("purelib")}
    where = run(python, "-c", "import stoker; print(stoker.__file__)", env=env, cwd=tmp_path).strip()
    assert Path(where).is_relative_to(site)
    command = tmp_path / "env" / "bin" / "stoker"
    assert run(command, "--version", env=env).startswith("stoker ")
    report = json.loads(run(command, "doctor", "--json", env=env, cwd=tmp_path))
    assert report["ok"] and {row["name"]: row["status"] for row in report["facilities"]}["agent"] == "ok"
    assert run(command, "run", "--network", "none", "debian:12", "--", "uname", "-n", env=env, cwd=tmp_path)
