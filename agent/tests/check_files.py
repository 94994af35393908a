"""The file applets, on this host's files."""

from __future__ import annotations

import io
import os
import pwd
import subprocess
import tarfile
import tempfile
from pathlib import Path

from harness import Agent, Box, fails, host_test, records


@host_test
def writes_and_reads_files(a: Agent) -> None:
    box, d = Box(a.connect()), a.directory
    e = box.entry("write", b"hello", path=f"{d}/a/b/c.txt")
    assert (
        e["size"] == 5
        and e["type"] == "file"
        and e["mode"] == 0o644
        and e["path"] == f"{d}/a/b/c.txt".encode()
        and e["name"] == b"c.txt"
    )
    assert e["user"] == pwd.getpwuid(os.geteuid()).pw_name
    assert Path(f"{d}/a/b/c.txt").read_bytes() == b"hello"
    os.chmod(f"{d}/a/b/c.txt", 0o750)
    inode = os.stat(f"{d}/a/b/c.txt").st_ino
    e = box.entry("write", b"replaced", path=f"{d}//a/./b/c.txt")
    assert e["mode"] == 0o750 and e["ino"] != inode and e["path"] == f"{d}/a/b/c.txt".encode()
    assert box.entry("write", b"", path=f"{d}/m", mode=0o4711)["mode"] == 0o4711
    assert box.entry("write", b" more", path=f"{d}/a/b/c.txt", append=True)["size"] == 13
    assert box("read", path=f"{d}/a/b/c.txt") == b"replaced more"
    assert box("read", path=f"{d}/a/b/c.txt", offset=9, length=2) == b"mo"
    assert box("read", path=f"{d}/a/b/c.txt", offset=99) == b""
    assert box("read", path="/proc/self/comm").startswith(b"stoker-agent")
    big = os.urandom(5 << 20)
    assert box.entry("write", big, path=f"{d}/big", size=len(big))["size"] == len(big)
    assert box("read", path=f"{d}/big") == big
    assert fails("short_input", box, "write", b"xyz", path=f"{d}/big", size=4).errno
    assert fails("short_input", box, "write", b"xyz", path=f"{d}/new", size=4)
    assert not os.path.exists(f"{d}/new") and os.path.getsize(f"{d}/big") == len(big)
    fails("file_exists", box, "write", b"", path=f"{d}/big", exclusive=True)
    box("write", b"1", path=f"{d}/fresh", exclusive=True)
    fails("is_directory", box, "write", b"", path=d)
    fails("is_directory", box, "read", path=d)
    fails("not_a_file", box, "read", path="/dev/null")
    fails("file_not_found", box, "read", path=f"{d}/none")
    fails("file_not_found", box, "write", b"", path=f"{d}/none/x", parents=False)
    fails("not_directory", box, "write", b"", path=f"{d}/big/x")
    fails("bad_path", box, "stat", path="/" + "x" * 5000)
    fails("bad_path", box, "stat", path="~nosuchuser/x")
    fails("bad_request", box, "stat")
    fails("unsupported", box, "frobnicate")
    box("write", b"null", path="/dev/null")
    # Through links, even one whose target is still missing.
    os.symlink("target", f"{d}/link")
    box("write", b"linked", path=f"{d}/link")
    assert os.readlink(f"{d}/link") == "target" and Path(f"{d}/target").read_bytes() == b"linked"
    box("write", b"again", path=f"{d}/link")
    assert os.path.islink(f"{d}/link") and Path(f"{d}/target").read_bytes() == b"again"
    os.symlink("loop", f"{d}/loop")
    fails("bad_path", box, "write", b"", path=f"{d}/loop")
    assert not [n for n in os.listdir(d) if n.startswith(".stoker")]
    # Relative to the directory; a missing one only matters then.
    box("write", b"rel", path="rel", cwd=d)
    assert Path(f"{d}/rel").read_bytes() == b"rel"
    fails("file_not_found", box, "stat", path="rel", cwd="/no/such")
    assert box.entry("stat", path=f"{d}/rel", cwd="/no/such")["size"] == 3


