"""Image references, Debian's sources, and what tools say while they work."""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path

import pytest

from stoker.errors import HostError, InvalidRequest, NotFound, StokerError
from stoker.images import bootstrap, debian, rootfs
from stoker.images.rootfs import resolve_image
from stoker.settings import Settings, load_settings

pytestmark = pytest.mark.anyio


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    async def no_tools(*_: object, **__: object) -> None:
        pytest.fail("a program was started")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", no_tools)
    environment = {"STOKER_DATA_DIR": str(tmp_path / "data"), "STOKER_CONFIG": str(tmp_path / "none.toml")}
    return load_settings(environment, root=False)


@pytest.mark.parametrize(
    "reference",
    ["debian:99", "debian:", "debian:latest/../..", "base:debian:potato", "nonsense", "", "ubuntu:22.04", "docker:debian", "ext4"],
)
async def test_unknown_images_are_refused_at_once(settings: Settings, reference: str) -> None:
    with pytest.raises(NotFound) as caught:
        await resolve_image(reference, settings)
    assert caught.value.code == "image_unknown"
    assert "debian:12" in caught.value.hint
    assert not settings.data_dir.exists()


def file_system(path: Path, *, blocks: int = 1000, size: int | None = None, magic: int = 0xEF53) -> Path:
    superblock = bytearray(1024)
    struct.pack_into("<IIII", superblock, 0, 100, blocks, 0, 500)
    struct.pack_into("<I", superblock, 24, 2)
    struct.pack_into("<H", superblock, 56, magic)
    struct.pack_into("<III", superblock, 92, 4, 0x42, 0)
    path.write_bytes(b"\0" * 1024 + superblock)
    os.truncate(path, blocks * 4096 if size is None else size)
    return path


async def test_a_file_of_the_users_is_taken_as_it_is(settings: Settings, tmp_path: Path) -> None:
    path = file_system(tmp_path / "root.img")
    link = tmp_path / "link"
    link.symlink_to(path)
    found = await resolve_image(f"ext4:{link}", settings)
    assert (found.path, found.size, found.fstype) == (path, 4096000, "ext4")
    assert (found.user, found.workdir, found.command, dict(found.env).keys()) == ("root", "/", ("/bin/bash",), {"PATH"})
    again = await resolve_image(f"ext4:{path}", settings)
    assert again.digest == found.digest
    os.utime(path, (1, 1))
    assert (await resolve_image(f"ext4:{path}", settings)).digest != found.digest


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, "image_unknown"),
        (lambda path: path.mkdir(), "image_invalid"),
        (lambda path: os.mkfifo(path), "image_invalid"),
        (lambda path: path.write_bytes(b""), "image_invalid"),
        (lambda path: path.write_bytes(b"\0" * 4096), "image_invalid"),
        (lambda path: file_system(path, magic=0x1234), "image_invalid"),
        (lambda path: file_system(path, size=999 * 4096), "image_invalid"),
        (lambda path: file_system(path, blocks=0, size=8192), "image_invalid"),
    ],
)
async def test_what_is_no_ext4_is_refused(settings: Settings, tmp_path: Path, make: object, code: str) -> None:
    assert callable(make)
    path = tmp_path / "it"
    make(path)
    with pytest.raises(StokerError) as caught:
        async with asyncio.timeout(5):
            await resolve_image(f"ext4:{path}", settings)
    assert caught.value.code == code
    assert str(path) in caught.value.message


async def test_ext4_without_a_path(settings: Settings) -> None:
    with pytest.raises(InvalidRequest, match="without a path"):
        await resolve_image("ext4:", settings)


async def test_a_missing_tool_is_named_with_the_command_that_installs_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap.shutil, "which", lambda tool, path=None: None if tool in ("mmdebstrap", "mke2fs") else tool)
    with pytest.raises(HostError) as caught:
        await resolve_image("debian:12", settings)
    assert caught.value.code == "tool_missing"
    assert caught.value.hint == "apt-get install e2fsprogs mmdebstrap"
    assert list((settings.data_dir / "staging").iterdir()) == []


