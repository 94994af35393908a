"""The initramfs: modules in the right order, an archive the kernel understands, a cache that knows its inputs."""

from __future__ import annotations

import gzip
import lzma
import os
from dataclasses import replace
from pathlib import Path

import pytest
from backports import zstd

import images_samples as samples
from stoker.errors import HostError, InvalidRequest
from stoker.images.initramfs import build_initramfs, plan_modules, render_initramfs
from stoker.images.kernel import Kernel
from stoker.images.modules import ModuleTree, module_info, strip_signature
from stoker.settings import Settings, load_settings

pytestmark = pytest.mark.anyio
AGENT = b"\x7fELF" + b"agent" * 100


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    environment = {"STOKER_DATA_DIR": str(tmp_path / "data"), "STOKER_CONFIG": str(tmp_path / "none.toml")}
    return load_settings(environment, root=False)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    modules = samples.module_tree(tmp_path / "modules", samples.VIRTIO)
    return Kernel(tmp_path / "vmlinux", "6.1.0-test", modules, None, "d" * 64, "test")


def unpack(data: bytes) -> dict[str, tuple[int, bytes]]:
    """A second opinion on newc: names to (mode, content). Fails where the kernel's own parser would."""
    entries: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert at % 4 == 0
        assert data[at : at + 6] == b"070701", f"no header at {at}"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        at += 110 + name_size + (-(110 + name_size) % 4)
        if name == b"TRAILER!!!\0":
            assert data[at:].strip(b"\0") == b""
            assert len(data) % 512 == 0
            return entries
        entries[name[:-1].decode()] = (mode, data[at : at + size])
        at += size + (-size % 4)


def test_modules_come_after_what_they_need_in_their_classes(kernel: Kernel) -> None:
    lines, files = plan_modules(kernel, network=True)
    assert lines == [
        "virtio_ring.ko",
        "virtio.ko",
        "virtio_mmio.ko",
        "pci:virtio_pci_modern_dev.ko",
        "pci:virtio_pci.ko",
        "virtio_blk.ko",
        "virtio_console.ko",
        "vsock:vsock.ko",
        "vsock:vmw_vsock_virtio_transport.ko",
        "net:failover.ko",
        "net:net_failover.ko",
        "net:virtio_net.ko",
        "?later:virtio-rng.ko",
        "?later:crypto_fancy.ko",
        "?later:libcrc32c.ko",
        "?later:erofs.ko",
    ]
    assert set(files) == {line.split(":")[-1] for line in lines}


def test_without_a_network_its_modules_are_left_out(kernel: Kernel) -> None:
    lines, files = plan_modules(kernel, network=False)
    assert not any("net:" in line for line in lines)
    assert "virtio_net.ko" not in files


def test_pci_is_the_transport_where_there_is_no_other(kernel: Kernel) -> None:
    assert kernel.modules is not None
    (kernel.modules / "kernel/drivers/virtio/virtio_mmio.ko").unlink()
    lines, _ = plan_modules(kernel, network=False)
    assert "virtio_pci.ko" in lines


@pytest.mark.parametrize("missing", ["virtio_blk", "virtio_console"])
def test_a_kernel_without_virtio_is_refused_by_name(kernel: Kernel, missing: str) -> None:
    assert kernel.modules is not None
    next(kernel.modules.rglob(f"{missing}.ko")).unlink()
    with pytest.raises(InvalidRequest) as caught:
        plan_modules(kernel, network=False)
    assert caught.value.code == "kernel_without_virtio"
    assert missing in caught.value.message
    assert caught.value.details == {"missing": [missing]}
    # ... unless it is built in, as its tree or the vmlinux itself says.
    plan_modules(replace(kernel, drivers=(missing,)), network=False)
    samples.module_tree(kernel.modules, {}, builtin=(missing,))
    plan_modules(kernel, network=False)


def test_a_kernel_without_modules_has_everything_built_in_or_is_refused(kernel: Kernel) -> None:
    whole = replace(kernel, modules=None, drivers=("virtio_mmio", "virtio_blk", "virtio_console"))
    assert plan_modules(whole, network=True) == ([], {})
    with pytest.raises(InvalidRequest, match=r"virtio_mmio \(or virtio_pci\).*lib/modules/6.1.0-test|lacks virtio_mmio"):
        plan_modules(replace(whole, drivers=("virtio_blk", "virtio_console")), network=False)


def test_a_need_that_is_neither_there_nor_built_in_is_an_error(kernel: Kernel) -> None:
    assert kernel.modules is not None
    (kernel.modules / "kernel/net/failover.ko").unlink()
    with pytest.raises(InvalidRequest, match="lacks the module failover"):
        plan_modules(kernel, network=True)


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".zst", zstd.compress), (".gz", gzip.compress)])
def test_compressed_modules_are_unpacked(kernel: Kernel, suffix: str, pack: object) -> None:
    assert kernel.modules is not None and callable(pack)
    expected = plan_modules(kernel, network=True)
    for path in kernel.modules.rglob("*.ko"):
        path.with_name(path.name + suffix).write_bytes(pack(path.read_bytes()))
        path.unlink()
    assert plan_modules(kernel, network=True) == expected
    broken = next(kernel.modules.rglob("virtio_blk.ko*"))
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(InvalidRequest, match=r"virtio_blk\.ko"):
        plan_modules(kernel, network=True)


