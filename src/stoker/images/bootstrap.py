"""A Debian base system as an ext4 file, as root or as nobody in particular.

mmdebstrap installs the packages and writes a tar archive; tar unpacks it in the staging directory, mke2fs copies that tree into a
new file system. Where the archive says another owner or mode than the unpacked file could get (every file, for an unprivileged
user), debugfs writes it into the finished file system. So there is one way for root, for users and inside a chroot: no mount, no
device, no fakeroot; only mmdebstrap itself needs a user namespace when it is not root.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stoker.errors import HostError
from stoker.host import ext4
from stoker.host.files import mounts_below
from stoker.host.run import run, tool_environment
from stoker.images import debian
from stoker.images.progress import Progress
from stoker.images.store import Stage, no_space
from stoker.images.tools import run_tied
from stoker.settings import Settings

__all__ = ["BUILD_SPACE", "bootstrap", "make_ext4", "remove_foreign_tree"]

BUILD_SPACE = 1200 << 20
"""What a build takes at its height: mmdebstrap's tree, the archive, our tree and the image (bookworm: 4 x 150 MiB)."""
FREE = 512 << 20
"""Free space in a base's file system; a larger disk is grown into by the guest."""
EXCLUDED = ("./dev/?*", "./etc/hostname", "./etc/resolv.conf", "./etc/fstab")
"""What mmdebstrap copies from this host, and what is the machine's own business: not part of an image."""
HOOKS = Path("/usr/share/mmdebstrap/hooks/maybe-merged-usr")
TOOLS = {"mmdebstrap": "mmdebstrap", "tar": "tar", "mke2fs": "e2fsprogs", "debugfs": "e2fsprogs", "setpriv": "util-linux"}


@dataclass(slots=True)
class _Steps:
    """mmdebstrap's and apt's words as progress: a weight for each phase, a fraction inside it."""

    progress: Progress
    name: str
    phase: float = 0.0
    width: float = 5.0
    packages: int = 0
    seen: int = 0
    full: bool = False
    """A tool said that there is no space left: mmdebstrap's own last words do not tell."""
    marks: tuple[tuple[str, float, float], ...] = field(
        default=(
            ("I: running --setup-hook", 0, 10),
            ("I: downloading packages", 10, 25),
            ("I: extracting archives", 35, 10),
            ("I: installing essential", 45, 40),
            ("I: downloading apt", 85, 2),
            ("I: installing apt", 87, 8),
            ("I: installing remaining", 87, 8),
            ("I: cleaning", 95, 2),
            ("I: creating tarball", 97, 3),
        )
    )

    def __call__(self, line: str) -> None:
        if "No space left on device" in line or "Disk quota exceeded" in line:
            self.full = True
        for mark, phase, width in self.marks:
            if line.startswith(mark):
                self.phase, self.width, self.seen = phase, width, 0
                self.progress.step(self.name, phase, 100.0, line.removeprefix("I: ").rstrip("."))
                return
        if found := re.match(r"\d+ upgraded, (\d+) newly installed", line):
            self.packages = int(found[1])
        elif found := re.match(r"(?:Get:\d+ \S+ \S+ \S+ (?=.* (?:amd64|all) )|Unpacking |Setting up )(\S+)", line):
            self.seen += 1
            total = self.packages * (1 if line.startswith("Get:") else 2) or 200
            self.progress.step(self.name, self.phase + self.width * min(1.0, self.seen / total), 100.0, found[1])


def _require_tools() -> None:
    path = tool_environment()["PATH"]
    missing = sorted({package for tool, package in TOOLS.items() if not shutil.which(tool, path=path)})
    if missing:
        what = ", ".join(missing)
        details = {"tool": missing[0], "packages": missing}
        raise HostError(
            "tool_missing", f"building a Debian base needs {what}", f"apt-get install {' '.join(missing)}", details=details
        )


def _mode() -> str:
    """How mmdebstrap gets to be root in its tree."""
    if os.geteuid() == 0:
        return "root"
    path = tool_environment()["PATH"]
    if shutil.which("newuidmap", path=path) and _has_subordinate_ids():
        return "unshare"
    if shutil.which("fakechroot", path=path) and shutil.which("fakeroot", path=path):
        return "fakechroot"
    if not shutil.which("newuidmap", path=path):
        hint, why = "apt-get install uidmap", "newuidmap is not installed"
    else:
        import getpass

        user = getpass.getuser()
        hint, why = f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}", f"{user} has no subordinate ids"
    raise HostError("tool_missing", f"an unprivileged build needs a user namespace: {why}", hint, details={"tool": "uidmap"})


