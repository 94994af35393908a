"""What a process changed of a file it maps privately, taken out of it and put into another: on processes of this host."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.errors import GuestError, HostError
from stoker.host import pagemap
from stoker.vmm import memory
from stoker.vmm.memory import PAGE, Delta, Scratch, capture, changed_bytes, empty_memory, inject, is_sealed, new_memory, sealed
from stoker.vmm.memory_base import digest_of_memory, write_base
from stoker.vmm.memory_file import flatten, read_delta, write_delta

SIZE = 8 << 20

# Maps descriptor 3 privately and does what it is told, one Python statement a line.
HOLDER = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None)
m = mmap.mmap(3, SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
address = ctypes.addressof(ctypes.c_char.from_buffer(m))
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
""".replace("SIZE", str(SIZE))


class Holder:
    """A process that holds a private view of a base, as a VMM does."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.pid = process, process.pid

    def do(self, statement: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(statement + "\n")
        self.process.stdin.flush()
        said = self.process.stdout.readline()
        if said != "done\n":
            assert self.process.stdout.readline() == "done\n"
        return said.strip()

    def page(self, number: int) -> bytes:
        return bytes.fromhex(self.do(f"print(m[{number * PAGE}:{number * PAGE + 8}].hex())"))


@contextmanager
def holder(base: int) -> Iterator[Holder]:
    command = ["sh", "-c", f'exec 3<>/proc/self/fd/{base}; exec "$@"', "sh", sys.executable, "-u", "-c", HOLDER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[base])
    with process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield Holder(process)
        finally:
            process.kill()


@pytest.fixture
def base() -> Iterator[int]:
    fd = new_memory("test", SIZE)
    os.pwrite(fd, b"base" * 1024 * 16, 0)  # 16 pages
    yield sealed(fd)
    os.close(fd)


def runs(delta: Delta) -> list[tuple[int, int]]:
    return [(offset // PAGE, length // PAGE) for offset, length in zip(delta.offsets, delta.lengths, strict=True)]


WRITES = "m[0:4]=b'mine'; m[5*PAGE:6*PAGE]=bytes(PAGE); m[100*PAGE:700*PAGE]=b'x'*(600*PAGE)".replace("PAGE", str(PAGE))


@pytest.mark.parametrize("way", ["scan", "entries"])
def test_exactly_what_was_written_is_taken_even_zeros(base: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "entries":
        monkeypatch.setattr(pagemap, "_scan", lambda *_: False)
    with holder(base) as parent, holder(base) as child:
        parent.do(WRITES)
        parent.do("_ = m[3*4096] + m[1000*4096]")  # reading changes nothing
        assert changed_bytes(parent.pid, base) == 602 * PAGE
        delta = capture(parent.pid, base, Scratch())
        # The long run is in pieces of a MiB.
        assert runs(delta) == [(0, 1), (5, 1), (100, 256), (356, 256), (612, 88)]
        inject(child.pid, base, delta)
        assert [child.page(n)[:4] for n in (0, 1, 5, 100, 699, 700)] == [b"mine", b"base", bytes(4), b"xxxx", b"xxxx", bytes(4)]
        assert runs(capture(child.pid, base, Scratch())) == runs(delta)


@pytest.mark.parametrize("count", [1, 511, 512, 513, 700, 1024, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("way", ["scan", "entries"])
def test_many_runs_come_once_each(count: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel hands them over in pieces."""
    if way == "entries":
        monkeypatch.setattr(pagemap, "_scan", lambda *_: False)
    size = 20000 * PAGE
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_NOHUGEPAGE)
        for number in range(count):
            area[2 * number * PAGE] = 1
        start = memory.address_of(area)
        starts, ends = pagemap.private_runs(os.getpid(), [(start, start + size)])
    assert list(starts) == [start + 2 * number * PAGE for number in range(count)]
    assert [end - begin for begin, end in zip(starts, ends, strict=True)] == [PAGE] * count


def test_a_page_that_was_given_back_is_the_bases_again(base: int) -> None:
    with holder(base) as one:
        one.do(WRITES)
        one.do(f"libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t({PAGE}), 4)")  # MADV_DONTNEED
        assert one.page(0)[:4] == b"base"
        assert changed_bytes(one.pid, base) == 601 * PAGE


