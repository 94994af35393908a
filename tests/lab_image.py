"""The lab's root file system: built from the distribution's packages by the project's own code, once for the same inputs.

::

    data_dir/lab/FLAVOUR-KEY/
      rootfs.ext4                packages, the tests' Python environment (/opt/stoker), Stoker's kernel and base (/var/lib/stoker)
      vmlinuz-RELEASE            the distribution's own kernel of that tree
      lib/modules/RELEASE/       where our kernel code looks for its modules
      python/                    the tree's Python and what it needs to run on the host: it compiles the checkout for the lab

    data_dir/cache/lab/FLAVOUR-KEY.tar   what mmdebstrap made of the packages, which takes most of the time

KEY stands for the packages, the locked Python packages, the digests of kernel and base, and this module's text. A directory
appears by a rename out of the store's ``staging``, under the store's lock, so it is whole or not there; those of other keys go a
week after their last use. Everything that a test inside may need is in it: nothing in the lab has a network.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from stoker.host import ext4
from stoker.images.bootstrap import bootstrap, make_ext4
from stoker.images.kernel import Kernel, resolve_kernel
from stoker.images.progress import Progress
from stoker.images.rootfs import RootFilesystem, resolve_image
from stoker.images.store import Stage, Store
from stoker.settings import Settings

CHECKOUT = Path(__file__).resolve().parents[1]
FREE = 6 << 30
"""Sparse: what tests may fill."""
KEPT = 7 * 24 * 3600.0

PACKAGES = (
    "systemd systemd-sysv systemd-container dbus udev kmod procps util-linux iproute2 nftables dnsmasq-base wireguard-tools "
    "dmsetup e2fsprogs xfsprogs btrfs-progs qemu-system-x86 qemu-utils python3 python3-venv linux-image-cloud-amd64"
)
TESTERS = frozenset("pytest pytest-timeout iniconfig pluggy packaging pygments hypothesis sortedcontainers".split())
"""What of the development's lock file the lab has besides the product's: pytest, and what the tests there import."""


@dataclass(frozen=True, slots=True)
class Flavour:
    """A distribution to be a host in. ``memory`` is bytes."""

    name: str
    suite: str
    packages: tuple[str, ...]
    options: tuple[str, ...] = ()
    memory: int = 4 << 30


FLAVOURS = {
    "stable": Flavour("stable", "trixie", tuple(PACKAGES.split())),
    # A mirror may lag behind: then its release file is past its date. Only here, where nothing is served from the result.
    "next": Flavour("next", "sid", tuple(PACKAGES.split()), ('--aptopt=Acquire::Check-Valid-Until "false"',)),
}


@dataclass(frozen=True, slots=True)
class LabImage:
    """What a lab is booted from."""

    flavour: Flavour
    rootfs: Path
    kernel: Path


def requirements(lock: str, development: str, version: str) -> str:
    """The entries of the lock files for the lab's environment, hashes included, under a Python of that version.

    Conditions are decided here: pip would ask the Python it runs in itself, which is the host's.
    """
    from packaging.requirements import Requirement

    there = {"python_version": version, "python_full_version": f"{version}.0"}
    chosen: dict[str, str] = {}
    for text, wanted in ((lock, None), (development, TESTERS)):
        for entry in re.split(r"\n(?=[a-zA-Z0-9])", text.strip()):
            line, _, hashes = entry.partition(" \\\n")
            parsed = Requirement(line)
            if (wanted is None or parsed.name in wanted) and (parsed.marker is None or parsed.marker.evaluate(there)):
                chosen[parsed.name] = f"{parsed.name}{parsed.specifier} \\\n{hashes}"
    return "".join(f"{entry}\n" for entry in chosen.values())


def _locks() -> tuple[str, str]:
    return (CHECKOUT / "requirements.lock").read_text(), (CHECKOUT / "requirements-dev.lock").read_text()


async def lab_image(flavour: Flavour, settings: Settings, progress: Progress) -> LabImage:
    """The flavour's image; built if these inputs are new."""
    guest_kernel = await resolve_kernel("debian:12", settings, progress)
    base = await resolve_image("debian:12", settings, progress)
    store = Store(settings)
    inputs = [repr(flavour), *_locks(), guest_kernel.digest, base.digest, Path(__file__).read_text()]
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:20]
    parent = settings.data_dir.absolute() / "lab"
    place = parent / f"{flavour.name}-{key}"
    async with store.lock(f"lab-{flavour.name}", progress, f"another run is building the lab {flavour.name}"):
        if not place.is_dir():
            parent.mkdir(exist_ok=True)
            _prune(parent, flavour)
            await store.sweep()
            async with store.stage() as stage:
                await _build(flavour, settings, stage, progress, guest_kernel, base)
                os.rename(stage.path / "lab", place)
    os.utime(place)
    return LabImage(flavour, place / "rootfs.ext4", next(place.glob("vmlinuz-*")))


def _prune(parent: Path, flavour: Flavour) -> None:
    for old in parent.glob(f"{flavour.name}-*"):
        if time.time() - old.stat().st_mtime > KEPT:
            shutil.rmtree(old)


async def _packages(flavour: Flavour, settings: Settings, stage: Stage, progress: Progress) -> Path:
    """The archive of a tree with the flavour's packages."""
    cache = settings.data_dir.absolute() / "cache/lab"
    path = cache / f"{flavour.name}-{hashlib.sha256(repr(flavour).encode()).hexdigest()[:20]}.tar"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.glob(f"{flavour.name}-*"):
            old.unlink()
        options = (f"--include={','.join(flavour.packages)}", *flavour.options)
        os.rename(await bootstrap(flavour.suite, settings, stage, progress, options=options), path)
    return path


