"""The initramfs: the agent as ``/init`` and the modules this kernel needs to reach its disk, its console and its network.

The archive and the format of its module list are specified in ``docs/initramfs.md``. Uncompressed: it is a megabyte, and the guest
would spend longer unpacking it than the host saves. Cached under ``cache/initramfs`` by inputs: the kernel's digest, the identity
of the agent's and the user's file (device, inode, size, times: nothing is read when it is there already), the options and this
module's version. A crash leaves at most a temporary file there, which a later build removes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from stoker.errors import HostError, InvalidRequest
from stoker.images.kernel import Kernel
from stoker.images.store import Store, translate_errors
from stoker.settings import Settings

__all__ = ["build_initramfs", "plan_modules", "render_initramfs", "superfluous"]

FORMAT = 3
"""Part of the cache key: raise it when the archive's content changes for the same inputs."""
PAGE = 4096
"""QEMU lays an initrd right below the end of memory, at a page's start, and newer SeaBIOS puts a microvm's ACPI tables (1 to 3 KB)
at the very end before it is read: an archive that fills the last page writes over them, and the guest then knows of no device. One
of whole pages leaves that page free."""
MAX_BASE = 1 << 30
KEPT_SECONDS = 30 * 24 * 3600
TOUCHED_EVERY = 3600
"""Seconds between two notes that one was used."""
USED_LATELY = 2 * TOUCHED_EVERY

TRANSPORTS = ("virtio_mmio", "virtio_pci")
NETWORK = ("virtio_net",)
VSOCK = ("vmw_vsock_virtio_transport",)
LATER = ("virtio_rng", "overlay", "erofs")


async def build_initramfs(kernel: Kernel, agent: Path, settings: Settings, *, network: bool, base: Path | None = None) -> Path:
    """The initramfs for a boot; built if these inputs are new. ``base`` is a user's initrd that ours is laid over.

    Raises ``kernel_without_virtio``, ``bad_module``, ``initrd_invalid`` and ``no_space``.
    """
    inputs = [
        str(FORMAT),
        kernel.digest,
        str(kernel.signed_modules_only),
        _identity(agent),
        str(network),
        _identity(base) if base else "",
    ]
    if kernel.modules is not None and settings.data_dir not in kernel.modules.parents:
        # A user's tree may change; what installs modules there writes these anew.
        inputs += [_identity(path) for name in ("", "modules.dep", "modules.order") if (path := kernel.modules / name).exists()]
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
    path = settings.data_dir.absolute() / "cache" / "initramfs" / f"{key}.cpio"
    try:
        if time.time() - path.stat().st_mtime > TOUCHED_EVERY:
            os.utime(path)  # used: not to be removed soon
        return path
    except FileNotFoundError:
        pass
    except PermissionError:
        return path  # another user's store: readable is all it needs to be
    store = Store(settings)
    async with store.lock("initramfs"):
        if not path.exists():
            await asyncio.to_thread(_build, store, kernel, agent, network, base, path)
    return path


def _identity(path: Path) -> str:
    try:
        found = os.stat(path)
    except OSError as e:
        raise InvalidRequest("initrd_invalid", f"{path}: {e.strerror}", f"ls -l {path}") from None
    return f"{path}|{found.st_dev}|{found.st_ino}|{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}"


def _build(store: Store, kernel: Kernel, agent: Path, network: bool, base: Path | None, path: Path) -> None:
    from stoker.images.cpio import pad

    directory = store.directory("cache", "initramfs")
    _prune(directory)
    data = _read_base(base) if base else b""
    data += render_initramfs(kernel, agent.read_bytes(), network=network)
    data += pad(data, PAGE)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    with translate_errors(store.root, "an initramfs"):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o444)
            os.rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _prune(directory: Path) -> None:
    for file, _ in superfluous(directory):
        file.unlink(missing_ok=True)


def superfluous(directory: Path, bound: int | None = None) -> list[tuple[Path, str]]:
    """What may go, and why: what has not been used for a month, temporary files of runs that were killed, and with ``bound`` the
    longest unused ones beyond so many bytes. One that was used lately stays in any case: a boot may be about to open it."""
    found = []
    for file in directory.iterdir():
        try:
            status = file.stat()
            found.append((time.time() - status.st_mtime, status.st_blocks * 512, file))
        except FileNotFoundError:
            continue
    going, kept = [], 0
    for age, size, file in sorted(found):
        if file.suffix != ".cpio":
            if age > 600:
                going.append((file, "its build was killed"))
        elif age > KEPT_SECONDS:
            going.append((file, "unused for a month"))
        elif bound is not None and age > USED_LATELY and kept + size > bound:
            going.append((file, f"not among the last {bound >> 20} MiB that were used"))
        else:
            kept += size
    return going