async def test_no_space_is_found_before_anything_is_fetched(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    with pytest.raises(HostError, match="building debian:12") as caught:
        await resolve_image("debian:12", settings)
    assert caught.value.code == "no_space"


HOST = """\
http://mirror.test/debian/|bookworm|Debian|main
http://mirror.test/debian/|bookworm-updates|Debian|main
http://other.test/debian-security/|bookworm-security|Debian-Security|main
http://mirror.test/debian/|bookworm|Debian|contrib
https://packages.test/apt/|nodistro|Something|main
"""


def test_the_hosts_own_mirrors_are_taken() -> None:
    expected = debian.Mirrors("http://mirror.test/debian", "http://other.test/debian-security")
    assert debian.mirrors_of_host(HOST) == expected
    assert debian.mirrors_of_host("\n".join(reversed(HOST.splitlines()))) == expected
    # Before its first update apt knows no labels.
    fresh = HOST.replace("|Debian|", "|$(LABEL)|").replace("|Debian-Security|", "|$(LABEL)|").replace("|Something|", "|$(LABEL)|")
    assert debian.mirrors_of_host(fresh) == expected


@pytest.mark.parametrize(
    "listed",
    [
        "",
        "http://a.test/ubuntu/|jammy|Ubuntu|main",
        "cdrom://[Debian]/|bookworm|Debian|main",
        "http://x.test/debian/|bookworm|Debian|contrib",
    ],
)
def test_a_host_without_debian_has_no_mirror_for_us(listed: str) -> None:
    assert debian.mirrors_of_host(listed) is None


async def test_a_configured_mirror_wins(settings: Settings) -> None:
    def configured(value: str) -> Settings:
        environment = {"STOKER_DATA_DIR": "/nonexistent", "STOKER_CONFIG": "/nonexistent", "STOKER_DEBIAN_MIRROR": value}
        return load_settings(environment, root=False)

    find = debian.find_mirrors
    assert await find(configured("http://m.test/debian/"), "bookworm") == debian.Mirrors(
        "http://m.test/debian", "http://m.test/debian-security"
    )
    assert await find(configured("http://m.test/snapshot"), "bookworm") == debian.Mirrors("http://m.test/snapshot")
    assert await find(configured("http://m.test/a http://m.test/b/"), "sid") == debian.Mirrors("http://m.test/a", "http://m.test/b")


def test_sources_name_the_keyring_and_fit_the_suite() -> None:
    mirrors = debian.Mirrors("http://m.test/debian", "http://m.test/debian-security")
    text = debian.render_sources("trixie", mirrors, "/keys.gpg", only_packages=True)
    first, second = text.split("\n\n")
    assert first.splitlines() == [
        "Types: deb",
        "URIs: http://m.test/debian",
        "Suites: trixie trixie-updates",
        "Components: main",
        "Targets: Packages",
        "Signed-By: /keys.gpg",
    ]
    assert "Suites: trixie-security" in second and "Signed-By: /keys.gpg" in second
    sid = debian.render_sources("sid", mirrors, "/keys.gpg")
    assert "Suites: sid\n" in sid and "security" not in sid and "Targets" not in sid


def test_apts_private_root_names_nothing_of_the_hosts_and_runs_no_hooks(tmp_path: Path) -> None:
    text = debian.render_apt_configuration(tmp_path, sandbox=True)
    assert "#clear APT::Update::Post-Invoke;" in text
    for name in ("Dir::State ", "Dir::State::status", "Dir::Cache", "Dir::Etc::SourceParts"):
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert f'"{tmp_path}' in line
    assert "Sandbox" not in text
    assert 'APT::Sandbox::User "root";' in debian.render_apt_configuration(tmp_path, sandbox=False)


class Recorder:
    def __init__(self) -> None:
        self.steps: list[tuple[str, float | None, float | None, str]] = []

    def step(self, name: str, done: float | None, total: float | None, detail: str = "") -> None:
        self.steps.append((name, done, total, detail))


def test_what_mmdebstrap_says_becomes_progress_that_never_goes_back_within_a_phase() -> None:
    recorder = Recorder()
    steps = bootstrap._Steps(recorder, "installing")
    lines = [
        "I: running --setup-hook directly: x",
        "Get:1 http://m bookworm InRelease [1 kB]",
        "I: downloading packages with apt...",
    ]
    lines += ["0 upgraded, 2 newly installed, 0 to remove"]
    lines += ["Get:1 http://m bookworm/main amd64 libc6 amd64 2 [1 kB]", "Get:2 http://m bookworm/main amd64 dash amd64 1 [1 kB]"]
    lines += [
        "I: extracting archives...",
        "I: installing essential packages...",
        "Unpacking libc6:amd64 (2) ...",
        "Setting up libc6 (2) ...",
    ]
    lines += ["noise", "I: creating tarball..."]
    for line in lines:
        steps(line)
    done = [step[1] for step in recorder.steps]
    assert done == sorted(done, key=float)  # type: ignore[arg-type]
    assert ("installing", 22.5, 100.0, "libc6") in recorder.steps
    assert not steps.full
    steps("dpkg: error: cannot copy: No space left on device")
    assert steps.full


@pytest.mark.parametrize(
    ("stderr", "code"),
    [
        (["E: Failed to fetch http://m.test/x  Could not connect"], "fetch_failed"),
        (
            ["W: GPG error: http://m.test bookworm InRelease: NO_PUBKEY 0E98404D386FA1D9", "E: mmdebstrap failed to run"],
            "signature_invalid",
        ),
        (["E: Release file for http://m.test/InRelease is not valid yet"], "signature_invalid"),
        (["E: something else"], "build_failed"),
    ],
)
def test_what_goes_wrong_in_a_build_has_a_code(stderr: list[str], code: str) -> None:
    error = HostError("tool_failed", "mmdebstrap exited with 1", details={"stderr": stderr})
    assert bootstrap._bootstrap_error(error, "bookworm").code == code


def test_the_archive_and_the_host_decide_what_debugfs_writes(tmp_path: Path) -> None:
    import io
    import tarfile

    archive, tree = tmp_path / "tree.tar", tmp_path / "tree"
    tree.mkdir()
    (tree / "shadow").write_text("x")
    (tree / "secret").write_text("x")
    (tree / "secret").chmod(0)
    (tree / "mine").write_text("x")
    (tree / "mine").chmod(0o644)
    with tarfile.open(archive, "w") as tar:
        for name, uid, gid, mode in (
            ("./shadow", 0, 42, 0o640),
            ("./secret", 0, 0, 0),
            ("./mine", os.getuid(), os.getgid(), 0o644),
            ("./dev/null", 0, 0, 0o666),
        ):
            member = tarfile.TarInfo(name)
            member.uid, member.gid, member.mode = uid, gid, mode
            tar.addfile(member, io.BytesIO())
    (tree / "shadow").chmod(0o640)
    lines = bootstrap._differences(archive, tree).splitlines()
    assert 'sif "/shadow" gid 42' in lines
    assert 'sif "/secret" mode 0100000' in lines
    assert not any("mine" in line or "null" in line for line in lines)
    assert (tree / "secret").stat().st_mode & 0o400, "mke2fs has to read it"


def test_the_module_says_what_it_exports() -> None:
    assert rootfs.RootFilesystem(Path("/x"), 1, "d", "n").env == (("PATH", rootfs.PATH),)