@host_test
def signals_an_applet_that_only_just_began(a: Agent) -> None:
    """The call is on its way before the applet, a fork, leads a group of its own."""
    h = a.connect()
    box = Box(h)
    for _ in range(50):
        id = box.start("write", stdin=True, path=f"{a.directory}/x")
        h.call("signal", id=id, signal=9)
        assert h.exit_of(id)["signal"] == 9


@host_test
def leaves_no_half_files(a: Agent) -> None:
    h = a.connect()
    box, d = Box(h), a.directory
    Path(f"{d}/old").write_text("old")
    id = box.start("write", stdin=True, path=f"{d}/old")
    h.feed(4 * id, bytes(1 << 20), end=False)
    h.call("signal", id=id, signal=9)
    assert h.exit_of(id)["signal"] == 9
    assert Path(f"{d}/old").read_text() == "old" and sorted(os.listdir(d)) == ["old", "socket"], os.listdir(d)


@host_test
def lists_trees(a: Agent) -> None:
    box, d = Box(a.connect()), a.directory
    for name in ("x/one", "x/two", "x/deep/er/est", "y"):
        Path(f"{d}/t/{name}").parent.mkdir(parents=True, exist_ok=True)
        Path(f"{d}/t/{name}").write_text(name)
    os.symlink("../y", f"{d}/t/x/link")
    os.mkfifo(f"{d}/t/pipe")
    found = records(box("list", path=f"{d}/t"))
    assert found.pop() == {"end": True, "truncated": False, "unreadable": 0}
    assert [(e["name"], e["type"]) for e in found] == [(b"pipe", "fifo"), (b"x", "directory"), (b"y", "file")]
    found = records(box("list", path=f"{d}/t", depth=9))[:-1]
    below = [e["path"].decode()[len(d) + 3 :] for e in found]
    assert below == ["pipe", "x", "x/deep", "x/deep/er", "x/deep/er/est", "x/link", "x/one", "x/two", "y"], below
    assert next(e for e in found if e["name"] == b"link")["target"] == b"../y"
    found = records(box("list", path=f"{d}/t", depth=9, limit=4))
    assert len(found) == 5 and found[-1]["truncated"]
    fails("not_directory", box, "list", path=f"{d}/t/y")
    for i in range(3000):
        Path(f"{d}/t/x/f{i}").touch()
    found = records(box("list", path=f"{d}/t/x"))
    assert len(found) == 3005
    entry = box.entry("stat", path=f"{d}/t/x/link", follow=False)
    assert entry["type"] == "symlink" and box.entry("stat", path=f"{d}/t/x/link")["type"] == "file"


