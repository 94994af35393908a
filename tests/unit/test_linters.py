"""The checks of the sources, as tests: style, types, layers, dependencies, spelling, size."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.linters, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "stoker"
LONGEST_MODULE = 460
LONGEST_BODY = 60
GENERATED = {"client/sync.py"}
STARTS_PROCESSES = {
    # The one runner, and the three that start what outlives a call: the VMM's supervisor, what it forks from, and the daemon.
    "host/run.py",
    "vmm/shim.py",
    "vmm/zygote.py",
    "client/launch.py",
}


def check(*words: str) -> None:
    """Runs a tool of the test environment; its words are the failure, without a traceback of ours."""
    __tracebackhide__ = True
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NO_COLOR": "1"}
    done = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env)
    if done.returncode:
        pytest.fail(f"{' '.join(words[:6])}\n{(done.stdout + done.stderr)[-8000:]}", pytrace=False)


def tracked(*patterns: str) -> list[str]:
    """Files under version control, and new ones that are not ignored."""
    done = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-co", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def modules() -> Iterator[tuple[str, str]]:
    for path in sorted(SOURCES.rglob("*.py")):
        yield str(path.relative_to(SOURCES)), path.read_text()


def test_ruff() -> None:
    check("ruff", "check", "--no-fix", ".")


def test_format() -> None:
    check("ruff", "format", "--check", ".")


def test_types() -> None:
    check("mypy")


def test_layers() -> None:
    check("lint-imports", "--no-cache", "--no-logo")


def test_dependencies() -> None:
    check("deptry", ".")


def test_spelling() -> None:
    check(
        "codespell",
        "--quiet-level=3",
        *tracked("*.py", "*.md", "*.c", "*.h", "*.toml", "*.sql", "stoker", "test", "scripts/*", ".ci/run"),
    )


def test_shell_scripts() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    check("shellcheck", "stoker", "test", ".ci/run", *tracked("scripts/*"))


def test_module_sizes() -> None:
    long = {name: lines for name, text in modules() if name not in GENERATED and (lines := text.count("\n")) > LONGEST_MODULE}
    assert not long, f"modules with a second story in them (more than {LONGEST_MODULE} lines)"


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function behind its signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_function_sizes() -> None:
    long = [
        f"{name}: the body of {node.name} has {_body_lines(node)} lines"
        for name, text in modules()
        if name not in GENERATED
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _body_lines(node) > LONGEST_BODY
    ]
    assert not long


def _starts_process(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        return node.attr.startswith("create_subprocess_") or (
            owner == "os"
            and (node.attr in ("system", "popen", "fork", "forkpty") or node.attr.startswith(("posix_spawn", "spawn")))
        )
    if isinstance(node, ast.Import):
        return any(alias.name in ("subprocess", "pty") for alias in node.names)
    return isinstance(node, ast.ImportFrom) and node.module in ("subprocess", "pty")


def test_processes_start_in_one_place() -> None:
    found = {name for name, text in modules() if any(_starts_process(node) for node in ast.walk(ast.parse(text)))}
    assert found <= STARTS_PROCESSES


def test_no_broad_except_passes_silently() -> None:
    """``except Exception: pass`` hides what went wrong; suppress what is expected by its own type."""
    silent = [
        f"{name}:{node.lineno}"
        for name, text in modules()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
        and all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
    ]
    assert not silent


def test_no_index_host_is_named() -> None:
    """Where archives come from is the machine's configuration; a lock file that names a host would override it."""
    hosts = ("py" + "pi.org", "python" + "hosted.org")
    naming = [name for name in tracked() if any(host in (ROOT / name).read_text(errors="replace") for host in hosts)]
    assert not naming


def test_every_module_says_what_it_is() -> None:
    mute = [name for name, text in modules() if text.strip() and ast.get_docstring(ast.parse(text)) is None]
    assert not mute
