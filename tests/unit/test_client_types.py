"""The SDK's surface: everything annotated, the sync half up to date, imports cheap, and what a strict type checker makes of it."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import stoker
from stoker.errors import StokerError

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = [name for name in stoker.__all__ if not name.startswith("_")]


def public_classes() -> list[type]:
    return [getattr(stoker, name) for name in PUBLIC if inspect.isclass(getattr(stoker, name))]


def test_every_name_is_there_and_listed() -> None:
    for name in PUBLIC:
        assert getattr(stoker, name).__name__ == name
        assert name in dir(stoker)
    with pytest.raises(AttributeError):
        stoker.Nothing  # noqa: B018


def test_there_is_one_exception_root() -> None:
    errors = [c for c in public_classes() if issubclass(c, BaseException)]
    assert len(errors) > 10 and all(issubclass(c, StokerError) for c in errors)


@pytest.mark.parametrize("cls", public_classes(), ids=lambda c: c.__name__)
def test_everything_public_is_annotated(cls: type) -> None:
    for name, member in inspect.getmembers(cls):
        if name.startswith("_") and name != "__init__":
            continue
        function = member.fget if isinstance(member, property) else member
        if not inspect.isfunction(function) and not inspect.ismethod(function):
            continue
        signature = inspect.signature(function)
        missing = [
            p.name
            for p in signature.parameters.values()
            if p.annotation is inspect.Parameter.empty and p.name not in ("self", "cls")
        ]
        assert not missing, f"{cls.__name__}.{name}: {missing}"
        assert signature.return_annotation is not inspect.Signature.empty, f"{cls.__name__}.{name}"


def test_sync_and_async_have_the_same_words() -> None:
    for name in PUBLIC:
        if not name.startswith("Async"):
            continue
        asynchronous, synchronous = getattr(stoker, name), getattr(stoker, name.removeprefix("Async"))

        def words(cls: type) -> dict[str, list[str]]:
            found = {n: m for n, m in inspect.getmembers(cls) if not n.startswith("_") and callable(m)}
            return {n: list(inspect.signature(m).parameters) for n, m in found.items()}

        assert words(synchronous) == words(asynchronous)


def test_the_sync_half_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/generate_sync.py", "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


SAMPLE = """
from stoker import AsyncSandbox, CommandResult, Sandbox, StokerError
from typing import assert_type

def use() -> int:
    with Sandbox.create("debian:12", memory="512M", labels={"a": "b"}) as box:
        box.files.write("/srv/a.py", "print(6*7)")
        result = box.commands.run(["python3", "/srv/a.py"], on_stdout=print, timeout=3)
        assert_type(result, CommandResult)
        assert_type(result.stdout, str)
        process = box.commands.start("sleep 600", tag="server")
        for output in process:
            assert_type(output.data, bytes)
        with box.files.watch("/srv") as watch:
            for event in watch:
                assert_type(event.path, str)
    try:
        Sandbox.connect("web").kill()
    except StokerError as e:
        print(e.code, e.hint)
    return result.exit_code

async def use_async() -> None:
    async with await AsyncSandbox.create("debian:12") as box:
        assert_type(await box.commands.run("true"), CommandResult)
        assert_type(await AsyncSandbox.list(), list[AsyncSandbox])
    box.commands.run(1)  # type: ignore[arg-type, unused-coroutine]
"""


@pytest.mark.timeout(300)
def test_a_strict_type_checker_understands_a_program(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SAMPLE)
    # The cache is the repository's own: a cold one costs half a minute.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, "--python-version", "3.11",
         "--cache-dir", str(ROOT / ".mypy_cache"), str(tmp_path / "program.py")],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "MYPYPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def imported(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_imports_are_cheap() -> None:
    assert {m for m in imported("import stoker") if m.startswith("stoker")} == {"stoker"}
    heavy = {"rich", "httpx", "litestar", "uvicorn", "wsproto", "websockets", "tarfile", "email", "pyroute2", "structlog", "anyio"}
    words = imported("import stoker.cli.commands, stoker.cli.sandboxes, stoker.client.client")
    assert not heavy & words
    rooms = {m.split(".")[1] for m in imported("import stoker; stoker.Sandbox") if m.startswith("stoker.")}
    assert rooms == {"api", "client", "errors", "settings"}


def test_the_docstrings_of_the_sync_half_speak_of_itself() -> None:
    for cls in public_classes():
        if cls.__name__.startswith("Async"):
            continue
        for name, member in inspect.getmembers(cls):
            text = inspect.getdoc(member) or ""
            if getattr(member, "__module__", "") == "stoker.client.sync":
                assert "async with" not in text and "AsyncSandbox" not in text, f"{cls.__name__}.{name}"


def test_type_hints_resolve() -> None:
    typing.get_type_hints(stoker.CommandResult)
    assert (Path(stoker.__file__).parent / "py.typed").exists()