def _has_subordinate_ids() -> bool:
    import pwd

    names = {pwd.getpwuid(os.getuid()).pw_name, str(os.getuid())}
    for file in ("/etc/subuid", "/etc/subgid"):
        try:
            lines = Path(file).read_text().splitlines()
        except OSError:
            return False
        if not any(line.split(":")[0] in names and int(line.split(":")[2]) >= 65536 for line in lines if line.count(":") == 2):
            return False
    return True


def _temporary_directory(stage: Stage, mode: str) -> Path:
    """Where mmdebstrap builds its tree. In a user namespace it is not us any more, so every directory above must let it through."""
    inside = stage.path / "tmp"
    inside.mkdir()
    inside.chmod(0o755)  # whatever the umask
    if mode == "root" or all(parent.stat().st_mode & 0o001 for parent in inside.parents):
        return inside
    outside = Path("/var/tmp" if os.access("/var/tmp", os.W_OK) else "/tmp", f"stoker-{os.getuid()}-{os.urandom(6).hex()}")
    stage.elsewhere(outside)
    outside.mkdir()
    outside.chmod(0o755)
    return outside


async def _own_mounts(mode: str) -> list[str]:
    """What puts mmdebstrap in a mount namespace of its own, so that a killed build leaves no mounts on the host.

    In a user namespace it has one. As root, ``private`` keeps its mounts from the host's shared tree; in a chroot, whose root is no
    mount point, that cannot be said, and a container may allow neither.
    """
    if mode == "root":
        for propagation in ("private", "unchanged"):
            prefix = ["unshare", "--mount", "--propagation", propagation]
            if (await run([*prefix, "true"], check=False)).code == 0:
                return prefix
    return []


async def bootstrap(suite: str, settings: Settings, stage: Stage, progress: Progress, *, options: Sequence[str] = ()) -> Path:
    """Installs a minimal Debian with apt; returns a tar archive of it inside the stage. ``options`` are mmdebstrap's."""
    _require_tools()
    mode, keyring = _mode(), debian.keyring()
    sources = stage.path / "debian.sources"
    sources.write_text(debian.render_sources(suite, await debian.find_mirrors(settings, suite), keyring))
    archive, temporary = stage.path / "tree.tar", _temporary_directory(stage, mode)
    argv: list[str | Path] = [*await _own_mounts(mode), "mmdebstrap", "--verbose", "--variant=minbase", f"--mode={mode}"]
    argv += ["--format=tar", "--architectures=amd64"]
    argv += [f"--hook-dir={HOOKS}"] if HOOKS.is_dir() else []
    # The tree is synced as a whole when it is in the store; dpkg's own syncs cost a quarter of the time. Not left in the image.
    argv += ["--dpkgopt=force-unsafe-io", '--customize-hook=rm "$1"/etc/dpkg/dpkg.cfg.d/99mmdebstrap']
    argv += ['--customize-hook=mv "$1"/etc/apt/sources.list.d/0000debian.sources "$1"/etc/apt/sources.list.d/debian.sources']
    argv += [*options, suite, "-", sources]
    name = f"installing Debian {suite}"
    progress.step(name, 0.0, 100.0)
    steps = _Steps(progress, name)
    try:
        with open(archive, "xb") as out:
            environment = tool_environment({"TMPDIR": str(temporary)})
            await run_tied(argv, env=environment, stdout=out.fileno(), pass_fds=(stage.lock_fd,), on_line=steps)
    except HostError as e:
        raise (no_space(temporary, f"installing Debian {suite}") if steps.full else _bootstrap_error(e, suite)) from None
    finally:
        if temporary.parent != stage.path:
            await remove_foreign_tree(temporary)
    progress.step(name, 100.0, 100.0)
    return archive


def _bootstrap_error(e: HostError, suite: str) -> HostError:
    told = e.details.get("stderr", [])
    text = "\n".join(told)
    if e.code != "tool_failed" or "No space left" in text:
        return e
    reason = next((line for line in told if line.startswith("E: ") and "mmdebstrap failed" not in line), e.message)
    if re.search(r"NO_PUBKEY|EXPKEYSIG|BADSIG|not signed|GPG error|not valid (yet|anymore)|is expired", text):
        hint = "check the clock, or try another mirror"
        return HostError("signature_invalid", f"Debian {suite} is not signed as it must be: {reason}", hint, details=e.details)
    if re.search(r"Failed to fetch|Could not resolve|Could not connect|Temporary failure|apt-get.* failed", text):
        hint = "check the network and the mirror: apt-get update; or set STOKER_DEBIAN_MIRROR"
        return HostError("fetch_failed", f"Debian {suite} cannot be fetched: {reason}", hint, details=e.details)
    return HostError(
        "build_failed", f"Debian {suite} cannot be installed: {reason}", "STOKER_DEBUG=1 shows more", details=e.details
    )


