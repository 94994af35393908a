"""Kernels: the distribution's own, or a file of the user's, as a ``vmlinux`` that a VMM starts directly, with its modules.

``debian:12`` is what ``linux-image-cloud-amd64`` of that suite depends on: fetched once, then a name in the store. A path is a
vmlinux or a bzImage; the ELF goes into the store (a rebuilt file must not change a machine that is just starting), its modules stay
where they are.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from stoker.errors import HostError, InvalidRequest, NotFound
from stoker.images.progress import NullProgress, Progress
from stoker.images.store import Stage, Store
from stoker.settings import Settings

__all__ = ["Kernel", "resolve_kernel"]

KIND = "kernels"
POINTER = "path-"
"""Names of kernels that were files begin so."""
META_PACKAGE = "linux-image-cloud-amd64"
PACKAGE_PATTERN = r"linux-(?:image|binary|modules|base)-[0-9][A-Za-z0-9.+~-]*-cloud-amd64"
SPACE = 400 << 20
"""The package, its content and the copy in the store, with a margin (bookworm: 27 + 106 + 150 MiB)."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that can be booted. ``modules`` has the content of ``lib/modules/RELEASE``; None: everything is built in."""

    vmlinux: Path
    release: str
    modules: Path | None
    initrd: Path | None
    digest: str
    name: str
    drivers: tuple[str, ...] = ()
    """Virtio drivers whose names are in the vmlinux itself."""
    signed_modules_only: bool = False
    """The kernel refuses modules without their signature (CONFIG_MODULE_SIG_FORCE)."""


async def resolve_kernel(name: str, settings: Settings, progress: Progress | None = None, *, refresh: bool = False) -> Kernel:
    """The kernel for ``debian:SUITE``, a path or a digest of the store; fetched or imported if need be.

    ``refresh`` asks the archive again although the name is known. Raises :class:`NotFound` (``kernel_unknown``),
    :class:`InvalidRequest` (``kernel_invalid``) and what fetching raises.
    """
    store, told = Store(settings), progress or NullProgress()
    if name.startswith("debian:"):
        from stoker.images.suites import SUITES

        version = name.removeprefix("debian:")
        pointer = f"debian-{SUITES.get(version, version)}"
        if not refresh and _safe(pointer) and (kernel := await _stored(store, pointer, name, told)) is not None:
            return kernel
        return await _fetch(store, settings, version, name, told, refresh)
    if _looks_like_path(name):
        return await _import(store, Path(name), name, told)
    if len(name) == 64 and _safe(name) and (kernel := await _stored(store, name, name, told)) is not None:
        return kernel
    from stoker.images.suites import known_references

    raise NotFound("kernel_unknown", f"there is no kernel {name!r}", f"{known_references()}, or a path to a vmlinux or bzImage")


def _safe(name: str) -> bool:
    return name.replace("-", "").isalnum()


def _looks_like_path(name: str) -> bool:
    return "/" in name or (":" not in name and os.path.exists(name))


async def _stored(store: Store, pointer: str, name: str, progress: Progress) -> Kernel | None:
    found = store.lookup(KIND, pointer)
    if found is None:
        return None
    digest, manifest = found
    facts, place = manifest.facts, store.entry(KIND, digest)
    modules = facts.get("modules_at")
    kernel = Kernel(
        vmlinux=place / "vmlinux",
        release=facts["release"],
        modules=Path(modules) if modules else place / "modules" if facts["modules"] else None,
        initrd=None,
        digest=digest,
        name=name,
        drivers=tuple(facts["drivers"]),
        signed_modules_only=facts["signed_modules_only"],
    )
    await store.require_intact(KIND, digest, progress)
    return kernel if kernel.modules is None or kernel.modules.is_dir() else None


async def _fetch(store: Store, settings: Settings, version: str, name: str, progress: Progress, refresh: bool) -> Kernel:
    from stoker.images import debian
    from stoker.images.suites import parse_suite

    suite = parse_suite(version, "kernel_unknown", "kernel")
    async with store.lock(f"kernel-{suite}", progress, f"another run is fetching the kernel {name}"):
        if not refresh and (kernel := await _stored(store, f"debian-{suite}", name, progress)) is not None:
            return kernel  # the other run was at just this
        await store.sweep()
        store.require_space(SPACE, f"the kernel {name}")
        with store.writing(f"the kernel {name}"):
            packages = await debian.fetch_packages(suite, META_PACKAGE, PACKAGE_PATTERN, settings, store, progress)
            async with store.stage() as stage:
                digest = await _unpack(store, stage, packages, f"debian:{suite}", progress)
        store.point(KIND, f"debian-{suite}", digest)
        for deb in packages:
            deb.unlink(missing_ok=True)
    kernel = await _stored(store, f"debian-{suite}", name, progress)
    if kernel is None:
        raise HostError("image_corrupt", f"{store.entry(KIND, digest)} vanished right after it was made", "try again")
    return kernel


