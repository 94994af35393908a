"""Kernels given as files: taken apart, checked, imported."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
from pathlib import Path

import pytest
from backports import zstd

import images_samples as samples
from stoker.errors import HostError, InvalidRequest, NotFound
from stoker.host.files import remove_tree
from stoker.images import bzimage
from stoker.images.kernel import resolve_kernel
from stoker.settings import Settings, load_settings

pytestmark = pytest.mark.anyio
ELF = samples.vmlinux()
CODECS = {
    "lz4": samples.lz4_legacy,
    "zstd": lambda data: zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}),
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    environment = {"STOKER_DATA_DIR": str(tmp_path / "data"), "STOKER_CONFIG": str(tmp_path / "none.toml")}
    return load_settings(environment, root=False)


@pytest.mark.parametrize("codec", CODECS)
def test_the_elf_comes_out_of_every_kind_of_bzimage(codec: str) -> None:
    packed = CODECS[codec](ELF)
    # gzip's own trailer is the length; the kernel's build appends it for all others.
    payload = packed if codec == "gzip" else samples.with_length(packed, ELF)
    assert bzimage.unpack_bzimage(samples.bzimage(payload)) == ELF


def test_an_uncompressed_payload_and_a_large_lz4_one() -> None:
    assert bzimage.unpack_bzimage(samples.bzimage(ELF)) == ELF
    large = samples.vmlinux(padding=9 << 20)  # two lz4 blocks
    assert bzimage.unpack_bzimage(samples.bzimage(samples.with_length(samples.lz4_legacy(large), large))) == large


@pytest.mark.parametrize(
    ("codec", "harm"),
    # lz4's legacy frame has no checksum: a changed byte may unpack to something of the right length.
    [(codec, harm) for codec in CODECS for harm in ("cut", "flip", "length") if (codec, harm) != ("lz4", "flip")],
)
def test_damage_is_found(codec: str, harm: str) -> None:
    packed = bytearray(CODECS[codec](ELF))
    if harm == "cut":
        packed = packed[: len(packed) // 2]
    elif harm == "flip":
        middle = len(packed) // 2
        packed[middle : middle + 40] = bytes(byte ^ 0x5A for byte in packed[middle : middle + 40])
    payload = bytes(packed) + struct.pack("<I", len(ELF) + (3 if harm == "length" else 0))
    with pytest.raises(InvalidRequest) as caught:
        bzimage.inspect_vmlinux(bzimage.unpack_bzimage(samples.bzimage(payload), "the-file"), "the-file")
    assert caught.value.code == "kernel_invalid"
    assert "the-file" in caught.value.message


def test_a_bomb_is_not_unpacked() -> None:
    payload = gzip.compress(b"\0" * 1000)[:-4] + struct.pack("<I", (1 << 30) + 1)
    with pytest.raises(InvalidRequest, match="unpacks to"):
        bzimage.unpack_bzimage(samples.bzimage(payload))
    data = b"\0" * (4 << 20)
    with pytest.raises(InvalidRequest, match="instead of 1000"):  # it says 1000 bytes, and unpacks to more
        bzimage.unpack_bzimage(samples.bzimage(zstd.compress(data) + struct.pack("<I", 1000)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (samples.vmlinux(pvh=False), "no PVH entry"),
        (samples.vmlinux(machine=183), "not for 64-bit x86"),
        (ELF[:3000], "truncated"),
        (ELF.replace(b"Linux version", b"Minix version"), "no Linux kernel"),
        (b"#!/bin/sh\n", "neither a vmlinux"),
        (b"", "neither a vmlinux"),
        (samples.bzimage(b"\x89LZO" + b"\0" * 100), "damaged|does not know"),
        (samples.bzimage(samples.with_length(b"??????", b"")), "does not know"),
        (samples.bzimage(ELF, protocol=0x200), "too old"),
        (samples.bzimage(ELF)[:-5000], "truncated"),
    ],
)
def test_what_is_no_kernel_is_said_to_be_none(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(InvalidRequest, match=message) as caught:
        bzimage.read_kernel(path)
    assert caught.value.code == "kernel_invalid"
    assert caught.value.hint


def test_release_from_the_header_or_from_the_kernel_itself(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(samples.bzimage(samples.with_length(zstd.compress(ELF), ELF), release="6.9-from-header"))
    assert bzimage.read_kernel(path).release == "6.9-from-header"
    path.write_bytes(samples.vmlinux("6.12.3+mine"))
    assert bzimage.read_kernel(path).release == "6.12.3+mine"
    path.write_bytes(samples.vmlinux("6.1/../../etc"))
    with pytest.raises(InvalidRequest, match="its release"):
        bzimage.read_kernel(path)


async def test_a_path_is_imported_once_and_again_when_it_changes(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "boot" / "vmlinux"
    path.parent.mkdir()
    path.write_bytes(samples.vmlinux("6.1.1-a", drivers=("virtio_blk",)))
    modules = samples.module_tree(tmp_path / "lib/modules/6.1.1-a", samples.VIRTIO)
    first = await resolve_kernel(str(path), settings)
    assert (first.release, first.modules, first.name, first.drivers) == ("6.1.1-a", modules, str(path), ("virtio_blk",))
    assert first.vmlinux.read_bytes() == path.read_bytes()
    assert first.vmlinux.parent.name == first.digest
    monkeypatch.setattr(bzimage, "read_kernel", lambda _: pytest.fail("read again although nothing changed"))
    assert await resolve_kernel(str(path), settings) == first
    assert await resolve_kernel(first.digest, settings) == first.__class__(**{**_fields(first), "name": first.digest})
    monkeypatch.undo()
    path.write_bytes(samples.vmlinux("6.1.1-b"))
    second = await resolve_kernel(str(path), settings)
    assert second.release == "6.1.1-b"
    assert second.digest != first.digest
    assert first.vmlinux.exists(), "a machine may be starting from it"


def _fields(kernel: object) -> dict[str, object]:
    return {name: getattr(kernel, name) for name in kernel.__class__.__slots__}  # type: ignore[attr-defined]


async def test_a_damaged_entry_is_said_to_be_and_made_again_once_it_is_gone(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(samples.vmlinux())
    kernel = await resolve_kernel(str(path), settings)
    os.chmod(kernel.vmlinux, 0o600)
    os.truncate(kernel.vmlinux, 100)
    with pytest.raises(HostError, match="vmlinux has changed") as caught:
        await resolve_kernel(str(path), settings)
    assert caught.value.code == "image_corrupt"
    assert f"rm -rf {kernel.vmlinux.parent}" in caught.value.hint
    remove_tree(kernel.vmlinux.parent)
    again = await resolve_kernel(str(path), settings)
    assert again == kernel
    assert again.vmlinux.read_bytes() == path.read_bytes()
    assert list((settings.data_dir / "staging").iterdir()) == []


@pytest.mark.parametrize("name", ["debian:99", "debian:", "debian:../../etc", "nonsense", "a" * 64, "ubuntu:22.04"])
async def test_unknown_names_are_refused_with_what_there_is(settings: Settings, name: str) -> None:
    with pytest.raises(NotFound) as caught:
        await resolve_kernel(name, settings)
    assert caught.value.code == "kernel_unknown"
    assert "debian:12" in caught.value.hint


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo"])
async def test_a_path_that_is_no_file(tmp_path: Path, settings: Settings, kind: str) -> None:
    path = tmp_path / "it"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(InvalidRequest) as caught:
        await resolve_kernel(str(path), settings)
    assert caught.value.code == "kernel_invalid"
