"""Kernels, base systems and overlays for real: fetched, built, interrupted, damaged, and judged by other people's tools."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stoker.errors import HostError
from stoker.host.files import remove_tree
from stoker.images.kernel import resolve_kernel
from stoker.images.rootfs import resolve_image
from stoker.images.store import Store
from stoker.settings import Settings, load_settings
from stoker.storage.overlay import create_overlay

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]
REPOSITORY = Path(__file__).resolve().parents[2]


def tool(*words: object, check: bool = True) -> str:
    """What a program says on both streams."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        pytest.fail(f"{words} ended with {done.returncode}: {done.stderr}")
    return done.stdout + done.stderr


@pytest.fixture
def own(session_root: Path, short_dir: Path) -> Settings:
    """Settings with an empty data directory of the test's own."""
    environment = {
        "STOKER_DATA_DIR": str(short_dir / "data"),
        "STOKER_RUN_DIR": str(short_dir / "run"),
        "STOKER_CONFIG": "/nonexistent",
    }
    mirror = os.environ.get("STOKER_DEBIAN_MIRROR")
    return load_settings(environment | ({"STOKER_DEBIAN_MIRROR": mirror} if mirror else {}))


@pytest.mark.parametrize("gibibytes", [0, 3, 600, 5000])
def test_qemu_img_finds_nothing_wrong_with_an_overlay(tmp_path: Path, gibibytes: int) -> None:
    backing, overlay = tmp_path / "base", tmp_path / "overlay"
    backing.write_bytes(os.urandom(1 << 20))
    create_overlay(overlay, backing, gibibytes << 30)
    assert "No errors were found" in tool("qemu-img", "check", "-f", "qcow2", overlay)
    told = tool("qemu-img", "info", "-f", "qcow2", overlay)
    assert f"({max(gibibytes << 30, 1 << 20)} bytes)" in told
    assert "backing file" not in told
    # Written through and read back: what QEMU allocates beside our tables is consistent too, and the base keeps its bytes.
    before = backing.read_bytes()
    nodes = {"driver": "qcow2", "file": {"driver": "file", "filename": str(overlay)}}
    image = "json:" + json.dumps(nodes | {"backing": {"driver": "raw", "file": {"driver": "file", "filename": str(backing)}}})
    tool("qemu-io", "-c", "write -P 0x5a 4k 8k", "-c", "read -P 0x5a 4k 8k", image)
    assert "No errors were found" in tool("qemu-img", "check", "-f", "qcow2", overlay)
    assert backing.read_bytes() == before


async def test_the_kernel_is_there_with_its_modules_and_costs_nothing_the_second_time(settings: Settings) -> None:
    kernel = await resolve_kernel("debian:12", settings)
    assert kernel.release.startswith("6.1.") and kernel.release.endswith("-cloud-amd64")
    assert kernel.modules is not None and next(kernel.modules.rglob("virtio_blk.ko*"))
    assert (await resolve_kernel("debian:bookworm", settings)).digest == kernel.digest
    assert (await resolve_kernel(kernel.digest, settings)).vmlinux == kernel.vmlinux
    assert Store(settings).verify("kernels", kernel.digest) == []
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        await resolve_kernel("debian:12", settings)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.005


async def test_the_base_is_a_sound_file_system_with_the_right_owners(settings: Settings) -> None:
    image = await resolve_image("debian:12", settings)
    check_base(image.path, "12")
    assert Store(settings).verify("images", image.digest) == []
    assert image.size == image.path.stat().st_size
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        assert await resolve_image("base:debian:bookworm", settings) == replace(image, name="base:debian:bookworm")
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.005


def check_base(path: Path, version: str) -> None:
    assert path.stat().st_mode & 0o222 == 0
    tool("e2fsck", "-f", "-n", path)

    def debugfs(command: str) -> str:
        return tool("debugfs", "-R", command, path)

    def owner(name: str) -> tuple[str, str, str]:
        words = debugfs(f'stat "{name}"').split()
        return words[words.index("User:") + 1], words[words.index("Group:") + 1], words[words.index("Mode:") + 1]

    assert owner("/") == ("0", "0", "0755")
    assert owner("/etc/shadow") == ("0", "42", "0640")
    assert owner("/tmp") == ("0", "0", "01777")
    assert owner("/usr/bin/passwd") == ("0", "0", "04755")
    assert owner("/var/mail") == ("0", "8", "02775")
    assert owner("/bin/bash") == ("0", "0", "0755")
    assert f'VERSION_ID="{version}"' in debugfs("cat /usr/lib/os-release")
    assert "Signed-By:" in debugfs("cat /etc/apt/sources.list.d/debian.sources")
    for name in (
        "/etc/dpkg/dpkg.cfg.d/99mmdebstrap",
        "/etc/hostname",
        "/etc/resolv.conf",
        "/dev/null",
        "/var/lib/apt/lists/lock.x",
    ):
        assert "File not found" in debugfs(f"stat {name}"), "nothing of this host, no devices"
    assert ".deb" not in debugfs("ls -p /var/cache/apt/archives")


