"""The ``stoker`` command. Imports next to nothing: what a word needs is loaded when the word is used."""

from __future__ import annotations

import gc
import os
import sys

__all__ = ["entry", "main"]


def _hold_standard_streams() -> None:
    """Opens what of 0, 1 and 2 is closed on /dev/null, so that no socket of ours takes its number and gets a command's output."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)


def entry() -> int:
    """The installed command: like `main`, but does not take the interpreter apart, which costs as much as loading the client."""
    code = main()
    threads = sys.modules.get("threading")
    if threads and threads.active_count() > 1:
        return code  # somebody still works: the long way waits for them
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            return code
    os._exit(code)


def main() -> int:
    """Runs what ``sys.argv`` says; the result is the exit code."""
    _hold_standard_streams()
    if sys.argv[1:] in (["--version"], ["-V"]):
        from stoker import __version__

        os.write(1, f"stoker {__version__}\n".encode())
        return 0
    # Importing makes many objects and no garbage: looking for it every 700 of them costs a tenth of the start.
    gc.set_threshold(50_000)
    from stoker.cli.commands import invoke

    return invoke(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(entry())
