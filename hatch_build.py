"""Build hook: makes the guest agent and the VMM supervisor, so that every wheel (and an editable install) has them.

``make -C agent`` leaves static programs in ``src/stoker/_bin``. Without make and a compiler, programs that are there already
(a source distribution carries them) are used as they are; without either the build stops and says what to install.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROGRAMS = ("stoker-agent", "stoker-shim", "stoker-zygote.so")


class AgentBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs before each wheel, sdist and editable install is put together."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        if shutil.which("make") and any(shutil.which(compiler) for compiler in ("musl-gcc", "cc", "gcc")):
            # A make that called us must not lend its jobserver, whose descriptors are not open here.
            env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
            subprocess.run(["make", "-s", "-C", str(root / "agent"), "all"], check=True, env=env)
        missing = [name for name in PROGRAMS if not (root / "src/stoker/_bin" / name).is_file()]
        if missing:
            raise SystemExit(f"stoker: cannot build {', '.join(missing)}: apt-get install -y make gcc musl-tools")
        if self.target_name == "wheel":
            # The programs are static: any Python 3 of this architecture takes the wheel.
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