async def test_a_damaged_package_in_the_cache_is_fetched_again(own: Settings) -> None:
    package = own.data_dir / "cache/apt/bookworm/packages"
    package.mkdir(parents=True)
    # As large as the real one and wrong in every byte, under whatever name the suite has now: apt alone would take it.
    stored = await resolve_kernel("debian:12", load_settings())
    (package / f"linux-image-{stored.release}.deb").write_bytes(b"\xee" * 26_713_492)
    (package / "linux-image-5.0.0-old-cloud-amd64.deb").write_bytes(b"old")
    kernel = await resolve_kernel("debian:12", own)
    assert kernel.release.startswith("6.1.")
    assert list(package.iterdir()) == []
    assert Store(own).verify("kernels", kernel.digest) == []
    assert list((own.data_dir / "staging").iterdir()) == []


async def test_two_first_runs_share_one_fetch(own: Settings) -> None:
    class Told:
        def __init__(self) -> None:
            self.steps: set[str] = set()

        def step(self, name: str, done: float | None, total: float | None, detail: str = "") -> None:
            self.steps.add(name)

    first, second = Told(), Told()
    kernels = await asyncio.gather(resolve_kernel("debian:12", own, first), resolve_kernel("debian:12", own, second))
    assert kernels[0] == kernels[1]
    waited = [told.steps for told in (first, second) if any("another run" in step for step in told.steps)]
    assert waited == [{"another run is fetching the kernel debian:12"}], "one waits, and fetches nothing"


async def test_an_unreachable_mirror_is_one_error_and_leaves_nothing(own: Settings) -> None:
    nowhere = replace(own, debian_mirror="http://127.0.0.1:9/debian")
    begin = time.monotonic()
    with pytest.raises(HostError) as caught:
        await resolve_kernel("debian:12", nowhere)
    assert caught.value.code == "fetch_failed"
    assert "network" in caught.value.hint
    assert time.monotonic() - begin < 30
    assert not (own.data_dir / "kernels").exists()


@pytest.fixture
def forged(short_dir: Path) -> Iterator[str]:
    """A mirror that offers a kernel of its own, well-formed and signed by nobody."""
    root = short_dir / "mirror" / "debian"
    binary = root / "dists/bookworm/main/binary-amd64"
    binary.mkdir(parents=True)
    depends = "Package: linux-image-cloud-amd64\nVersion: 1\nArchitecture: amd64\nDepends: linux-image-6.6.6-cloud-amd64\n"
    listed = depends + f"Filename: pool/x.deb\nSize: 3\nSHA256: {hashlib.sha256(b'deb').hexdigest()}\n"
    (binary / "Packages").write_text(listed)
    entry = f" {hashlib.sha256(listed.encode()).hexdigest()} {len(listed)} main/binary-amd64/Packages\n"
    release = "Origin: Debian\nLabel: Debian\nSuite: bookworm\nCodename: bookworm\nDate: Sat, 01 Jan 2022 00:00:00 UTC\n"
    (root / "dists/bookworm/Release").write_text(f"{release}Architectures: amd64\nComponents: main\nSHA256:\n{entry}")
    shutil.copytree(root / "dists/bookworm", root / "dists/bookworm-updates")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *words: Any) -> None:
            super().__init__(*words, directory=str(short_dir / "mirror"))

        def log_message(self, format: str, *words: Any) -> None:
            return None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/debian"
    server.shutdown()
    server.server_close()
    thread.join()


async def test_a_mirror_without_debians_signature_is_refused(own: Settings, forged: str) -> None:
    with pytest.raises(HostError) as caught:
        await resolve_kernel("debian:12", replace(own, debian_mirror=f"{forged} {forged}"))
    assert caught.value.code == "signature_invalid", caught.value
    assert not (own.data_dir / "kernels").exists()
    with pytest.raises(HostError) as caught:
        await resolve_image("debian:12", replace(own, debian_mirror=f"{forged} {forged}"))
    assert caught.value.code == "signature_invalid", caught.value
    assert not (own.data_dir / "images").exists()
    assert list((own.data_dir / "staging").iterdir()) == []


BUILD = """
import asyncio, sys
from stoker.images.rootfs import resolve_image
from stoker.settings import load_settings

class Told:
    def step(self, name, done, total, detail=""):
        print(name, done, total, detail, flush=True)

print((asyncio.run(resolve_image("debian:12", load_settings(), Told()))).path, flush=True)
"""