@host_test
def changes_trees(a: Agent) -> None:
    box, d = Box(a.connect()), a.directory
    assert box.entry("mkdir", path=f"{d}/p/q/r", mode=0o711)["mode"] == 0o711
    box("mkdir", path=f"{d}/p/q/r")
    fails("file_exists", box, "mkdir", path=f"{d}/p", parents=False)
    fails("file_not_found", box, "mkdir", path=f"{d}/no/way", parents=False)
    Path(f"{d}/p/q/file").write_text("x")
    fails("not_directory", box, "mkdir", path=f"{d}/p/q/file")
    os.symlink("/etc", f"{d}/p/etc")
    assert box.entry("chmod", path=f"{d}/p", mode=0o700, recursive=True)["mode"] == 0o700
    assert os.stat(f"{d}/p/q/file").st_mode & 0o7777 == 0o700 and os.stat("/etc").st_mode & 0o777 == 0o755
    fails("bad_request", box, "chmod", path=f"{d}/p", mode=0o77777)
    if not os.geteuid():
        e = box.entry("chown", path=f"{d}/p", owner="daemon:31", recursive=True)
        assert (e["uid"], e["gid"]) == (1, 31) and os.lstat(f"{d}/p/etc").st_uid == 1 and os.stat("/etc").st_uid == 0
        assert box.entry("chown", path=f"{d}/p", owner=":12")["gid"] == 12
        assert box.entry("chown", path=f"{d}/p", owner="77")["gid"] == 12
        fails("no_such_user", box, "chown", path=f"{d}/p", owner="nosuch")
        fails("permission_denied", box, "chmod", path=f"{d}/p/q", mode=0o777, user="daemon")
        box("chown", path=f"{d}/p", owner="0:0", recursive=True)
    box("symlink", path=f"{d}/s", target="p/q")
    fails("file_exists", box, "symlink", path=f"{d}/s", target="x")
    assert box.entry("symlink", path=f"{d}/s", target="p", overwrite=True)["target"] == b"p"
    assert box("readlink", path=f"{d}/s") == b"p"
    assert box("readlink", path=f"{d}/s/q/file", canonical=True) == f"{d}/p/q/file".encode()
    e = box.entry("move", source=f"{d}/p/q/file", destination=f"{d}/moved")
    assert e["path"] == f"{d}/moved".encode() and not os.path.exists(f"{d}/p/q/file")
    Path(f"{d}/other").write_text("o")
    fails("file_exists", box, "move", source=f"{d}/moved", destination=f"{d}/other", overwrite=False)
    box("move", source=f"{d}/moved", destination=f"{d}/other")
    fails("file_not_found", box, "move", source=f"{d}/moved", destination=f"{d}/x")
    fails("directory_not_empty", box, "remove", path=f"{d}/p")
    box("remove", path=f"{d}/s")
    box("remove", path=f"{d}/p", recursive=True)
    assert sorted(os.listdir(d)) == ["other", "socket"] and os.path.exists("/etc/passwd")
    fails("file_not_found", box, "remove", path=f"{d}/p")
    box("remove", path=f"{d}/p", missing_ok=True)
    fails("is_directory", box, "remove", path="/", recursive=True)


@host_test
def moves_across_file_systems(a: Agent) -> None:
    if os.stat("/dev/shm").st_dev == os.stat(a.directory).st_dev:
        return
    box, d = Box(a.connect()), a.directory
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        Path(f"{d}/tree/sub").mkdir(parents=True)
        Path(f"{d}/tree/sub/f").write_bytes(b"x" * 100_000)
        os.symlink("f", f"{d}/tree/sub/l")
        os.link(f"{d}/tree/sub/f", f"{d}/tree/h")
        os.utime(f"{d}/tree/sub/f", (1000, 2000))
        box("move", source=f"{d}/tree", destination=f"{other}/arrived")
        assert not os.path.exists(f"{d}/tree")
        assert Path(f"{other}/arrived/sub/f").read_bytes() == b"x" * 100_000 and os.readlink(f"{other}/arrived/sub/l") == "f"
        assert os.stat(f"{other}/arrived/h").st_ino == os.stat(f"{other}/arrived/sub/f").st_ino
        assert os.stat(f"{other}/arrived/h").st_mtime == 2000
        box("move", source=f"{other}/arrived/sub/l", destination=f"{d}/l")
        assert os.readlink(f"{d}/l") == "f"
        box("move", source=f"{other}/arrived/h", destination=f"{d}/h")
        assert os.path.getsize(f"{d}/h") == 100_000 and not os.path.exists(f"{other}/arrived/h")


