"""The ``stoker`` command in a copy of the test's own process.

In the lab an interpreter and what it imports take seconds to start, several times what the command then does. A copy has it all
already. What it starts itself (a daemon) is started as ever, and so is what a test starts with ``popen``.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import select
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from functools import cache
from typing import IO, NoReturn

import stoker.cli
import stoker.client

LEFT_OUT = ("__main__", "bench")


@cache
def _load() -> None:
    for package in (stoker.cli, stoker.client):
        for module in pkgutil.iter_modules(package.__path__):
            if module.name not in LEFT_OUT:
                importlib.import_module(f"{package.__name__}.{module.name}")


def forked(words: tuple[str, ...], environment: Mapping[str, str], input: bytes | None, timeout: float) -> tuple[int, bytes, bytes]:
    """Exit code, standard output and standard error. :class:`TimeoutError`: it was ended, and this is what it had said."""
    _load()
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(input or b"")
        given.seek(0)
        pid = os.fork()
        if pid == 0:
            _be(words, environment, given, out, err)
        ended = os.pidfd_open(pid)
        try:
            late = not select.select([ended], [], [], timeout)[0]
            if late:
                os.kill(pid, 9)
        finally:
            os.close(ended)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        if late:
            raise TimeoutError(err.read().decode(errors="replace"))
        return code, out.read(), err.read()


def _be(words: tuple[str, ...], environment: Mapping[str, str], given: IO[bytes], out: IO[bytes], err: IO[bytes]) -> NoReturn:
    try:
        for number, file in enumerate((given, out, err)):
            os.dup2(file.fileno(), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["stoker", *words]
        from stoker.cli.main import main

        code = main()
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stderr.flush()
    os._exit(code)