def test_updates_replace_the_kernels_own(kernel: Kernel) -> None:
    assert kernel.modules is not None
    newer = samples.module("depends=virtio", "name=virtio_blk", "version=2")
    (kernel.modules / "updates").mkdir()
    (kernel.modules / "updates" / "virtio_blk.ko").write_bytes(newer)
    assert plan_modules(kernel, network=False)[1]["virtio_blk.ko"] == newer


def test_signatures_are_stripped_unless_the_kernel_insists(kernel: Kernel) -> None:
    assert kernel.modules is not None
    plain = samples.VIRTIO["drivers/block/virtio_blk.ko"]
    path = kernel.modules / "kernel/drivers/block/virtio_blk.ko"
    path.write_bytes(samples.signed(plain))
    assert plan_modules(kernel, network=False)[1]["virtio_blk.ko"] == plain
    insisting = replace(kernel, signed_modules_only=True)
    assert plan_modules(insisting, network=False)[1]["virtio_blk.ko"] == samples.signed(plain)


@pytest.mark.parametrize(
    "data", [b"", b"~Module signature appended~\n", b"x~Module signature appended~\n", samples.signed(b"", 1 << 30)[1 << 30 :]]
)
def test_a_senseless_signature_is_left_alone(data: bytes) -> None:
    assert strip_signature(data) == data


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x02\x01", samples.elf_sections({".text": b"x"}), samples.module("a=b")[:100]])
def test_what_is_no_module_is_an_error(data: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        module_info(data, "x.ko")
    assert caught.value.code == "bad_module"


def test_modules_that_need_each_other_do_not_loop(tmp_path: Path) -> None:
    tree = ModuleTree(
        samples.module_tree(
            tmp_path / "loop", {"a.ko": samples.module("depends=b"), "b.ko": samples.module("depends=a", "softdep=pre: a")}
        )
    )
    assert [module.name for module, _ in tree.closure("a", set())] == ["b", "a"]


def test_the_archive(kernel: Kernel) -> None:
    entries = unpack(render_initramfs(kernel, AGENT, network=True))
    assert entries["init"] == (0o100755, AGENT)
    assert entries["dev/console"][0] == 0o020600
    assert entries["modules"][0] == 0o040755
    names = list(entries)
    for name in names:
        parent = os.path.dirname(name)
        assert not parent or names.index(parent) < names.index(name), "the kernel makes no parents"
    listed = entries["modules/list"][1].decode().splitlines()
    assert {f"modules/{line.split(':')[-1]}" for line in listed} == {n for n in names if n.endswith(".ko")}
    assert render_initramfs(kernel, AGENT, network=True) == render_initramfs(kernel, AGENT, network=True)


def test_an_agent_that_is_no_program(kernel: Kernel) -> None:
    with pytest.raises(HostError, match="not an ELF"):
        render_initramfs(kernel, b"#!/bin/sh", network=False)


async def test_the_cache_is_keyed_by_everything_that_goes_in(tmp_path: Path, kernel: Kernel, settings: Settings) -> None:
    agent = tmp_path / "agent"
    agent.write_bytes(AGENT)
    base = tmp_path / "base"
    base.write_bytes(b"070701")
    made = [
        await build_initramfs(kernel, agent, settings, network=False),
        await build_initramfs(kernel, agent, settings, network=True),
        await build_initramfs(kernel, agent, settings, network=True, base=base),
        await build_initramfs(replace(kernel, digest="e" * 64), agent, settings, network=True),
        await build_initramfs(replace(kernel, signed_modules_only=True), agent, settings, network=True),
    ]
    agent.write_bytes(AGENT + b"new")
    made.append(await build_initramfs(kernel, agent, settings, network=True))
    assert len(set(made)) == len(made)
    before = made[-1].stat()
    assert await build_initramfs(kernel, agent, settings, network=True) == made[-1]
    assert made[-1].stat().st_ino == before.st_ino
    assert unpack(made[-1].read_bytes())["init"][1] == AGENT + b"new"
    assert [path for path in made[0].parent.iterdir() if path.suffix != ".cpio"] == []


@pytest.mark.parametrize("pack", [None, gzip.compress, zstd.compress, lzma.compress])
async def test_a_users_initrd_comes_first_and_ours_starts_where_the_kernel_looks(
    tmp_path: Path, kernel: Kernel, settings: Settings, pack: object
) -> None:
    agent, base = tmp_path / "agent", tmp_path / "base"
    agent.write_bytes(AGENT)
    content = render_initramfs(kernel, AGENT, network=False)[:1000]
    content = pack(content) if callable(pack) else content
    base.write_bytes(content)
    data = (await build_initramfs(kernel, agent, settings, network=False, base=base)).read_bytes()
    ours = render_initramfs(kernel, AGENT, network=False)
    assert data.startswith(content)
    at = data.index(ours)
    gap, end = data[len(content) : at], data[at + len(ours) :]
    assert gap.strip(b"\0") == b"" and len(gap) < 512
    assert at % 512 == 0
    # The last page of memory is left to the firmware's tables: docs/initramfs.md.
    assert len(data) % 4096 == 0 and end.strip(b"\0") == b"" and len(end) < 4096


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4 a zip"])
async def test_what_is_no_initrd_is_refused(tmp_path: Path, kernel: Kernel, settings: Settings, content: bytes | None) -> None:
    agent, base = tmp_path / "agent", tmp_path / "base"
    agent.write_bytes(AGENT)
    if content is not None:
        base.write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        await build_initramfs(kernel, agent, settings, network=False, base=base)
    assert caught.value.code == "initrd_invalid"