@host_test
def packs_and_unpacks(a: Agent) -> None:
    box, d = Box(a.connect()), a.directory
    t = Path(f"{d}/t")
    (t / "sub" / "empty").mkdir(parents=True)
    (t / "sub" / "f").write_bytes(os.urandom(70_000))
    (t / ("n" * 120)).write_text("long")
    deep = t / ("d" * 90) / ("e" * 90) / ("f" * 90)
    deep.mkdir(parents=True)
    (deep / "bottom").write_text("deep")
    (t / "é").write_text("not ascii")
    os.symlink("z" * 150, t / "link")
    os.link(t / "sub" / "f", t / "hard")
    os.chmod(t / "sub" / "f", 0o4755)
    os.chmod(t / "sub" / "empty", 0o500)
    os.utime(t / "sub" / "f", (5, 1234567890))
    os.utime(t / "sub", (5, 1234567000))
    os.mkfifo(t / "pipe")
    data = box("tar-out", path=str(t))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        names = tar.getnames()
        assert names[0] in (".", "./") and {"./hard", "./sub/f", "./" + "n" * 120, "./é"} <= set(names), names
        assert tar.getmember("./link").linkname == "z" * 150
        links = [m for m in tar if m.islnk()]
        assert len(links) == 1
        assert tar.getmember("./sub/empty").mode == 0o500
    box("tar-in", data, path=f"{d}/u", preserve=not os.geteuid())
    listing = "find . -printf '%p %y %m %l %n %U\\n' | sort; find . ! -type l -printf '%p %T@\\n' | sort"
    show = ["sh", "-c", f"cd $1; {listing}; find . -type f -exec sha1sum {{}} + | sort", "-"]
    first, second = (subprocess.run([*show, f"{d}/{x}"], capture_output=True, check=True).stdout.decode() for x in "tu")
    cut = "\n".join(line.split(".")[0] if "." in line[2:] else line for line in first.splitlines())
    assert [x.rsplit(".", 1)[0] for x in first.splitlines()] == [x.rsplit(".", 1)[0] for x in second.splitlines()], cut
    # Over what is there: replaced, merged.
    Path(f"{d}/u/sub/f").write_text("other")
    Path(f"{d}/u/sub/extra").write_text("stays")
    box("tar-in", data, path=f"{d}/u")
    assert os.path.getsize(f"{d}/u/sub/f") == 70_000 and os.path.exists(f"{d}/u/sub/extra")
    if not os.geteuid():
        os.mkdir(f"{d}/v", 0o777)
        os.chmod(d, 0o755)
        os.chmod(f"{d}/v", 0o777)
        box("tar-in", data, path=f"{d}/v", user="daemon")
        assert os.stat(f"{d}/v/sub/f").st_uid == 1 and os.stat(f"{d}/v/sub/f").st_mode & 0o7777 == 0o755
        fails("permission_denied", box, "tar-in", data, path=f"{d}/v", user="daemon", preserve=True)
    one = box("tar-out", path=f"{d}/t/sub/f")
    with tarfile.open(fileobj=io.BytesIO(one)) as tar:
        assert tar.getnames() == ["f"]
    fails("too_many", box, "tar-out", path=str(t), limit=1000)
    # What others write.
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
            name = "a" * 80 + "/" + "b" * (150 if kind != tarfile.USTAR_FORMAT else 50)
            m = tarfile.TarInfo(name)
            m.size, m.mtime = 3, 77
            tar.addfile(m, io.BytesIO(b"abc"))
        box("tar-in", out.getvalue(), path=f"{d}/w{kind}")
        assert Path(f"{d}/w{kind}/{name}").read_bytes() == b"abc" and os.stat(f"{d}/w{kind}/{name}").st_mtime == 77


def attributes(top: str) -> dict[str, tuple]:
    """What `exact` keeps of a tree besides the contents."""
    found = {}
    for path in sorted(Path(top).rglob("*")):
        st = path.lstat()
        xattrs = {n: os.getxattr(path, n, follow_symlinks=False) for n in os.listxattr(path, follow_symlinks=False)}
        blocks = st.st_blocks if path.is_file() and not path.is_symlink() else 0
        found[str(path.relative_to(top))] = (st.st_mode, st.st_uid, st.st_mtime_ns, st.st_size, st.st_nlink, blocks, xattrs)
    return found


