"""``stoker doctor``: one row per facility, what it enables, and the command that gets it."""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stoker.cli.progress import progress_for
from stoker.errors import HostError, StokerError
from stoker.host.facilities import INSTALL, Facility, Status, Tool, kernel_facilities, kvm_node, probe_tool
from stoker.settings import load_settings

if TYPE_CHECKING:
    from stoker.images.progress import Progress
    from stoker.settings import Settings

__all__ = ["doctor"]

MIB = 1 << 20
LEAST_SPACE = 1500 * MIB
"""What a kernel, a base system and their build take."""


def _tools(settings: Settings) -> tuple[Tool, ...]:
    return (
        Tool(settings.qemu, "qemu-system-x86", "machines", required=True),
        Tool("qemu-system-x86_64-microvm", "qemu-system-x86", "a start 20 ms faster, with KVM"),
        Tool("firecracker", "", "machines under Firecracker", get="not in Debian: put its program on the PATH"),
        Tool("apt-get", "apt", "Debian kernels and bases", required=True),
        Tool("dpkg-deb", "dpkg", "Debian kernels", required=True),
        Tool("mmdebstrap", "mmdebstrap", "Debian bases", required=True),
        Tool("mke2fs", "e2fsprogs", "root file systems", ("-V",), required=True),
        Tool("newuidmap", "uidmap", "Debian bases built without root", ()),
        Tool("setpriv", "util-linux", "tools that end with their owner", required=True),
        Tool("skopeo", "skopeo", "images from registries"),
        Tool("passt", "passt", "networks without root"),
        Tool("dnsmasq", "dnsmasq-base", "addresses and names on tenants' networks"),
        Tool("machinectl", "systemd-container", "machines in machinectl"),
        Tool("ip", "iproute2", "looking into networks by hand", ("-V",)),
        Tool("mkfs.xfs", "xfsprogs", "an XFS pool with reflink", ("-V",)),
        Tool("ssh", "openssh-client", "stoker ssh", ("-V",)),
        Tool("ssh-keygen", "openssh-client", "copies of machines with an SSH server", ()),
    )


def _data_directory(settings: Settings) -> Facility:
    row = Facility("data-directory", Status.OK, "", "kernels, images and disks", "set STOKER_DATA_DIR", True)
    path = settings.data_dir
    directory = next(parent for parent in (path, *path.parents) if parent.is_dir())
    if not os.access(directory, os.W_OK):
        return replace(row, status=Status.BROKEN, detail=f"{directory} cannot be written")
    free = shutil.disk_usage(directory).free
    detail = f"{path}, {free // MIB:,} MiB free"
    if free < LEAST_SPACE:
        return replace(row, status=Status.BROKEN, detail=detail, get=f"free {LEAST_SPACE // MIB:,} MiB, or set STOKER_DATA_DIR")
    return replace(row, detail=detail)


def _programs() -> Facility:
    from stoker.host.binaries import agent_path, shim_path

    row = Facility("agent", Status.OK, "", "every machine", "make -C agent", True)
    try:
        sizes = [f"{path.name} {path.stat().st_size / 1024:.0f} KiB" for path in (agent_path(), shim_path())]
    except HostError as e:
        return replace(row, status=Status.MISSING, detail=e.message, get=e.hint)
    return replace(row, detail=", ".join(sizes))


async def _kvm(settings: Settings, progress: Progress) -> tuple[Facility, str]:
    """KVM's row and the accelerator that machines get. A guest has to answer: that the node opens proves nothing."""
    row = Facility(
        "kvm", Status.MISSING, "", "machines at the speed of the hardware", "enable (nested) virtualisation; modprobe kvm"
    )
    why = kvm_node()
    if why:
        return replace(row, detail=f"{why}; software emulation is used"), "tcg"
    from stoker.host.binaries import agent_path
    from stoker.images.initramfs import build_initramfs
    from stoker.images.kernel import resolve_kernel
    from stoker.vmm.accel import verdict

    try:
        Path(settings.run_dir).mkdir(mode=0o755, parents=True, exist_ok=True)
        kernel = await resolve_kernel(settings.default_kernel, settings, progress)
        initrd = await build_initramfs(kernel, agent_path(), settings, network=False)
        found = await verdict(settings, kernel.vmlinux, initrd)
    except StokerError as e:
        return replace(row, status=Status.UNKNOWN, detail=f"not proved: {e.message}", get=e.hint), "tcg"
    if found.accelerator == "kvm":
        return replace(row, status=Status.OK, detail=f"a guest ran: {found.reason}"), "kvm"
    return replace(row, status=Status.BROKEN, detail=f"{found.reason}; software emulation is used"), str(found.accelerator)


async def examine(settings: Settings, progress: Progress) -> tuple[list[Facility], str]:
    """Every row, and the accelerator."""
    tools = await asyncio.gather(*(probe_tool(tool) for tool in _tools(settings)))
    kvm, accelerator = await _kvm(settings, progress)
    rows = [_programs(), _data_directory(settings), *tools[:1], kvm, *tools[1:3], *kernel_facilities(settings.data_dir), *tools[3:]]
    if os.geteuid() != 0:
        unprivileged = ("newuidmap", "user-namespaces")
        rows = [replace(row, required=True) if row.name in unprivileged else row for row in rows]
    return rows, accelerator


def _install_line(rows: list[Facility]) -> str:
    """One command for everything that a Debian package would bring."""
    packages = dict.fromkeys(
        row.get.removeprefix(INSTALL) for row in rows if row.status is not Status.OK and row.get.startswith(INSTALL)
    )
    return INSTALL + " ".join(packages) if packages else ""


def _print_table(rows: list[Facility]) -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {Status.OK: "green", Status.MISSING: "yellow", Status.BROKEN: "red", Status.UNKNOWN: "yellow"}
    console = Console()
    if not console.is_terminal:
        for row in rows:
            get = f"\t{row.get}" if row.status is not Status.OK else ""
            print(f"{row.name}\t{row.status}\t{row.detail}\t{row.enables}{get}")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("facility", "status", "found", "enables", "how to get it"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        mark = f"[{colours[row.status]}]{row.status}" + (" (needed)" if row.required and row.status is not Status.OK else "")
        table.add_row(row.name, mark, row.detail, row.enables, "" if row.status is Status.OK else row.get)
    console.print(table)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> int:
    """Say what this host can do, what that enables, and how to get the rest.

    KVM is proved by running a guest. Exits with 1 when `stoker run` cannot work.
    """
    settings = load_settings()
    progress = progress_for(as_json)
    try:
        rows, accelerator = asyncio.run(examine(settings, progress))
    finally:
        progress.close()
    needed = [row for row in rows if row.required and row.status is not Status.OK]
    install = _install_line(rows)
    if as_json:
        import json

        report = {
            "ok": not needed,
            "accelerator": accelerator,
            "install": install,
            "facilities": [asdict(row) for row in rows],
        }
        print(json.dumps(report, indent=2))
    else:
        _print_table(rows)
        print()
        if install:
            print(f"All missing Debian packages: {install}")
        if needed:
            print(f"`stoker run` cannot work: {', '.join(f'{row.name} is {row.status}' for row in needed)}")
        else:
            print(f"`stoker run` works, with {'KVM' if accelerator == 'kvm' else 'software emulation (TCG)'}.")
    return 1 if needed else 0