async def _unpack(store: Store, stage: Stage, packages: list[Path], name: str, progress: Progress) -> str:
    from stoker.images.tools import run_tied

    step = "unpacking the kernel"
    content = stage.path / "package"
    for index, deb in enumerate(packages):
        progress.step(step, index, len(packages) + 2, deb.name)
        try:
            await run_tied(["dpkg-deb", "-x", deb, content], pass_fds=(stage.lock_fd,))
        except HostError as e:
            if e.code == "tool_failed" and "No space left" not in e.message:
                deb.unlink(missing_ok=True)
                raise HostError("package_corrupt", f"{deb.name} cannot be unpacked: {e.message}", "try again") from None
            raise
    progress.step(step, len(packages), len(packages) + 2, "vmlinux")
    tree, facts = await asyncio.to_thread(_assemble, stage, content, name)
    progress.step(step, len(packages) + 1, len(packages) + 2, "checksums")
    digest = await asyncio.to_thread(store.publish, stage, tree, KIND, name, facts)
    progress.step(step, len(packages) + 2, len(packages) + 2)
    return digest


def _assemble(stage: Stage, content: Path, name: str) -> tuple[Path, dict[str, object]]:
    """The entry's tree from the unpacked packages, and what is to be known of it."""
    from stoker.images.bzimage import read_kernel

    images = sorted([*content.glob("boot/vmlinuz-*"), *content.glob("usr/lib/modules/*/vmlinuz")])
    if not images:
        raise HostError("package_corrupt", f"the packages of {name} hold no kernel image", "try another suite")
    kernel = read_kernel(images[0])
    tree = stage.path / "kernel"
    tree.mkdir()
    _write(tree / "vmlinux", kernel.vmlinux)
    for base in (content / "usr/lib/modules", content / "lib/modules"):
        if (base / kernel.release).is_dir():
            os.rename(base / kernel.release, tree / "modules")
            break
    candidates = (content / "boot" / f"config-{kernel.release}", tree / "modules" / "config")
    configuration = next((path for path in candidates if path.is_file()), None)
    if configuration is not None:
        os.rename(configuration, tree / "config")
    facts = _facts(kernel.release, kernel.drivers, len(kernel.vmlinux), tree / "config")
    return tree, {**facts, "modules": (tree / "modules").is_dir()}


def _facts(release: str, drivers: tuple[str, ...], size: int, configuration: Path | None) -> dict[str, object]:
    forced = (
        configuration is not None and configuration.is_file() and b"\nCONFIG_MODULE_SIG_FORCE=y\n" in configuration.read_bytes()
    )
    return {"release": release, "drivers": list(drivers), "size": size, "signed_modules_only": forced}


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        os.fchmod(file.fileno(), 0o444)
        file.write(data)


async def _import(store: Store, path: Path, name: str, progress: Progress) -> Kernel:
    try:
        real = path.resolve(strict=True)
        pointer = file_pointer(real)
    except OSError as e:
        raise InvalidRequest("kernel_invalid", f"{path}: {e.strerror}", "give a vmlinux or bzImage") from None
    if (kernel := await _stored(store, pointer, name, progress)) is not None and kernel.modules == find_modules(
        real, kernel.release
    ):
        return kernel
    async with store.lock("kernel-files", progress, "another run is reading a kernel"):
        await store.sweep()
        with store.writing(f"the kernel {real}"):
            async with store.stage() as stage:
                digest = await asyncio.to_thread(_import_now, store, stage, real, progress)
        store.point(KIND, pointer, digest)
    kernel = await _stored(store, pointer, name, progress)
    if kernel is None:
        raise HostError("image_corrupt", f"{store.entry(KIND, digest)} vanished right after it was made", "try again")
    return kernel


def file_pointer(real: Path) -> str:
    """The name of a file's kernel. The file's identity stands for its content, so that one known already is not read again."""
    found = real.stat()
    identity = f"{real}|{found.st_dev}|{found.st_ino}|{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}"
    return POINTER + hashlib.sha256(identity.encode()).hexdigest()[:40]


def _import_now(store: Store, stage: Stage, real: Path, progress: Progress) -> str:
    from stoker.images.bzimage import read_kernel

    step = f"reading the kernel {real}"
    progress.step(step, 0, 2)
    kernel = read_kernel(real)
    store.require_space(len(kernel.vmlinux) + (16 << 20), f"the kernel {real}")
    progress.step(step, 1, 2, kernel.release)
    tree = stage.path / "kernel"
    tree.mkdir()
    _write(tree / "vmlinux", kernel.vmlinux)
    modules = find_modules(real, kernel.release)
    beside = (real.parent / ".config", real.with_name(f"config-{kernel.release}"))
    facts = _facts(kernel.release, kernel.drivers, len(kernel.vmlinux), next((path for path in beside if path.is_file()), None))
    facts |= {"modules": False, "modules_at": str(modules) if modules else ""}
    digest = store.publish(stage, tree, KIND, str(real), facts)
    progress.step(step, 2, 2)
    return digest


def find_modules(kernel: Path, release: str) -> Path | None:
    """The modules that belong to a kernel file: in the tree it lies in, beside it, or the host's own."""
    for base in (*kernel.parents[:3], Path("/")):
        for candidate in (base / "lib/modules" / release, base / "usr/lib/modules" / release, base / "modules" / release):
            if candidate.is_dir() and any(candidate.iterdir()):
                return candidate
    return None