def test_anonymous_memory_over_the_base_is_zeros_where_nothing_is(base: int) -> None:
    """What a balloon may do: the base shows through no more, and nothing of it must come back in the copy."""
    with holder(base) as one, holder(base) as other:
        one.do("libc.mmap.restype = ctypes.c_void_p")
        over = f"ctypes.c_void_p(address), ctypes.c_size_t({8 * PAGE}), 3, 0x32, -1, 0"  # MAP_FIXED | MAP_ANONYMOUS | MAP_PRIVATE
        one.do(f"assert libc.mmap({over}) == address")
        one.do(f"m[2*{PAGE}:2*{PAGE}+3] = b'new'")
        delta = capture(one.pid, base, Scratch())
        assert runs(delta) == [(2, 1)]
        assert [(o // PAGE, n // PAGE) for o, n in zip(delta.zero_offsets, delta.zero_lengths, strict=True)] == [(0, 2), (3, 5)]
        inject(other.pid, base, delta)
        assert [other.page(n)[:4] for n in (0, 2, 3, 7, 8)] == [bytes(4), b"new\0", bytes(4), bytes(4), b"base"]


def test_zeros_are_left_out_on_request(base: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of zeros become zero runs where the base has something, and nothing where it has zeros, too."""
    monkeypatch.setattr(memory, "_BATCH", 1 << 20)
    with holder(base) as parent, holder(base) as child:
        # Zeros over data, over the hole behind it, zeros with one byte among them, and a run longer than a batch.
        for statement in (
            f"m[2*{PAGE}:40*{PAGE}] = bytes(38*{PAGE})",
            f"m[30*{PAGE}-1:30*{PAGE}] = b'x'",
            f"m[100*{PAGE}:900*{PAGE}] = bytes(800*{PAGE})",
            f"m[200*{PAGE}:300*{PAGE}] = b'y' * (100*{PAGE})",
            f"m[{SIZE}-{PAGE}:{SIZE}] = bytes({PAGE})",
        ):
            parent.do(statement)
        for _ in range(2):  # what was in the way before is not seen
            scratch = Scratch()
            full, sparse = capture(parent.pid, base, Scratch()), capture(parent.pid, base, scratch, zeros=True)
            assert full.bytes == 839 * PAGE and sparse.bytes == 101 * PAGE
            assert runs(sparse)[0] == (29, 1) and sum(n for _, n in runs(sparse)) == 101
            assert [(o // PAGE, n // PAGE) for o, n in zip(sparse.zero_offsets, sparse.zero_lengths, strict=True)] == [(2, 14)]
        fd = os.memfd_create("delta")
        write_delta(sparse, fd)
        inject(child.pid, base, read_delta(fd))
        os.close(fd)
        wanted = parent.do("import hashlib; print(hashlib.sha256(m).hexdigest())")
        assert child.do("import hashlib; print(hashlib.sha256(m).hexdigest())") == wanted


@given(
    writes=st.lists(st.tuples(st.integers(0, 63), st.integers(1, 64), st.sampled_from([b"\0", b"\0", b"z"])), max_size=8),
    content=st.lists(st.tuples(st.integers(0, 63), st.sampled_from([b"\0", b"q"])), max_size=8),
)
@settings(max_examples=50, deadline=None)
def test_a_delta_without_zeros_means_the_same(writes: list[tuple[int, int, bytes]], content: list[tuple[int, bytes]]) -> None:
    fd = new_memory("test", 128 * PAGE)
    try:
        for page, byte in content:
            os.pwrite(fd, byte * PAGE, page * PAGE)
        sealed(fd)
        ours = mmap.mmap(fd, 128 * PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        for page, count, byte in writes:
            ours[page * PAGE : (page + count) * PAGE] = byte * (count * PAGE)
        wanted = bytes(ours)
        delta = capture(os.getpid(), fd, Scratch(), zeros=True)
        rebuilt = bytearray(os.pread(fd, 128 * PAGE, 0))
        at = 0
        for offset, length in zip(delta.offsets, delta.lengths, strict=True):
            assert delta.data is not None
            rebuilt[offset : offset + length] = delta.data[at : at + length]
            at += length
        for offset, length in zip(delta.zero_offsets, delta.zero_lengths, strict=True):
            rebuilt[offset : offset + length] = bytes(length)
        assert rebuilt == wanted
        ours.close()
    finally:
        os.close(fd)


def test_nobody_changes_a_base(base: int) -> None:
    for attempt in (lambda: os.pwrite(base, b"x", 0), lambda: os.ftruncate(base, 0), lambda: os.ftruncate(base, 2 * SIZE)):
        with pytest.raises(PermissionError):
            attempt()
    with holder(base) as one:
        # What QEMU does for a guest that frees memory: fallocate(PUNCH_HOLE) on the file, and MADV_REMOVE.
        one.do(f"print(libc.fallocate(3, 3, ctypes.c_long(0), ctypes.c_long({PAGE})))")
        one.do(f"print(libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t({PAGE}), 9))")
    assert os.pread(base, 4, 0) == b"base"


def test_memory_that_is_still_written_is_no_base() -> None:
    fd = new_memory("test", SIZE)
    try:
        with mmap.mmap(fd, SIZE), pytest.raises(HostError) as caught:
            sealed(fd)
        assert caught.value.code == "memory_in_use"
        sealed(fd)
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    finally:
        os.close(fd)


def test_a_process_without_the_base_or_with_a_hole_in_it(base: int) -> None:
    with pytest.raises(GuestError, match="does not map"):
        capture(os.getpid(), base, Scratch())
    with holder(base) as one:
        one.do(f"libc.munmap(ctypes.c_void_p(address + {SIZE // 2}), ctypes.c_size_t({PAGE}))")
        with pytest.raises(GuestError, match="in the middle|only a part"):
            capture(one.pid, base, Scratch())


def test_a_delta_of_another_size_is_refused(base: int) -> None:
    with holder(base) as one, pytest.raises(HostError) as caught:
        inject(one.pid, base, Delta(SIZE * 2))
    assert caught.value.code == "memory_mismatch"


def test_a_delta_goes_through_its_file(base: int, tmp_path: Path) -> None:
    with holder(base) as parent, holder(base) as child, open(tmp_path / "delta", "w+b") as file:
        parent.do(WRITES)
        write_delta(capture(parent.pid, base, Scratch()), file.fileno())
        delta = read_delta(file.fileno())
        inject(child.pid, base, delta)
        assert [child.page(n)[:4] for n in (0, 5, 699)] == [b"mine", bytes(4), b"xxxx"]


def test_an_empty_delta_goes_through_its_file(tmp_path: Path) -> None:
    with open(tmp_path / "delta", "w+b") as file:
        write_delta(Delta(SIZE), file.fileno())
        assert read_delta(file.fileno()).bytes == 0


@given(cut=st.integers(0, 3 * PAGE), flips=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3))
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_is_refused_or_harmless(cut: int, flips: list[tuple[int, int]]) -> None:
    delta = Delta(SIZE, array("Q", (0, 8 * PAGE)), array("Q", (PAGE, PAGE)), array("Q", (4 * PAGE,)), array("Q", (PAGE,)))
    delta.data = mmap.mmap(-1, 2 * PAGE)
    fd = os.memfd_create("delta")
    try:
        write_delta(delta, fd)
        for at, value in flips:
            os.pwrite(fd, bytes([value]), at)
        os.ftruncate(fd, os.fstat(fd).st_size - cut)
        found = read_delta(fd)
        for offset, length in zip(found.offsets, found.lengths, strict=True):
            assert offset + length <= found.size
    except HostError as e:
        assert e.code == "delta_damaged"
    finally:
        os.close(fd)


def content(fd: int) -> bytes:
    return os.pread(fd, SIZE, 0)


@pytest.mark.parametrize("of", ["base", "empty"])
def test_base_and_delta_are_a_new_base(base: int, of: str, tmp_path: Path) -> None:
    """The empty base is anonymous memory that is known by its device; what it and the delta make is what the process has."""
    under = base if of == "base" else empty_memory()
    with holder(under) as one, open(tmp_path / "new", "w+b") as new:
        one.do(WRITES)
        one.do(f"libc.madvise(ctypes.c_void_p(address + 200 * {PAGE}), {PAGE}, 4)")
        delta = capture(one.pid, under, Scratch(), SIZE)
        flatten(under, delta, new.fileno())
        with open(tmp_path / "other", "w+b") as other:
            assert write_base(under, delta, other.fileno()) == digest_of_memory(other.fileno()) == digest_of_memory(new.fileno())
            assert content(other.fileno()) == content(new.fileno())
        wanted = bytearray(SIZE)
        if of == "base":
            wanted[: 16 * PAGE] = content(base)[: 16 * PAGE]
        wanted[0:4] = b"mine"
        wanted[5 * PAGE : 6 * PAGE] = bytes(PAGE)
        wanted[100 * PAGE : 700 * PAGE] = b"x" * (600 * PAGE)
        wanted[200 * PAGE : 201 * PAGE] = bytes(PAGE)
        assert content(new.fileno()) == bytes(wanted)
        assert os.fstat(new.fileno()).st_blocks * 512 < SIZE // 2
        assert not delta.zero_offsets
    if of == "empty":
        os.close(under)


RUNS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 256), st.sampled_from(["data", "clear", "zeros", "skip"])), max_size=40
)


@given(runs=RUNS, under=RUNS, length=st.integers(1, 3 * 256), empty=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_new_base_is_what_lies_over_the_old_one(
    runs: list[tuple[int, int, str]], under: list[tuple[int, int, str]], length: int, empty: bool
) -> None:
    """Runs of any kind, over windows' borders and behind each other; the digest does not see what is a hole and what is zeros."""
    size = length * PAGE
    old, delta, data = bytearray(size), Delta(size), bytearray()

    def placed(these: list[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
        at = 0
        for gap, pages, kind in these:
            start, at = (at + gap) * PAGE, at + gap + pages
            if at <= length and kind != "skip":
                yield start, pages * PAGE, kind

    for start, count, kind in placed(under):
        if kind == "data" and not empty:
            old[start : start + count] = os.urandom(count)
    wanted = bytearray(old)
    for start, count, kind in placed(runs):
        offsets, lengths = (delta.zero_offsets, delta.zero_lengths) if kind == "clear" else (delta.offsets, delta.lengths)
        offsets.append(start)
        lengths.append(count)
        wanted[start : start + count] = os.urandom(count) if kind == "data" else bytes(count)
        if kind != "clear":
            data += wanted[start : start + count]
    if data:
        delta.data = mmap.mmap(-1, PAGE + len(data))
        delta.data[PAGE : PAGE + len(data)] = bytes(data)
        delta.start = PAGE
    base = empty_memory() if empty else os.memfd_create("base")
    new, full = os.memfd_create("new"), os.memfd_create("full")
    try:
        if not empty:
            os.ftruncate(base, size)
            for at in range(0, size, PAGE):
                if any(old[at : at + PAGE]):
                    os.pwrite(base, old[at : at + PAGE], at)
        digest = write_base(base, delta, new)
        assert os.pread(new, size + 1, 0) == bytes(wanted)
        os.pwrite(full, bytes(wanted), 0)
        assert digest == digest_of_memory(new) == digest_of_memory(full)
        if any(wanted):
            at = next(n for n, byte in enumerate(wanted) if byte)
            os.pwrite(full, bytes([wanted[at] ^ 1]), at)
            assert digest != digest_of_memory(full)
    finally:
        for fd in (base, new, full):
            os.close(fd)


def test_over_the_empty_base_memory_goes_from_one_to_another() -> None:
    under = empty_memory()
    with holder(under) as one, holder(under) as two:
        one.do(WRITES)
        assert changed_bytes(one.pid, under, SIZE) >= 602 * PAGE
        inject(two.pid, under, capture(one.pid, under, Scratch(), SIZE))
        assert (two.page(0)[:4], two.page(5), two.page(699)) == (b"mine", bytes(8), b"x" * 8)
        bare = capture(one.pid, under, Scratch(), SIZE, zeros=True)
        assert bare.bytes == 601 * PAGE and not bare.zero_offsets
        with pytest.raises(ValueError, match="no size"):
            changed_bytes(one.pid, under)
    os.close(under)


def test_a_sealed_base_is_known() -> None:
    fd = new_memory("test", SIZE)
    assert not is_sealed(fd)
    assert is_sealed(sealed(fd))
    os.close(fd)
    with open("/dev/zero", "rb") as zero:
        assert not is_sealed(zero.fileno())