@host_test
def packs_exactly(a: Agent) -> None:
    """Holes, extended attributes and nanoseconds, there and back; and as Python's tarfile understands them."""
    if os.geteuid():
        return
    box, d = Box(a.connect()), a.directory
    t = Path(f"{d}/t")
    (t / "sub").mkdir(parents=True)
    with open(t / "holes", "wb") as f:
        f.truncate(5 << 20)
        for at in (0, 1 << 20, (3 << 20) + 4096):
            f.seek(at)
            f.write(b"data" * 1024)
    with open(t / "only hole", "wb") as f:
        f.truncate(1 << 30)
    (t / "attrs").write_text("x")
    os.chown(t / "attrs", 12, 34)
    os.setxattr(t / "attrs", "user.a=%b", b"\0\n=\xff" * 500)
    os.setxattr(t / "attrs", "trusted.t", b"t")
    os.setxattr(t / "attrs", "security.capability", bytes.fromhex("0100000202000000000000000000000000000000"))
    os.setxattr(t / "sub", "user.on_directory", b"d")
    os.symlink("nowhere", t / "sub" / "link")
    os.setxattr(t / "sub" / "link", "trusted.on_link", b"l", follow_symlinks=False)
    os.link(t / "attrs", t / "sub" / "hard")
    os.utime(t / "attrs", ns=(1, 1234567890_123456789))
    data = box("tar-out", path=str(t), exact=True)
    assert len(data) < 1 << 20
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.getmember("./holes")
        assert member.size == 5 << 20 and member.issparse()
        content = tar.extractfile(member)
        assert content is not None and content.read() == (t / "holes").read_bytes()
    box("tar-in", data, path=f"{d}/u", preserve=True)
    back, wanted = attributes(f"{d}/u"), attributes(str(t))
    assert back == wanted, [name for name in wanted if back.get(name) != wanted[name]]
    assert (Path(f"{d}/u/holes")).read_bytes() == (t / "holes").read_bytes()
    # Without being asked it is as before: whole files, no attributes.
    with tarfile.open(fileobj=io.BytesIO(box("tar-out", path=str(t / "sub")))) as tar:
        assert not any(m.pax_headers for m in tar)


def sparse(content: bytes, **pax: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        m = tarfile.TarInfo("GNUSparseFile.0/f")
        m.size = len(content)
        m.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "f", **pax}
        tar.addfile(m, io.BytesIO(content))
    return out.getvalue()


@host_test
def refuses_damaged_maps(a: Agent) -> None:
    box, d = Box(a.connect()), a.directory
    size = {"GNU.sparse.realsize": "10000"}

    def block(text: str, more: bytes = b"") -> bytes:
        return text.encode().ljust(512, b"\0") + more

    for i, data in enumerate(
        (
            sparse(block("1\n0\n4\n", b"abcd")),
            sparse(block("x\n"), **size),
            sparse(block("1\n9999\n4\n", b"abcd"), **size),
            sparse(block("2\n100\n4\n50\n4\n", b"abcdabcd"), **size),
            sparse(block("1\n0\n5000\n", b"abcd"), **size),
            sparse(block("99999999999\n"), **size),
            sparse(block("1\n18446744073709551615\n4\n", b"abcd"), **size),
            sparse(b"1\n0\n", **size),
            sparse(block("0\n"), **{**size, "GNU.sparse.major": "7"}),
            sparse(block("0\n"), **{**size, "GNU.sparse.map": "0,1"}),
        )
    ):
        fails("bad_archive", box, "tar-in", data, path=f"{d}/bad{i}")
    box("tar-in", sparse(block("1\n100\n4\n", b"abcd"), **size), path=f"{d}/good")
    assert Path(f"{d}/good/f").read_bytes() == bytes(100) + b"abcd" + bytes(9896)