async def remove_foreign_tree(tree: Path) -> None:
    """Removes a tree in which a user namespace of this user owns files (mmdebstrap's helper enters such a namespace)."""
    if not mounts_below(tree):
        await run(["mmdebstrap", "--unshare-helper", "rm", "-rf", "--one-file-system", tree], check=False)


async def make_ext4(
    archive: Path,
    stage: Stage,
    image: Path,
    progress: Progress,
    *,
    free: int = FREE,
    prepare: Callable[[Path], None] | None = None,
) -> ext4.Plan:
    """Makes ``image`` from a tar archive of a root file system. ``prepare`` may change the unpacked tree, in a thread."""
    name = "making the root file system"
    progress.step(name, 0, 4, "unpacking")
    tree = stage.path / "tree"
    tree.mkdir(mode=0o755)
    excluded = [f"--exclude={pattern}" for pattern in EXCLUDED]
    argv: list[str | Path] = [
        "tar",
        "--anchored",
        *excluded,
        "--no-same-owner",
        "--numeric-owner",
        "-p",
        "--delay-directory-restore",
    ]
    await run_tied([*argv, "-C", tree, "-xf", archive], pass_fds=(stage.lock_fd,))
    progress.step(name, 1, 4, "measuring")
    script = await asyncio.to_thread(_differences, archive, tree)
    archive.unlink()
    if prepare is not None:
        await asyncio.to_thread(prepare, tree)
    blocks, inodes = await asyncio.to_thread(ext4.measure, tree)
    plan = ext4.plan_size(blocks, inodes, free)
    progress.step(name, 2, 4, f"{plan.size >> 20} MiB")
    await run_tied(ext4.mke2fs_command(tree, image, plan, str(uuid.uuid4())), pass_fds=(stage.lock_fd,))
    progress.step(name, 3, 4, "owners")
    await _own(image, script, stage)
    os.chmod(image, 0o444)
    progress.step(name, 4, 4)
    return plan


def _differences(archive: Path, tree: Path) -> str:
    """What the unpacked tree does not have as the archive says, as commands for debugfs; files get to be readable for the copy."""
    import stat
    import tarfile

    types: dict[bytes, int] = {tarfile.REGTYPE: stat.S_IFREG, tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK}
    entries: list[ext4.Ownership] = []
    with tarfile.open(archive, "r:") as tar:
        for member in tar:
            path = tree / member.name
            try:
                found = path.lstat()
            except FileNotFoundError:
                continue  # excluded
            kind = types.get(member.type, stat.S_IFMT(found.st_mode))
            wanted = kind | (member.mode & 0o7777 if kind != stat.S_IFLNK else 0o777)
            unreadable = kind in (stat.S_IFREG, stat.S_IFDIR) and not found.st_mode & stat.S_IRUSR
            if unreadable:
                path.chmod(stat.S_IMODE(found.st_mode) | (stat.S_IRWXU if kind == stat.S_IFDIR else stat.S_IRUSR))
            other_mode = unreadable or (kind != stat.S_IFLNK and wanted != found.st_mode)
            if other_mode or (found.st_uid, found.st_gid) != (member.uid, member.gid):
                entries.append(
                    ext4.Ownership(member.name.removeprefix("."), member.uid, member.gid, wanted if other_mode else None)
                )
    return ext4.ownership_script(entries)


async def _own(image: Path, script: str, stage: Stage) -> None:
    if not script:
        return
    commands = stage.path / "debugfs"
    commands.write_text(script)
    done = await run_tied(["debugfs", "-w", "-f", commands, image], pass_fds=(stage.lock_fd,))
    # debugfs ends with 0 whatever happens; it says what went wrong, and only that, behind its banner.
    said = [
        line for line in done.stderr.decode(errors="replace").splitlines() if line.strip() and not line.startswith("debugfs 1.")
    ]
    if said:
        raise HostError(
            "build_failed",
            f"debugfs could not set the owners of files: {said[0]}",
            "please report it",
            details={"stderr": said[:20]},
        )
