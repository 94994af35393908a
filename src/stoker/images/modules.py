"""Kernel modules: which are needed for a driver, in which order, and their bytes as the guest's kernel is to get them.

What a module needs is written in the module itself (section ``.modinfo``), so this works on a package's tree where no ``depmod``
has run. ``modules.builtin`` says what needs no file.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from stoker.errors import InvalidRequest

__all__ = ["Module", "ModuleTree", "module_info", "strip_signature"]

MAX_MODULE = 128 << 20
SIGNATURE_MAGIC = b"~Module signature appended~\n"
SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")


@dataclass(frozen=True, slots=True)
class Module:
    """One module: ``name`` as the kernel says it (underscores), ``file`` as it is called on disk (``virtio-rng.ko``)."""

    name: str
    file: str
    data: bytes
    needs: tuple[str, ...]
    wants: tuple[str, ...]


def canonical(name: str) -> str:
    """Dashes and underscores mean the same in module names."""
    return name.replace("-", "_")


def strip_signature(data: bytes) -> bytes:
    """A module without the signature appended to it (struct module_signature and the magic string behind that).

    Checking it costs the guest a hash of the module and an RSA operation, several milliseconds for each module without hardware
    virtualisation, and proves nothing here: the host chose both the kernel and the module, from a package whose signature it
    checked. Only a kernel that *insists* on signatures gets them.
    """
    if not data.endswith(SIGNATURE_MAGIC):
        return data
    end = len(data) - len(SIGNATURE_MAGIC)
    if end < 12:
        return data
    signer, key, length = data[end - 12 + 3], data[end - 12 + 4], struct.unpack_from(">I", data, end - 4)[0]
    begin = end - 12 - signer - key - length
    return data[:begin] if begin > 0 else data


def module_info(data: bytes, path: str = "module") -> dict[str, list[str]]:
    """The ``key=value`` strings of the ELF section ``.modinfo``. Raises ``bad_module`` for anything that is no module."""
    try:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("not a 64-bit ELF file")
        table, size, count, names_index = struct.unpack_from("<Q", data, 40)[0], *struct.unpack_from("<HHH", data, 58)
        sections = [struct.unpack_from("<IIQQQQ", data, table + index * size) for index in range(count)]
        names = sections[names_index][4]
        for section in sections:
            begin = names + section[0]
            if data[begin : begin + 9] == b".modinfo\0":
                info: dict[str, list[str]] = {}
                for text in data[section[4] : section[4] + section[5]].split(b"\0"):
                    key, equals, value = text.decode(errors="replace").partition("=")
                    if equals:
                        info.setdefault(key, []).append(value)
                return info
        raise ValueError("no section .modinfo")
    except (struct.error, IndexError, ValueError) as e:
        raise InvalidRequest("bad_module", f"{path} is no kernel module: {e}", "rebuild the kernel's modules") from None


def _decompress(path: Path) -> bytes:
    if path.stat().st_size > MAX_MODULE:
        raise InvalidRequest(
            "bad_module", f"{path} is larger than {MAX_MODULE >> 20} MiB", "strip debugging information from the modules"
        )
    data = path.read_bytes()
    try:
        if path.suffix == ".xz":
            import lzma

            data = lzma.LZMADecompressor().decompress(data, MAX_MODULE)
        elif path.suffix == ".zst":
            from stoker.host.zstd import ZstdDecompressor

            data = ZstdDecompressor().decompress(data, MAX_MODULE)
        elif path.suffix == ".gz":
            import zlib

            data = zlib.decompressobj(31).decompress(data, MAX_MODULE)
    except Exception as e:  # each codec has its own error class; all of them mean the same here
        raise InvalidRequest("bad_module", f"{path} is damaged: {e}", "install the kernel's modules again") from e
    return data


class ModuleTree:
    """A directory with the content of ``lib/modules/RELEASE``, read when asked."""

    def __init__(self, root: Path, *, keep_signatures: bool = False) -> None:
        self.root = root
        self.keep_signatures = keep_signatures
        self._files: dict[str, Path] = {}
        self._read: dict[str, Module] = {}
        for directory, _, files in os.walk(root, followlinks=False):
            # As modprobe does by default: what lies in updates/ replaces the kernel's own.
            updates = Path(directory).relative_to(root).parts[:1] == ("updates",)
            for file in files:
                stem = next((file[: -len(suffix)] for suffix in SUFFIXES if file.endswith(suffix)), None)
                if stem is not None and (updates or canonical(stem) not in self._files):
                    self._files[canonical(stem)] = Path(directory, file)
        self.builtin = self._builtin()

    def _builtin(self) -> frozenset[str]:
        try:
            lines = (self.root / "modules.builtin").read_text().splitlines()
        except FileNotFoundError:
            return frozenset()
        return frozenset(canonical(os.path.basename(line).split(".ko")[0]) for line in lines)

    def has(self, name: str) -> bool:
        return canonical(name) in self._files

    def module(self, name: str) -> Module:
        """A module's bytes and needs."""
        name = canonical(name)
        if name not in self._read:
            path = self._files[name]
            data = _decompress(path)
            info = module_info(data, str(path))
            needs = tuple(canonical(need) for value in info.get("depends", ()) for need in value.split(",") if need)
            wants = tuple(want for value in info.get("softdep", ()) for want in _softdep_pre(value))
            file = path.name.split(".ko")[0] + ".ko"
            self._read[name] = Module(name, file, data if self.keep_signatures else strip_signature(data), needs, wants)
        return self._read[name]

    def closure(self, name: str, loaded: set[str]) -> list[tuple[Module, bool]]:
        """The modules to load for ``name``, each after what it needs; True for those it could do without (soft dependencies).

        What is in ``loaded`` is left out, and what is returned is added. A need without a file must be built in.
        """
        ordered: list[tuple[Module, bool]] = []
        self._visit(canonical(name), loaded, ordered, optional=False)
        return ordered

    def _visit(self, name: str, loaded: set[str], ordered: list[tuple[Module, bool]], *, optional: bool) -> None:
        if name in loaded:
            return
        if name not in self._files:
            if name in self.builtin or optional or not self.builtin:
                return
            raise InvalidRequest("bad_module", f"{self.root} lacks the module {name}", "install the kernel's modules again")
        loaded.add(name)
        module = self.module(name)
        for want in module.wants:
            self._visit(want, loaded, ordered, optional=True)
        for need in module.needs:
            self._visit(need, loaded, ordered, optional=optional)
        ordered.append((module, optional))


def _softdep_pre(value: str) -> list[str]:
    """The modules behind ``pre:`` in a soft dependency (``pre: a b post: c``)."""
    wanted, section = [], ""
    for word in value.split():
        if word in ("pre:", "post:"):
            section = word
        elif section == "pre:" and ":" not in word:
            wanted.append(canonical(word))
    return wanted