async def _build(
    flavour: Flavour, settings: Settings, stage: Stage, progress: Progress, kernel: Kernel, base: RootFilesystem
) -> ext4.Plan:
    place = stage.path / "lab"
    place.mkdir()
    archive = stage.path / "packages.tar"
    os.link(await _packages(flavour, settings, stage, progress), archive)

    def prepare(tree: Path) -> None:
        release = next((tree / "usr/lib/modules").iterdir()).name
        shutil.move(tree / "boot" / f"vmlinuz-{release}", place)
        shutil.copytree(tree / "usr/lib/modules" / release, place / "lib/modules" / release, symlinks=True)
        for image in (tree / "boot").glob("initrd*"):
            image.unlink()
        _settle(tree)
        _give_store(tree, settings, kernel, base)
        _give_python(tree)
        _keep_python(tree, place / "python")

    return await make_ext4(archive, stage, place / "rootfs.ext4", progress, free=FREE, prepare=prepare)


MASKED = (
    "apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer dpkg-db-backup.timer "
    "serial-getty@ttyS0.service getty@tty1.service systemd-networkd.service systemd-firstboot.service"
)


def _settle(tree: Path) -> None:
    """A host that is up soon, does nothing by itself, and has an identity."""
    (tree / "etc/machine-id").write_text(hashlib.sha256(os.urandom(16)).hexdigest()[:32] + "\n")
    for unit in MASKED.split():
        link = tree / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    with open(tree / "etc/group", "a") as file:
        file.write("stoker:x:990:\n")


def _give_store(tree: Path, settings: Settings, kernel: Kernel, base: RootFilesystem) -> None:
    """The kernel and base ``debian:12`` of this host's store."""
    store, inside = Store(settings), tree / "var/lib/stoker"
    for kind, digest in (("kernels", kernel.digest), ("images", base.digest)):
        (inside / kind / "names").mkdir(parents=True)
        # cp keeps the holes of a sparse image.
        subprocess.run(["cp", "-a", "--sparse=always", store.entry(kind, digest), inside / kind / digest], check=True)
        (inside / kind / "names" / "debian-bookworm").write_text(f"{digest}\n")


def _give_python(tree: Path) -> None:
    """A virtual environment for the lab's Python, from the pinned archives; the checkout comes later, at ``/srv/stoker``."""
    version = os.readlink(tree / "usr/bin/python3").removeprefix("python")
    environment = tree / "opt/stoker"
    site = environment / "lib" / f"python{version}" / "site-packages"
    site.mkdir(parents=True)
    (environment / "bin").mkdir()
    for name in ("python", "python3"):
        (environment / "bin" / name).symlink_to("/usr/bin/python3")
    (environment / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {version}\n")
    script = environment / "bin/stoker"
    script.write_text("#!/opt/stoker/bin/python\nimport sys\n\nfrom stoker.cli.main import entry\n\nsys.exit(entry())\n")
    script.chmod(0o755)
    (tree / "usr/local/bin/stoker").symlink_to("/opt/stoker/bin/stoker")
    wanted = environment / "requirements.txt"
    wanted.write_text(requirements(*_locks(), version))
    argv = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile", "--require-hashes"]
    argv += ["--only-binary=:all:", "--no-deps", "--implementation", "cp", "--python-version", version, "--target", str(site)]
    done = subprocess.run([*argv, "-r", str(wanted)], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the lab's Python packages cannot be had:\n{done.stderr}")
    (site / "stoker.pth").write_text("/srv/stoker/src\n")
    if os.geteuid() == 0:
        # Compiled here, at this processor's own speed; else the first import inside does it.
        subprocess.run(["chroot", tree, "python3", "-m", "compileall", "-q", f"/opt/stoker/lib/python{version}"], check=True)


LIBRARIES = ("ld-linux-x86-64.so.2", "libc.so.6", "libm.so.6", "libz.so.1", "libexpat.so.1")


def _keep_python(tree: Path, place: Path) -> None:
    name = os.readlink(tree / "usr/bin/python3")
    shutil.copytree(tree / "usr/lib" / name, place / "lib" / name, symlinks=True)
    shutil.copy(tree / "usr/bin" / name, place / "python")
    for library in LIBRARIES:
        shutil.copy(tree / "usr/lib/x86_64-linux-gnu" / library, place / "lib")


def compile_for(image: LabImage, checkout: Path, inside: str) -> None:
    """Compiles a checkout's Python, which will be in the directory ``inside`` of the lab, at the host's speed."""
    home = image.rootfs.parent / "python"
    argv: list[str | Path] = [
        home / "lib" / LIBRARIES[0],
        "--library-path",
        home / "lib",
        home / "python",
        "-m",
        "compileall",
        "-q",
    ]
    done = subprocess.run(
        [*argv, "-s", checkout, "-p", inside, checkout / "src", checkout / "tests"],
        env={"PYTHONHOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the checkout cannot be compiled for the lab:\n{done.stdout}{done.stderr}")


class Said(Progress):
    """Progress as lines on standard error, one for each step."""

    def __init__(self) -> None:
        self._last = ""

    def step(self, name: str, done: float | None, total: float | None, detail: str = "") -> None:
        if name != self._last:
            self._last = name
            print(f"lab: {name}", file=sys.stderr, flush=True)


def build(flavour: Flavour, settings: Settings) -> LabImage:
    """:func:`lab_image` for a caller without an event loop."""
    return asyncio.run(lab_image(flavour, settings, Said()))
