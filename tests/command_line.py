"""The installed ``stoker`` command as tests use it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stoker.settings import Settings

STOKER = Path(sys.executable).parent / "stoker"
BOOT = 240.0
"""Seconds that one command in one guest may take on a busy host without hardware virtualisation."""


@dataclass(frozen=True)
class Done:
    """How a command line ended."""

    argv: tuple[str, ...]
    code: int
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        return self.out.decode(errors="replace")

    @property
    def error(self) -> str:
        return self.err.decode(errors="replace")


@dataclass(frozen=True)
class CommandLine:
    """The installed ``stoker`` command with directories of the test's own."""

    settings: Settings
    env: dict[str, str] = field(default_factory=dict)

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        return {**os.environ, **self.env, **(extra or {})}

    def popen(self, *words: str, env: Mapping[str, str] | None = None, **options: object) -> subprocess.Popen[bytes]:
        streams: dict[str, object] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([str(STOKER), *words], env=self.environment(env), **{**streams, **options})  # type: ignore[call-overload,no-any-return]

    def __call__(
        self, *words: str, input: bytes | None = None, timeout: float = BOOT, env: Mapping[str, str] | None = None
    ) -> Done:
        if "STOKER_LAB" in os.environ:
            return self._forked(words, input, timeout, env)
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        process = self.popen(*words, env=env, stdin=stdin)
        try:
            out, err = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"stoker {' '.join(words)}: not done after {timeout} s\n{err.decode(errors='replace')}", pytrace=False)
        return Done(words, process.returncode, out, err)

    def _forked(self, words: tuple[str, ...], input: bytes | None, timeout: float, env: Mapping[str, str] | None) -> Done:
        from forked_command import forked

        try:
            return Done(words, *forked(words, self.environment(env), input, timeout))
        except TimeoutError as e:
            pytest.fail(f"stoker {' '.join(words)}: not done after {timeout} s\n{e}", pytrace=False)