def _read_base(base: Path) -> bytes:
    """A user's initrd, padded so that ours may follow: the kernel takes any number of archives, each compressed or not."""
    from stoker.images.cpio import pad

    try:
        if not base.is_file():
            raise InvalidRequest("initrd_invalid", f"{base} is not a regular file", f"ls -l {base}")
        if base.stat().st_size > MAX_BASE:
            raise InvalidRequest("initrd_invalid", f"{base} is larger than {MAX_BASE >> 30} GiB", "give a smaller initrd")
        data = base.read_bytes()
    except PermissionError as e:
        raise InvalidRequest("initrd_invalid", f"{base} cannot be read: {e.strerror}", f"ls -l {base}") from None
    known = (
        b"070701",
        b"070702",
        b"\x1f\x8b",
        b"\xfd7zXZ\0",
        b"\x28\xb5\x2f\xfd",
        b"\x02\x21\x4c\x18",
        b"BZh",
        b"\x5d\0\0",
        b"\x89LZO",
    )
    if not data.startswith(known):
        hint = "give a cpio archive (newc), compressed or not"
        raise InvalidRequest("initrd_invalid", f"{base} is no initrd: it begins with {data[:6].hex(' ') or 'nothing'}", hint)
    return data + pad(data, 512)


def render_initramfs(kernel: Kernel, agent: bytes, *, network: bool) -> bytes:
    """The archive, from a kernel's modules and the agent's bytes."""
    from stoker.images.cpio import Archive

    if agent[:4] != b"\x7fELF":
        raise HostError("agent_invalid", "the guest agent is not an ELF file", "make -C agent")
    lines, files = plan_modules(kernel, network=network)
    archive = Archive()
    for directory in ("dev", "proc", "sys", "run", "tmp", "modules"):
        archive.directory(directory)
    archive.character_device("dev/console", 5, 1, 0o600)
    archive.character_device("dev/null", 1, 3, 0o666)
    archive.file("init", agent, 0o755)
    archive.file("modules/list", "".join(f"{line}\n" for line in lines).encode())
    for name, data in files.items():
        archive.file(f"modules/{name}", data)
    return archive.finish()


def plan_modules(kernel: Kernel, *, network: bool) -> tuple[list[str], dict[str, bytes]]:
    """The lines of ``modules/list`` and the files they name."""
    if kernel.modules is None:
        _require(kernel, lambda name: name in kernel.drivers)
        return [], {}
    from stoker.images.modules import ModuleTree

    tree = ModuleTree(kernel.modules, keep_signatures=kernel.signed_modules_only)
    _require(kernel, lambda name: tree.has(name) or name in tree.builtin or name in kernel.drivers)
    lines: list[str] = []
    files: dict[str, bytes] = {}
    loaded: set[str] = set()

    def add(prefix: str, names: tuple[str, ...]) -> None:
        for name in names:
            if not tree.has(name):
                continue
            for module, optional in tree.closure(name, loaded):
                lines.append(f"{'?' if optional or prefix == 'later:' else ''}{prefix}{module.file}")
                files[module.file] = module.data

    mmio = tree.has("virtio_mmio") or "virtio_mmio" in tree.builtin or "virtio_mmio" in kernel.drivers
    add("", ("virtio_mmio",))
    add("pci:" if mmio else "", ("virtio_pci",))
    add("", ("virtio_blk", "virtio_console", "ext4"))
    add("vsock:", VSOCK)
    if network:
        add("net:", NETWORK)
    add("later:", LATER)
    return lines, files


def _require(kernel: Kernel, has: Callable[[str], bool]) -> None:
    missing = [name for name in ("virtio_blk", "virtio_console") if not has(name)]
    if not any(has(name) for name in TRANSPORTS):
        missing.insert(0, "virtio_mmio (or virtio_pci)")
    if missing:
        options = "CONFIG_VIRTIO_MMIO, CONFIG_VIRTIO_BLK and CONFIG_VIRTIO_CONSOLE"
        where = f"; its modules are expected in lib/modules/{kernel.release} beside it" if kernel.modules is None else ""
        raise InvalidRequest(
            "kernel_without_virtio",
            f"the kernel {kernel.name} ({kernel.release}) lacks {', '.join(missing)}",
            f"build it with {options}{where}",
            details={"missing": missing},
        )
