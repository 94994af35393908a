"""Programs that fetch and build: started so that they end when we do, however we end."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stoker.errors import HostError
from stoker.host.run import Completed, run

__all__ = ["run_tied"]

PACKAGES = {
    "apt-get": "apt",
    "apt-cache": "apt",
    "apt-helper": "apt",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "setpriv": "util-linux",
}
"""The Debian package of a tool that has another name."""
SCRIPT = '"$@" & child=$!; trap \'trap "" TERM; kill -TERM 0; wait $child; exit 143\' TERM; wait $child'


async def run_tied(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdout: int | None = None,
    pass_fds: Sequence[int] = (),
    on_line: Callable[[str], None] | None = None,
) -> Completed:
    """Runs a program that must not go on alone after a ``kill -9``, and checks that it ends well.

    The kernel sends a shell in between a SIGTERM when we end, and that shell sends it to the program's whole process group:
    mmdebstrap alone would wait for its children to be done. Errors name the program, not what is in between.
    """
    tied = ["setpriv", "--pdeathsig", "TERM", "--", "sh", "-c", SCRIPT, "sh", *argv]
    try:
        return await run(tied, env=env, cwd=cwd, stdout=stdout, pass_fds=pass_fds, on_line=on_line)
    except HostError as e:
        name = os.path.basename(argv[0]) if e.code == "tool_failed" else "setpriv"
        if e.code == "tool_missing" or (e.details.get("code") == 127 and "not found" in e.message):
            package = PACKAGES.get(name, name)
            details = {"tool": name, "packages": [package]}
            raise HostError("tool_missing", f"{name} is not installed", f"apt-get install {package}", details=details) from None
        if e.code != "tool_failed":
            raise
        details = {**e.details, "argv": [str(word) for word in argv]}
        raise HostError(e.code, e.message.replace("setpriv", name, 1), e.hint, details=details) from None
