"""The command line's own behaviour: environments, help, and every mistake in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import click
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.cli.errors import report_line
from stoker.cli.options import command_words, environment
from stoker.errors import InvalidRequest

STOKER = [sys.executable, "-m", "stoker.cli.main"]


def stoker(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*STOKER, *words], capture_output=True, stdin=subprocess.DEVNULL, text=True, timeout=60, env={**os.environ, **env}
    )
    assert "Traceback" not in done.stderr
    return done


def test_files_come_first_and_the_last_word_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"\xef\xbb\xbf# a comment\nA=1\r\n\n  B= two words \nHOME\nGONE\nQ='x'\n")
    second.write_text("A=2\nC=a=b")
    found = environment(["B=3", "EMPTY="], [str(first), str(second)], {"HOME": "/root"})
    assert dict(found) == {"A": "2", "B": "3", "HOME": "/root", "Q": "'x'", "C": "a=b", "EMPTY": ""}


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text("A=1\n\nno name=1\n")
    with pytest.raises(InvalidRequest, match=rf"{path}:3: .*no name"):
        environment([], [str(path)], {})


@pytest.mark.parametrize("word", ["=1", "A B=1", "", "A=\0"])
def test_a_bad_word_is_refused(word: str) -> None:
    with pytest.raises(InvalidRequest):
        environment([word], [], {})


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.write_bytes(b"A=1\n" * (1 << 19))
    for path in (tmp_path / "none", tmp_path, huge):
        with pytest.raises(InvalidRequest) as refused:
            environment([], [str(path)], {})
        assert refused.value.code == "bad_environment_file"


@given(st.binary(max_size=400))
def test_any_file_gives_pairs_or_one_error(data: bytes) -> None:
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    try:
        pairs = environment([], [f"/proc/self/fd/{read}"], {})
    except InvalidRequest as e:
        assert e.code == "bad_environment"
    else:
        assert all(name and "=" not in name and "\0" not in name + value for name, value in pairs)
    finally:
        os.close(read)


def test_only_the_first_dashes_are_ours() -> None:
    assert command_words(("--", "a", "--", "b")) == ("a", "--", "b")
    assert command_words(("a", "--", "b")) == ("a", "--", "b")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["docktor"], "did you mean 'doctor'?"),
        (["run"], "IMAGE"),
        (["run", "--memory", "much", "debian:12"], "'much' is not a size"),
        (["run", "--cpus", "0", "debian:12"], "--cpus"),
        (["run", "--network", "bridge", "debian:12"], "--network"),
        (["run", "--timeout", "0", "debian:12"], "--timeout"),
        (["run", "--env", "=", "debian:12"], "bad_environment"),
        (["run", "--env-file", "/nonexistent", "debian:12"], "/nonexistent"),
        (["run", "--initrd", "/nonexistent", "debian:12"], "/nonexistent"),
        (["run", "--no-such-option", "debian:12"], "--no-such-option"),
        (["bench", "nothing"], "nothing"),
    ],
)
def test_a_mistake_is_one_line_with_a_code_and_125(words: list[str], said: str) -> None:
    done = stoker(*words)
    first, *rest = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (125, "")
    assert first.startswith("stoker: ") and first.endswith("]") and said in first
    assert all(line.startswith("  hint: ") for line in rest) and len(rest) <= 1


def test_a_wrong_setting_is_named() -> None:
    done = stoker("run", "debian:12", STOKER_BOOT_TIMEOUT="soon")
    assert done.returncode == 125
    assert "STOKER_BOOT_TIMEOUT" in done.stderr


@pytest.mark.parametrize("words", ["--help", "run --help", "doctor --help", "bench --help", "bench start -h"])
def test_help_is_help(words: str) -> None:
    done = stoker(*words.split())
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: stoker")


def test_what_a_guest_says_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    report_line("died\x1b[2J\n", "guest_died", "look\rhere", ("line \x07one", "", "x" * 500))
    text = capsys.readouterr().err
    assert not any(ord(c) < 32 for c in text.replace("\n", ""))
    assert len(max(text.splitlines(), key=len)) < 260
    assert text.count("\n") == 5


def test_the_version_comes_at_once() -> None:
    """100 ms is the promise; the best of a few says what it takes on a busy host."""
    script = Path(sys.executable).with_name("stoker")
    best = 1.0
    for _ in range(8):
        began = time.perf_counter()
        done = subprocess.run([script, "--version"], capture_output=True, check=True)
        best = min(best, time.perf_counter() - began)
    assert done.stdout.startswith(b"stoker ")
    assert best < 0.1


def test_the_version_imports_neither_click_nor_asyncio() -> None:
    code = (
        "import sys; sys.argv = ['stoker', '--version']\nfrom stoker.cli.main import main\nmain()\n"
        "print(sorted({'click', 'asyncio', 'rich', 'msgspec', 'ssl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_closed_standard_streams_are_not_given_to_others() -> None:
    done = subprocess.run(["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", *STOKER, "--version"], timeout=30)
    assert done.returncode == 0


def test_mounts_go_over_the_wire_as_the_models_have_them() -> None:
    from stoker.api.volumes import parse_mount
    from stoker.cli.mounts import MOUNT, wire_mounts

    words = ("data:/d", "logs:/var/log:ro", "x.y-z:/with:colon")
    assert wire_mounts(()) == {}
    assert wire_mounts(words) == {"volumes": [msgspec.to_builtins(parse_mount(word)) for word in words]}
    for bad in ("data", "data:d", ":/d", "da ta:/d"):
        with pytest.raises(click.BadParameter):
            MOUNT.convert(bad, None, None)
