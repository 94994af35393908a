"""QEMU's command line, by value."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from stoker.errors import HostError, InvalidRequest
from stoker.network.user import UserNetwork
from stoker.settings import load_settings
from stoker.vmm.elf import check_memory, kernel_end
from stoker.vmm.machine import Accelerator, Channel, Disk, MachineSpec
from stoker.vmm.qemu.command import DiskHandles, Handles, command, kernel_cmdline
from stoker.vmm.qemu.facts import QemuFacts, parse_version, qemu_facts

MIB = 1 << 20
QEMU7 = QemuFacts("/usr/bin/qemu-system-x86_64", (7, 2, 22), 2445428)
QEMU10 = QemuFacts("/usr/bin/qemu-system-x86_64", (10, 0, 2), 0)
PLAIN = MachineSpec(
    name="sb-1",
    directory=Path("/run/stoker/sb-1"),
    kernel=Path("/k"),
    initrd=Path("/i"),
    cmdline=("stoker.debug=1",),
    cpus=1,
    memory=512 * MIB,
    disks=(Disk("root", Path("/o"), "qcow2", backing=(Path("/b"),)),),
    network=None,
    accelerator=Accelerator.TCG,
)
HANDLES = Handles(monitor=10, console=11, kernel="/proc/self/fd/12", initrd="/i", agent=13, disks=(DiskHandles(14, (15,)),))
NETWORK = UserNetwork("52:54:00:53:4b:02", "10.0.2.15/24", "10.0.2.2", "10.0.2.3", ("10.0.0.0/8",))

GOLDEN = """
/usr/bin/qemu-system-x86_64
-add-fd fd=11,set=1 -add-fd fd=14,set=2 -add-fd fd=15,set=3
-name sb-1 -nodefaults -no-user-config -no-reboot -display none
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-M microvm,acpi=on,ioapic2=on,pcie=off,usb=off,rtc=on -accel tcg,thread=multi,tb-size=128 -cpu max,-erms,-cx16 -smp 1 -m 512M
-global virtio-mmio.force-legacy=off
-kernel /proc/self/fd/12 -initrd /i -append APPEND
-chardev file,id=console,path=/dev/fdset/1,append=on -serial chardev:console
-chardev socket,id=monitor,fd=10,server=on,wait=off -mon chardev=monitor,mode=control
-blockdev BLOCKDEV
-chardev socket,id=agent,fd=13,server=on,wait=off
-object rng-random,id=rng,filename=/dev/urandom
-device virtio-blk-device,drive=disk0,serial=root,werror=stop,rerror=report,bus=virtio-mmio-bus.23
-device virtio-serial-device,bus=virtio-mmio-bus.22
-device virtio-rng-device,rng=rng,bus=virtio-mmio-bus.21
-device virtserialport,chardev=agent,name=stoker.agent
"""
APPEND = (
    "console=ttyS0 quiet loglevel=1 panic=-1 reboot=t cryptomgr.notests "
    "tsc=reliable init_on_alloc=0 spectre_v2=off norandmaps tsc_early_khz=2445428 stoker.debug=1"
)
FILE = {"driver": "file", "aio": "threads", "discard": "unmap", "cache": {"direct": False, "no-flush": True}}
LAYER = {"discard": "unmap", "cache": {"direct": False, "no-flush": True}}
BLOCKDEV = {
    **LAYER,
    "driver": "qcow2",
    "node-name": "disk0",
    "read-only": False,
    "file": {**FILE, "filename": "/dev/fdset/2", "read-only": False},
    "backing": {
        **LAYER,
        "driver": "raw",
        "node-name": "disk0-base",
        "read-only": True,
        "file": {**FILE, "filename": "/dev/fdset/3", "read-only": True},
    },
}


def option(argv: list[str], name: str) -> list[str]:
    return [argv[index + 1] for index, word in enumerate(argv) if word == name]


def test_the_whole_command_line() -> None:
    argv = command(PLAIN, QEMU7, HANDLES)
    (blockdev,) = option(argv, "-blockdev")
    assert json.loads(blockdev) == BLOCKDEV
    expected = GOLDEN.split()
    expected[expected.index("APPEND")] = APPEND
    expected[expected.index("BLOCKDEV")] = blockdev
    assert argv == expected


def test_the_network_passes_the_filter_only() -> None:
    argv = command(replace(PLAIN, network=NETWORK), QEMU7, replace(HANDLES, net_out=20, net_in=21))
    assert option(argv, "-netdev") == ["user,id=net0,net=10.0.2.2/24,host=10.0.2.2,dns=10.0.2.3,ipv6=off"]
    assert "filter-redirector,id=netfilter,netdev=net0,queue=rx,outdev=netout,indev=netin" in option(argv, "-object")
    assert {"socket,id=netout,fd=20", "socket,id=netin,fd=21"} < set(option(argv, "-chardev"))
    assert "virtio-net-device,netdev=net0,mac=52:54:00:53:4b:02,guest_announce=off,bus=virtio-mmio-bus.20" in option(
        argv, "-device"
    )
    assert not option(command(PLAIN, QEMU7, HANDLES), "-netdev")


def test_processors_by_accelerator_and_version() -> None:
    def cpu(spec: MachineSpec, qemu: QemuFacts) -> tuple[str, str]:
        argv = command(spec, qemu, HANDLES)
        return option(argv, "-cpu")[0], option(argv, "-accel")[0]

    kvm = replace(PLAIN, accelerator=Accelerator.KVM)
    assert cpu(PLAIN, QEMU10) == ("max,-erms", "tcg,thread=multi,tb-size=128")
    # What TCG translated is kept within bounds that grow with the guest.
    bounds = {512: 128, 1024: 128, 1032: 129, 4096: 512, 65536: 1024}
    for memory, bound in bounds.items():
        assert cpu(replace(PLAIN, memory=memory << 20), QEMU10)[1] == f"tcg,thread=multi,tb-size={bound}"
    assert cpu(kvm, QEMU7) == ("max", "kvm")
    assert cpu(replace(kvm, cpu="max,-arch-capabilities"), QEMU7) == ("max,-arch-capabilities", "kvm")
    assert "tsc" not in kernel_cmdline(kvm, QEMU7)
    assert "tsc_early_khz" not in kernel_cmdline(PLAIN, QEMU10)
    assert "norandmaps" in kernel_cmdline(PLAIN, QEMU7)
    assert "norandmaps" not in kernel_cmdline(kvm, QEMU7) + kernel_cmdline(PLAIN, QEMU10)


def test_a_chain_of_layers_and_a_block_device() -> None:
    layers = (Path("/newer"), Path("/older"), Path("/base"))
    disks = (Disk("a", Path("/a"), "qcow2", backing=layers), Disk("b", Path("/dev/dm-0"), "raw"))
    handles = replace(HANDLES, disks=(DiskHandles(20, (21, 22, 23)), DiskHandles(24, device=True)))
    assert handles.descriptors() == (10, 11, 13, 20, 21, 22, 23, 24)
    argv = command(replace(PLAIN, disks=disks), QEMU7, handles)
    first, second = map(json.loads, option(argv, "-blockdev"))
    found = []
    node = first
    while node is not None:
        found.append((node["node-name"], node["driver"], node["read-only"], node["file"]["filename"], "backing" in node))
        node = node.get("backing")
    assert found == [
        ("disk0", "qcow2", False, "/dev/fdset/2", True),
        ("disk0-layer0", "qcow2", True, "/dev/fdset/3", True),
        ("disk0-layer1", "qcow2", True, "/dev/fdset/4", True),
        ("disk0-base", "raw", True, "/dev/fdset/5", False),
    ]
    assert (second["driver"], second["file"]["driver"], second["file"]["discard"]) == ("raw", "host_device", "unmap")
    with pytest.raises(InvalidRequest, match="nothing lies below"):
        command(replace(PLAIN, disks=(Disk("a", Path("/a"), "raw", backing=(Path("/b"),)),)), QEMU7, HANDLES)


def test_disks() -> None:
    disks = (
        Disk("a", Path("/a"), "raw", read_only=True),
        Disk("b", Path("/b"), "qcow2", flush=True),
        Disk("c", Path("/c"), "qcow2", backing=(Path("/d"),), backing_format="qcow2"),
    )
    handles = replace(HANDLES, disks=(DiskHandles(20), DiskHandles(21), DiskHandles(22, (23,))))
    argv = command(replace(PLAIN, disks=disks), QEMU7, handles)
    first, second, third = map(json.loads, option(argv, "-blockdev"))
    assert first["read-only"] and first["file"]["read-only"] and "backing" not in first
    assert second["cache"] == {"direct": False, "no-flush": False} and second["backing"] is None
    assert third["backing"]["driver"] == "qcow2" and third["backing"]["backing"] is None, "no header's word is taken"
    assert [text for text in option(argv, "-device") if "blk" in text] == [
        "virtio-blk-device,drive=disk0,serial=a,werror=stop,rerror=report,bus=virtio-mmio-bus.23",
        "virtio-blk-device,drive=disk1,serial=b,werror=stop,rerror=report,bus=virtio-mmio-bus.22",
        "virtio-blk-device,drive=disk2,serial=c,werror=stop,rerror=report,bus=virtio-mmio-bus.21",
    ]
    assert handles.descriptors() == (10, 11, 13, 20, 21, 22, 23)


def test_vsock() -> None:
    spec = replace(PLAIN, channel=Channel.VSOCK, vsock_cid=7)
    argv = command(spec, QEMU7, replace(HANDLES, agent=None, vsock=30))
    assert "vhost-vsock-device,guest-cid=7,vhostfd=30,bus=virtio-mmio-bus.22" in option(argv, "-device")
    assert not [text for text in option(argv, "-device") if "serial" in text and "blk" not in text]
    assert "stoker.channel=vsock" in option(argv, "-append")[0]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"name": "a,b"}, "bad_name"),
        ({"name": ""}, "bad_name"),
        ({"memory": MIB + 1}, "bad_memory"),
        ({"cpus": 0}, "bad_cpus"),
        ({"disks": (Disk("a,b", Path("/a"), "raw"),)}, "bad_disk"),
        ({"disks": (Disk("a", Path("/a"), "vmdk"),)}, "bad_disk"),
        ({"disks": (Disk("a", Path("/a"), "raw"),) * 21}, "too_many_disks"),
        ({"cmdline": ("x" * 2000,)}, "cmdline_too_long"),
    ],
)
def test_what_is_refused(change: dict[str, object], code: str) -> None:
    spec = replace(PLAIN, **change)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as caught:
        command(spec, QEMU7, replace(HANDLES, disks=tuple(DiskHandles(9) for _ in spec.disks)))
    assert caught.value.code == code


def test_every_word_is_understood_by_the_qemu_of_this_host(tmp_path: Path) -> None:
    """QEMU parses the options before it opens anything: with descriptors that are not open it complains of those."""
    argv = command(replace(PLAIN, network=NETWORK), QEMU7, replace(HANDLES, net_out=20, net_in=21))
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("QEMU is not installed")
    assert done.returncode == 1 and b"fd" in done.stderr and b"invalid" not in done.stderr.lower()


@pytest.mark.parametrize(
    ("text", "version"),
    [("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", (7, 2, 22)), ("QEMU emulator version 10.1", (10, 1, 0))],
)
def test_versions(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(HostError):
        parse_version("Firecracker v1.7")


@pytest.mark.anyio
async def test_facts_are_asked_once_and_again_when_the_binary_changes(tmp_path: Path) -> None:
    fake = tmp_path / "qemu-system-fake"
    fake.write_text(f"#!/bin/sh\necho x >>{tmp_path}/asked\necho QEMU emulator version 9.1.2\n")
    fake.chmod(0o755)
    settings = load_settings({"STOKER_RUN_DIR": str(tmp_path / "run"), "STOKER_QEMU": str(fake)})
    first, second = await qemu_facts(settings), await qemu_facts(settings)
    assert first == second and first.version == (9, 1, 2) and 100_000 < first.tsc_khz < 10_000_000
    assert (tmp_path / "asked").read_text() == "x\n"
    fake.write_text(fake.read_text().replace("9.1.2", "9.1.10"))
    assert (await qemu_facts(settings)).version == (9, 1, 10)
    (tmp_path / "run/qemu.json").write_text("nonsense")
    assert (await qemu_facts(settings)).version == (9, 1, 10)
    fake.unlink()
    with pytest.raises(HostError) as caught:
        await qemu_facts(settings)
    assert caught.value.code == "qemu_missing"


def elf(*segments: tuple[int, int]) -> bytes:
    header = b"\x7fELF\x02\x01\x01" + bytes(25) + (64).to_bytes(8, "little") + bytes(14)
    header += (56).to_bytes(2, "little") + len(segments).to_bytes(2, "little") + bytes(6)
    table = b""
    for physical, memory in segments:
        table += (
            (1).to_bytes(4, "little")
            + bytes(20)
            + physical.to_bytes(8, "little")
            + bytes(8)
            + memory.to_bytes(8, "little")
            + bytes(8)
        )
    return header + table


def test_memory_that_cannot_hold_the_kernel_is_refused(tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "vmlinux", tmp_path / "initrd"
    kernel.write_bytes(elf((16 * MIB, 24 * MIB), (40 * MIB, 20 * MIB)))
    initrd.write_bytes(bytes(8 * MIB))
    assert kernel_end(kernel) == 60 * MIB
    check_memory(kernel, initrd, 80 * MIB)
    with pytest.raises(InvalidRequest) as caught:
        check_memory(kernel, initrd, 79 * MIB)
    assert caught.value.code == "memory_too_small" and "80 MiB" in caught.value.message
    for junk in (b"", b"MZ" * 64, b"\x7fELF\x02\x01" + b"\xff" * 58, elf((0, 0))[:70]):
        kernel.write_bytes(junk)
        assert kernel_end(kernel) == 0
