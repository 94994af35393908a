"""``./test --lab-shell [FLAVOUR]``: a root shell in a lab of one's own, the checkout in /srv/stoker. It ends with the shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lab_image import FLAVOURS, build
from lab_session import STOKER, UNPACK, checkout, daemon_environment, lab_settings, machine_words, shared_settings, stop_daemon


def main(flavour: str) -> int:
    if flavour not in FLAVOURS:
        print(f"lab: the flavours are {', '.join(FLAVOURS)}", file=sys.stderr)
        return 2
    root = Path(tempfile.mkdtemp(prefix="stk-", dir="/tmp"))
    shared = shared_settings(root)
    image = build(FLAVOURS[flavour], shared)
    settings = lab_settings(shared, root)
    environment = daemon_environment(settings)
    try:
        print("lab: booting", file=sys.stderr)
        # The pieces of a run, one by one: the checkout comes on a pipe, the shell on the terminal.
        subprocess.run([STOKER, "create", "--name", "lab", *machine_words(image)], env=environment, stdout=2, check=True)
        archive = checkout(image, root / "checkout")
        unpack = [STOKER, "exec", "-i", "lab", "/bin/sh", "-c", UNPACK.format(size=len(archive))]
        subprocess.run(unpack, env=environment, input=archive, check=True)
        print("lab: python -m pytest tests/lab runs the tests by hand", file=sys.stderr)
        terminal = "-it" if os.isatty(0) else "-i"
        return subprocess.run(
            [STOKER, "exec", terminal, "--workdir", "/srv/stoker", "lab", "/bin/bash"], env=environment
        ).returncode
    except subprocess.CalledProcessError as e:
        return int(e.returncode)
    finally:
        subprocess.run([STOKER, "rm", "--all"], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        stop_daemon(settings)
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "stable"))