def archive(*members: tuple[str, str, str | bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind, name, what in members:
            m = tarfile.TarInfo(name)
            m.type = kind.encode()
            if isinstance(what, bytes):
                m.size = len(what)
                tar.addfile(m, io.BytesIO(what))
            else:
                m.linkname = what
                tar.addfile(m)
    return out.getvalue()


@host_test
def stays_inside_the_target(a: Agent) -> None:
    box, d = Box(a.connect()), a.directory
    os.mkdir(f"{d}/outside")
    Path(f"{d}/outside/secret").write_text("secret")
    bad = [
        archive(("0", "../evil", b"x")),
        archive(("0", "/evil", b"x")),
        archive(("0", "a/../../evil", b"x")),
        archive(("2", "l", "../outside"), ("0", "l/evil", b"x")),
        archive(("2", "l", f"{d}/outside"), ("0", "l/evil", b"x")),
        archive(("2", "l", f"{d}/outside"), ("5", "l/evil", "")),
        archive(("2", "a", "."), ("2", "a/l", "../../outside"), ("0", "a/l/evil", b"x")),
        archive(("2", "l", f"{d}/outside"), ("1", "got", "l/secret")),
        archive(("1", "got", "../outside/secret")),
        archive(("3", "device", "")),
        archive(("S", "sparse", "")),
        archive(("0", "x", b"y" * 600))[:512] + bytes(600),
    ]
    for i, data in enumerate(bad):
        fails("bad_archive", box, "tar-in", data if i < 11 else b"\1" * 1024, path=f"{d}/in{i}")
        assert sorted(os.listdir(f"{d}/outside")) == ["secret"] and not os.path.exists(f"{d}/evil"), i
        assert not os.path.exists(f"{d}/in{i}/got") and not os.path.exists(f"{d}/in{i}/device")
    # A link is not written through: the entry replaces it.
    os.mkdir(f"{d}/t")
    os.symlink(f"{d}/outside/secret", f"{d}/t/f")
    box("tar-in", archive(("0", "f", b"new")), path=f"{d}/t")
    assert Path(f"{d}/outside/secret").read_text() == "secret" and Path(f"{d}/t/f").read_text() == "new"
    # Links that stay inside are fine.
    box("tar-in", archive(("5", "usr/lib", ""), ("2", "lib", "usr/lib"), ("0", "lib/x", b"1")), path=f"{d}/merged")
    assert Path(f"{d}/merged/usr/lib/x").read_text() == "1"
    fails("short_input", box, "tar-in", archive(("0", "x", b"y" * 5000))[:2000], path=f"{d}/cut")
    fails("short_input", box, "tar-in", b"", path=f"{d}/cut")


@host_test
def watches(a: Agent) -> None:
    h = a.connect()
    box, d = Box(h), a.directory
    os.makedirs(f"{d}/t/sub")
    id = box.start("watch", path=f"{d}/t", recursive=True)
    stream = h.stream(4 * id + 1)

    def events() -> list[tuple]:
        return [
            (e["e"], e.get("path", b"").decode()[len(d) + 3 :], e.get("old_path", b"").decode()[len(d) + 3 :])
            for e in records(stream.data)
        ]

    def wait_for(*wanted: tuple) -> None:
        h.until(lambda: all(w in events() for w in wanted), 10)

    wait_for(("ready", "", ""))
    Path(f"{d}/t/sub/f").write_text("x")
    wait_for(("created", "sub/f", ""), ("modified", "sub/f", ""))
    os.rename(f"{d}/t/sub/f", f"{d}/t/g")
    wait_for(("moved", "g", "sub/f"))
    os.makedirs(f"{d}/t/new/deep")
    Path(f"{d}/t/new/deep/early").write_text("x")
    wait_for(("created", "new", ""), ("created", "new/deep", ""), ("created", "new/deep/early", ""))
    os.rename(f"{d}/t/new", f"{d}/t/renamed")
    wait_for(("moved", "renamed", "new"))
    Path(f"{d}/t/renamed/deep/late").write_text("x")
    wait_for(("created", "renamed/deep/late", ""))
    os.rename(f"{d}/t/g", f"{d}/away")
    wait_for(("removed", "g", ""))
    os.rename(f"{d}/away", f"{d}/t/back")
    wait_for(("created", "back", ""))
    os.chmod(f"{d}/t/back", 0o600)
    wait_for(("attributes", "back", ""))
    os.unlink(f"{d}/t/back")
    wait_for(("removed", "back", ""))
    subprocess.run(["rm", "-r", f"{d}/t"], check=True)
    wait_for(("ended", "", ""))
    assert h.exit_of(id)["code"] == 0
    fails("file_not_found", box, "watch", path=f"{d}/t")
    Path(f"{d}/file").write_text("x")
    id = box.start("watch", path=f"{d}/file")
    stream = h.stream(4 * id + 1)
    h.until(lambda: records(stream.data))
    with open(f"{d}/file", "a") as f:
        f.write("more")
    h.until(lambda: any(e["e"] == "modified" for e in records(stream.data)))
    for i in range(20):
        os.makedirs(f"{d}/many/{i}")
    id = box.start("watch", path=f"{d}/many", recursive=True, limit=10)
    h.until(lambda: {"e": "overflow"} in records(h.stream(4 * id + 1).data))


class Sftp:
    """One `sftp` applet, spoken to in packets of version 3."""

    def __init__(self, box: Box, cwd: str) -> None:
        self.host, self.number = box.host, 0
        self.process = box.start("sftp", stdin=True, cwd=cwd)
        self.at = self.sent = 0

    def send(self, packet: bytes) -> None:
        self.host.feed(4 * self.process, packet, start=self.sent, end=False)
        self.sent += len(packet)

    def receive(self) -> bytes:
        data = self.host.stream(4 * self.process + 1).data
        self.host.until(lambda: len(data) >= self.at + 4 and len(data) >= self.at + 4 + int.from_bytes(data[self.at : self.at + 4]))
        size = int.from_bytes(data[self.at : self.at + 4])
        packet = bytes(data[self.at + 4 : self.at + 4 + size])
        self.at += 4 + size
        return packet

    def ask(self, kind: int, *words: bytes | str | int | tuple[int]) -> tuple[int, bytes]:
        """Texts have their length in front, integers are 32 bits, those in a tuple 64. The answer's type, and it without its id."""
        self.number += 1
        body = bytes([kind]) + self.number.to_bytes(4)
        for word in words:
            if isinstance(word, tuple):
                body += word[0].to_bytes(8)
            elif isinstance(word, int):
                body += word.to_bytes(4)
            else:
                raw = word if isinstance(word, bytes) else word.encode()
                body += len(raw).to_bytes(4) + raw
        self.send(len(body).to_bytes(4) + body)
        answer = self.receive()
        assert answer[1:5] == self.number.to_bytes(4)
        return answer[0], answer[5:]

    def status(self, kind: int, *words: bytes | str | int | tuple[int]) -> int:
        found, rest = self.ask(kind, *words)
        assert found == 101, found
        return int.from_bytes(rest[:4])

    def handle(self, kind: int, *words: bytes | str | int) -> bytes:
        found, rest = self.ask(kind, *words)
        assert found == 102, (found, rest)
        return rest[4:]


@host_test
def speaks_sftp(a: Agent) -> None:
    box, d = Box(a.connect()), f"{a.directory}/sftp"
    os.mkdir(d)
    s = Sftp(box, d)
    s.send(bytes.fromhex("00000005 01 00000003"))
    assert s.receive()[:5] == bytes.fromhex("02 00000003")
    # Written at offsets, in any order; read behind the end.
    h = s.handle(3, "new", 2 | 1 | 8, 4, 0o640)
    assert s.status(6, h, (5,), "world") == 0 and s.status(6, h, (0,), "hello") == 0
    assert s.ask(5, h, (3,), 4) == (103, b"\0\0\0\4lowo") and s.status(5, h, (10,), 4) == 1
    assert s.status(10, h, 1 | 4 | 8, (7,), 0o4711, 1000, 2000) == 0 and s.status(4, h) == 0 and s.status(4, h) == 5
    st = os.stat(f"{d}/new")
    assert (
        Path(f"{d}/new").read_bytes() == b"hellowo" and st.st_mode & 0o7777 == 0o4711 and (st.st_atime, st.st_mtime) == (1000, 2000)
    )
    big = os.urandom(250 << 10)
    h = s.handle(3, "big", 2 | 8, 0)
    assert s.status(6, h, (0,), big) == 0 and s.status(4, h) == 0 and Path(f"{d}/big").read_bytes() == big
    h = s.handle(3, "big", 4 | 2, 0)
    assert s.status(6, h, (0,), "appended") == 0 and Path(f"{d}/big").read_bytes() == big + b"appended"
    # Names.
    assert s.status(3, "new", 2 | 8 | 32, 0) == 4 and s.status(3, "none", 1, 0) == 2
    assert s.status(18, "new", "big") == 4 and s.status(18, "new", "moved") == 0
    assert s.status(200, "posix-rename@openssh.com", "moved", "big") == 0 and os.path.getsize(f"{d}/big") == 7
    assert s.status(20, "big", "link") == 0 and os.readlink(f"{d}/link") == "big"
    assert s.ask(19, "link")[1].count(b"big") == 2
    assert s.ask(16, "missing")[1].count(f"{d}/missing".encode()) == 2 and s.ask(16, "./x/..")[0] == 104
    assert s.ask(16, "link")[1].count(f"{d}/big".encode()) == 2
    assert s.ask(200, "expand-path@openssh.com", "~/x")[1].count(f"{pwd.getpwuid(os.geteuid()).pw_dir}/x".encode()) == 2
    assert s.status(200, "expand-path@openssh.com", "~nosuchuser/x") == 2
    assert s.ask(17, "link")[1][4:12] == (7).to_bytes(8) and s.ask(7, "link")[1][4:12] == (3).to_bytes(8)
    assert s.status(200, "hardlink@openssh.com", "big", "hard") == 0 and os.stat(f"{d}/hard").st_nlink == 2
    # Directories, more of them than one answer takes.
    assert (
        s.status(14, "sub", 4, 0o700) == 0 and s.status(15, "sub") == 0 and s.status(15, "sub") == 2 and s.status(13, "none") == 2
    )
    for i in range(150):
        Path(f"{d}/file{i}").touch()
    h, count = s.handle(11, "."), 0
    while (found := s.ask(12, h))[0] == 104:
        count += int.from_bytes(found[1][:4])
        assert b"-rw-r--r--" in found[1]
    assert count == 150 + 2 + 3 and s.status(12, h) == 1 and s.status(4, h) == 0
    assert s.ask(200, "statvfs@openssh.com", ".")[0] == 201 and s.ask(200, "limits@openssh.com")[0] == 201
    # What is damaged is answered; what cannot be a packet is the end.
    assert s.status(200, "nothing@example.org") == 8 and s.status(99) == 8
    assert (
        s.status(4, b"\xff\xff") == 5
        and s.status(6, b"\x01", (0,)) == 5
        and s.status(17, "a\0b") == 5
        and s.status(17, "x" * 5000) == 5
    )
    many = [s.ask(3, "big", 1, 0)[0] for _ in range(260)]
    assert many.count(101) > 0 and many[0] == 102 and many[-1] == 101
    s.send(b"\xff\xff\xff\xff")
    assert s.host.exit_of(s.process)["code"] == 1
    s = Sftp(box, d)
    s.host.feed(4 * s.process, b"")
    assert s.host.exit_of(s.process)["code"] == 0
