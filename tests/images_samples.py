"""Small made-up kernels, modules and file systems for the tests of images/."""

from __future__ import annotations

import struct
from pathlib import Path


def elf_sections(sections: dict[str, bytes]) -> bytes:
    """A relocatable 64-bit ELF with these sections, as a kernel module is one."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in (*sections, ".shstrtab"))
    contents = {**sections, ".shstrtab": names}
    body, headers, offset, name_at = b"", [b"\0" * 64], 64, 1
    for name, content in contents.items():
        headers.append(struct.pack("<IIQQQQIIQQ", name_at, 1, 0, 0, offset, len(content), 0, 0, 1, 0))
        body += content
        offset += len(content)
        name_at += len(name) + 1
    ident = b"\x7fELF\x02\x01\x01" + b"\0" * 9
    header = ident + struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, offset, 0, 64, 0, 0, 64, len(headers), len(headers) - 1)
    return header + body + b"".join(headers)


def module(*info: str) -> bytes:
    """A kernel module with these ``key=value`` strings in .modinfo."""
    return elf_sections({".text": b"\x90" * 32, ".modinfo": b"".join(text.encode() + b"\0" for text in info)})


def signed(data: bytes, length: int = 40) -> bytes:
    """The same with a signature appended as the kernel's build does it."""
    trailer = struct.pack(">BBBBB3xI", 0, 0, 2, 0, 0, length)
    return data + b"S" * length + trailer + b"~Module signature appended~\n"


def vmlinux(
    release: str = "6.1.0-test", *, pvh: bool = True, machine: int = 62, drivers: tuple[str, ...] = (), padding: int = 5000
) -> bytes:
    """An ELF that looks like a kernel: a version string, a PVH note, names of drivers."""
    note = struct.pack("<III", 4, 4, 18 if pvh else 1) + b"Xen\0" + struct.pack("<I", 0x1000000)
    text = f"\0Linux version {release} (builder) #1 SMP\0".encode() + b"".join(b"\0" + d.encode() + b"\0" for d in drivers)
    text += bytes(i * 7 % 251 for i in range(padding))
    headers = 64 + 2 * 56
    ident = b"\x7fELF\x02\x01\x01" + b"\0" * 9
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0x1000000, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, headers, 0, 0, len(text), len(text), 4096)
    noted = struct.pack("<IIQQQQQQ", 4, 4, headers + len(text), 0, 0, len(note), len(note), 4)
    return header + load + noted + text + note


def bzimage(payload: bytes, release: str = "6.1.0-test", *, protocol: int = 0x20F) -> bytes:
    """A bzImage around a compressed payload (which ends with the unpacked length)."""
    setup_sectors, code = 3, b"\xcc" * 1000
    head = bytearray(512 * (setup_sectors + 1))
    head[0x1F1] = setup_sectors
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, protocol)
    text = f"{release} (builder@host) #1 SMP\0".encode()
    struct.pack_into("<H", head, 0x20E, 0x400 - 0x200)
    head[0x400 : 0x400 + len(text)] = text
    struct.pack_into("<II", head, 0x248, len(code), len(payload))
    return bytes(head) + code + payload


def lz4_legacy(data: bytes) -> bytes:
    """What ``lz4 -l`` writes."""
    from lz4 import block

    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        packed = block.compress(data[at : at + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(packed)) + packed
    return out


def with_length(packed: bytes, data: bytes) -> bytes:
    """A payload as the kernel's build leaves it: the unpacked length in its last four bytes."""
    return packed + struct.pack("<I", len(data))


def module_tree(root: Path, modules: dict[str, bytes], builtin: tuple[str, ...] = ("ext4",)) -> Path:
    """A directory with the content of lib/modules/RELEASE; keys are paths below kernel/."""
    for name, data in modules.items():
        path = root / "kernel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    root.mkdir(parents=True, exist_ok=True)
    (root / "modules.builtin").write_text("".join(f"kernel/fs/{name}.ko\n" for name in builtin))
    return root


VIRTIO = {
    "drivers/virtio/virtio.ko": module("license=GPL", "depends=virtio_ring", "name=virtio"),
    "drivers/virtio/virtio_ring.ko": module("depends=", "name=virtio_ring"),
    "drivers/virtio/virtio_mmio.ko": module("depends=virtio,virtio_ring", "name=virtio_mmio"),
    "drivers/virtio/virtio_pci.ko": module("depends=virtio_pci_modern_dev,virtio", "name=virtio_pci"),
    "drivers/virtio/virtio_pci_modern_dev.ko": module("depends=", "name=virtio_pci_modern_dev"),
    "drivers/block/virtio_blk.ko": module("depends=virtio", "name=virtio_blk"),
    "drivers/char/virtio_console.ko": module("depends=virtio", "name=virtio_console"),
    "drivers/char/hw_random/virtio-rng.ko": module("depends=virtio", "name=virtio_rng"),
    "drivers/net/virtio_net.ko": module("depends=net_failover,virtio", "name=virtio_net"),
    "net/net_failover.ko": module("depends=failover", "name=net_failover"),
    "net/failover.ko": module("depends=", "name=failover"),
    "net/vmw_vsock/vsock.ko": module("depends=", "name=vsock"),
    "net/vmw_vsock/vmw_vsock_virtio_transport.ko": module("depends=vsock,virtio", "name=vmw_vsock_virtio_transport"),
    "fs/erofs/erofs.ko": module("depends=libcrc32c", "softdep=pre: crypto-fancy post: other", "name=erofs"),
    "lib/libcrc32c.ko": module("depends=", "name=libcrc32c"),
    "crypto/crypto_fancy.ko": module("depends=", "name=crypto_fancy"),
}