def environment(own: Settings) -> dict[str, str]:
    return {**os.environ, "STOKER_DATA_DIR": str(own.data_dir), "STOKER_RUN_DIR": str(own.run_dir), "STOKER_CONFIG": "/nonexistent"}


def below(root: Path) -> list[int]:
    """Processes whose command line or environment names a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(root).encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.full
@pytest.mark.parametrize("point", ["running --setup-hook", "extracting archives", "installing essential", "unpacking", "storing"])
async def test_a_killed_build_ends_whole_and_the_next_one_cleans_up(own: Settings, point: str) -> None:
    with start_build(own) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if point in line:
                break
        process.kill()
    deadline = time.monotonic() + 20
    while (left := below(own.data_dir)) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    assert left == [], "mmdebstrap and its children end with us"
    assert str(own.data_dir) not in Path("/proc/mounts").read_text()
    assert not list((own.data_dir / "images").glob("?" * 64))
    image = await resolve_image("debian:12", own)
    check_base(image.path, "12")
    assert list((own.data_dir / "staging").iterdir()) == []


def start_build(own: Settings) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", BUILD], env=environment(own), stdout=subprocess.PIPE, text=True)


@pytest.fixture
def unprivileged() -> Iterator[str]:
    """A user made for this test."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a user")
    name = f"stk{os.getpid()}"
    tool("useradd", "--create-home", name)
    found = pwd.getpwnam(name)
    yield name
    # A test that was interrupted leaves tools that are just ending; a user with processes cannot be removed.
    deadline = time.monotonic() + 20
    while (left := owned_by(found.pw_uid)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    for path in Path("/var/tmp").glob(f"stoker-{found.pw_uid}-*"):
        remove_tree(path)
    tool("userdel", "--remove", name)


def owned_by(uid: int) -> list[int]:
    """The processes of a user."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                found.append(int(entry.name))
    return found


@pytest.mark.full
@pytest.mark.parametrize("home", [0o755, 0o700])
def test_an_unprivileged_user_gets_the_same_base(unprivileged: str, home: int) -> None:
    """With an ordinary home, and with one that a user namespace's other users cannot enter."""
    python = "/usr/bin/python3"
    site = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    found = pwd.getpwnam(unprivileged)
    os.chmod(found.pw_dir, home)
    base = {"HOME": found.pw_dir, "USER": unprivileged, "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    env = [f"{name}={value}" for name, value in {**base, "PYTHONPATH": f"{REPOSITORY / 'src'}:{site}"}.items()]
    if mirror := os.environ.get("STOKER_DEBIAN_MIRROR"):
        env.append(f"STOKER_DEBIAN_MIRROR={mirror}")
    become = ["setpriv", f"--reuid={found.pw_uid}", f"--regid={found.pw_gid}", "--clear-groups", "env", "-i", *env]
    done = subprocess.run(
        [*become, "sh", "-c", 'umask 077; exec "$@"', "sh", python, "-c", BUILD],
        cwd="/",
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if "ModuleNotFoundError" in done.stderr or "Permission denied" in done.stderr.partition("\n")[0]:
        pytest.skip(f"the system's Python cannot use this environment: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.splitlines()[-1])
    assert path.stat().st_uid == found.pw_uid
    check_base(path, "12")
    assert list((path.parents[2] / "staging").iterdir()) == []
    assert not list(Path("/var/tmp").glob(f"stoker-{found.pw_uid}-*"))


@pytest.mark.full
@pytest.mark.parametrize(("suite", "version", "release"), [("13", "13", "6.12."), ("11", "11", "5.10.")])
async def test_the_other_suites(own: Settings, suite: str, version: str, release: str) -> None:
    kernel = await resolve_kernel(f"debian:{suite}", own)
    assert kernel.release.startswith(release)
    check_base((await resolve_image(f"debian:{suite}", own)).path, version)


@pytest.mark.full
async def test_a_disk_that_fills_up_in_the_middle_is_no_space_and_leaves_nothing(own: Settings, short_dir: Path) -> None:
    """A file system with less room than the build needs, although enough seemed free at its beginning."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    small = short_dir / "small"
    small.mkdir()
    tool("mount", "-t", "tmpfs", "-o", "size=250m", "none", small)
    try:
        full = replace(own, data_dir=small / "data")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "require_space", lambda *_: None)
            with pytest.raises(HostError) as caught:
                await resolve_image("debian:12", full)
        assert caught.value.code == "no_space"
        assert list((small / "data" / "staging").iterdir()) == []
        assert not list((small / "data" / "images").glob("?" * 64))
    finally:
        tool("umount", small)
