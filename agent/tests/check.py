#!/usr/bin/env python3
"""The agent's own tests.

usage: check.py PROGRAM [NAME...]         `PROGRAM --socket` on this host, a new one for each test; at a test's end it must have
                                          no descriptor of a process open, and end cleanly (the sanitizer's leak check included)
       check.py --guest SOCKET [NAME...]  the agent of a booted and configured machine, over its channel

Plain Python, no dependency.
"""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import check_connections  # noqa: F401
import check_copies  # noqa: F401
import check_files  # noqa: F401
import check_processes  # noqa: F401
from harness import TESTS, Agent, Guest


def main(arguments: list[str]) -> int:
    guest = arguments[0] == "--guest"
    where, wanted = (arguments[1], arguments[2:]) if guest else (arguments[0], arguments[1:])
    failed = 0
    for f, anywhere in TESTS:
        if (wanted and f.__name__ not in wanted) or (guest and not anywhere):
            continue
        started = time.monotonic()
        agent = Guest(where) if guest else Agent(where)
        try:
            f(agent)
            agent.end()
            print(f"ok      {f.__name__} {time.monotonic() - started:.1f} s", flush=True)
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"FAILED  {f.__name__}", flush=True)
            if isinstance(agent, Agent) and agent.process.poll() is not None:
                print(agent.complaints())
        finally:
            agent.remove()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
