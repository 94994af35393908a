"""The words of the command line that speak with the daemon, against the real server on an engine in memory."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from server_running import Running, running
from stoker.cli.commands import COMMANDS, invoke
from stoker.cli.cp import Place, parse_place
from stoker.cli.logs import tame
from stoker.cli.table import Column, render_plain, render_table

pytestmark = pytest.mark.anyio
STOKER = Path(sys.executable).with_name("stoker")


@dataclass
class Done:
    code: int
    out: str
    err: str


Words = Callable[..., "asyncio.Future[Done]"]


@pytest.fixture
async def server(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    async with running(short_dir) as server:
        monkeypatch.setenv("STOKER_URL", f"unix:{server.settings.socket}")
        yield server


@pytest.fixture
def stoker(server: Running, capsys: pytest.CaptureFixture[str]) -> Callable[..., object]:
    async def words(*words: str) -> Done:
        code = await asyncio.to_thread(invoke, words)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return words


async def program(*words: str, input: bytes | None = None) -> Done:
    """The installed command, in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        STOKER,
        *words,
        stdin=asyncio.subprocess.DEVNULL if input is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(input), 60)
    assert process.returncode is not None
    return Done(process.returncode, out.decode(), err.decode())


async def test_the_life_of_a_sandbox(stoker: Words) -> None:
    done = await stoker("create", "debian:12", "--name", "web", "-l", "team=a", "--timeout", "30m", "-m", "1G")
    assert (done.code, done.out) == (0, "web\n")
    assert (await stoker("create", "debian:12", "--name", "web")).code == 125
    other = json.loads((await stoker("create", "debian:12", "--json")).out)
    assert other["state"] == "running" and other["name"] is None
    line = (await stoker("ls", "-l", "team")).out
    assert line.split("\t")[0] == "web" and line.split("\t")[2:6] == ["running", "debian:12", "1", "1G"]
    assert (await stoker("ls", "-l", "team=b")).out == ""
    listed = json.loads((await stoker("ls", "--json")).out)
    assert {row["name"] for row in listed} == {"web", None}
    assert (await stoker("ls", "-q", "--limit", "1")).out.strip() == other["id"]
    assert json.loads((await stoker("inspect", "web", other["id"])).out)[0]["name"] == "web"
    assert (await stoker("resize", "web", "--disk", "20G")).code == 0
    assert (await stoker("pool", "create", "--size", "50G")).out == "main\n"
    assert (await stoker("pool", "create", "--size", "50G")).code == 125
    assert [row["name"] for row in json.loads((await stoker("pool", "ls", "--json")).out)] == ["", "main"]
    assert json.loads((await stoker("pool", "inspect")).out)["total"] == 50 << 30
    assert (await stoker("pool", "rm", "main", "directory")).code == 125
    assert (await stoker("freeze", "web")).code == 0
    assert (await stoker("ls", "--state", "frozen", "-q")).out.startswith("sb-")
    assert (await stoker("thaw", "web")).code == 0
    assert (await stoker("timeout", "web", "2h", "--idle")).code == 0
    assert (await stoker("timeout", "web", "none")).code == 0
    assert json.loads((await stoker("inspect", "web")).out)[0]["timeout"] is None
    done = await stoker("rm", "web", "nobody")
    assert done.code == 125 and "nobody" in done.err and done.out == "web\n"
    assert (await stoker("rm", "-f", "nobody")).code == 0
    assert (await stoker("rm", "--all")).out.strip() == other["id"]
    assert (await stoker("ls", "--json")).out == "[]\n"
    assert (await stoker("rm")).code == 125


async def test_processes(server: Running, stoker: Words) -> None:
    await server.sandbox(name="web")
    number = (await stoker("exec", "-d", "--tag", "bg", "web", "--", "sh", "-c", "echo begun; exec sleep 600")).out.strip()
    assert number.isdigit()
    row = (await stoker("ps", "web")).out.rstrip("\n").split("\t")
    assert row[0] == number and row[2:4] == ["running", "bg"] and row[-1] == "sh -c 'echo begun; exec sleep 600'"
    async with asyncio.timeout(20):  # it may not have come to say it yet
        while (await program("logs", "web", "--process", "bg")).out != "begun\n":
            await asyncio.sleep(0.02)
    assert (await stoker("kill", "-s", "TERM", "web", "bg")).code == 0
    assert (await stoker("wait", "web", "--process", "bg", "--timeout", "10s")).code == 143
    assert (await stoker("ps", "web")).out == ""
    assert json.loads((await stoker("ps", "-a", "--json", "web")).out)[0]["signal"] == 15
    done = await program("logs", "web", "--process", "bg")
    assert (done.code, done.out) == (0, "begun\n")


async def test_exec(server: Running) -> None:
    await server.sandbox(name="web")
    done = await program("exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.code, done.out, done.err) == (7, "out\n", "err\n")
    done = await program("exec", "-e", "A=1", "web", "sh", "-c", "echo $A; kill -9 $$")
    assert (done.code, done.out) == (137, "1\n")
    done = await program("exec", "web", "sha256sum", input=b"x" * 5_000_000)
    assert done.out.split()[0] == hashlib.sha256(b"x" * 5_000_000).hexdigest()
    done = await program("exec", "web", "no-such-program")
    assert done.code == 127 and "no-such-program" in done.err
    done = await program("exec", "--timeout", "300ms", "web", "sleep", "60")
    assert done.code == 124
    done = await program("exec", "nobody", "true")
    assert done.code == 125 and "nobody" in done.err


async def test_a_signal_to_exec_reaches_its_command(server: Running) -> None:
    await server.sandbox(name="web")
    process = await asyncio.create_subprocess_exec(
        STOKER, "exec", "web", "sh", "-c", "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.05; done",
        stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 30) == b"ready\n"
    process.send_signal(2)
    assert await asyncio.wait_for(process.stdout.read(), 30) == b"caught\n"
    assert await process.wait() == 9


async def test_attach_shows_what_was_and_what_comes(server: Running, stoker: Words) -> None:
    await server.sandbox(name="web")
    await stoker("exec", "-d", "--tag", "job", "web", "--", "sh", "-c", "echo before; sleep 1; echo after; exit 3")
    done = await program("attach", "web", "job")
    assert (done.code, done.out) == (3, "before\nafter\n")


async def test_cp_of_files(server: Running, stoker: Words, tmp_path: Path) -> None:
    await server.sandbox(name="web")
    source = tmp_path / "a.txt"
    source.write_bytes(os.urandom(700_000))
    assert (await stoker("cp", str(source), "web:/srv/b.txt")).code == 0
    assert (await stoker("cp", str(source), "web:/srv")).code == 0
    assert (await stoker("cp", "web:/srv/a.txt", str(tmp_path / "back"))).code == 0
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    (tmp_path / "into").mkdir()
    assert (await stoker("cp", "web:/srv/a.txt", "web:/srv/b.txt", str(tmp_path / "into"))).code == 0
    assert sorted(p.name for p in (tmp_path / "into").iterdir()) == ["a.txt", "b.txt"]
    done = await stoker("cp", "web:/srv/none", str(tmp_path))
    assert done.code == 125 and "file_not_found" in done.err
    assert "file_missing" in (await stoker("cp", str(tmp_path / "none"), "web:/")).err
    assert "no_sandbox" in (await stoker("cp", str(source), str(tmp_path / "x"))).err
    assert "not_directory" in (await stoker("cp", "web:/srv/a.txt", "web:/srv/b.txt", str(source))).err
    await server.sandbox(name="other")
    assert (await stoker("cp", "web:/srv/a.txt", "other:/there")).code == 0
    await stoker("cp", __file__, "web:/text")
    assert (await program("cp", "web:/text", "-")).out == Path(__file__).read_text()


async def test_run_on_a_lease(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    done = await program("run", "debian:12", "--", "sh", "-c", "cat; exit 3", input=b"in\n")
    assert (done.code, done.out) == (3, "in\n")
    done = await program("run", "debian:12", "--", "no-such-program")
    assert done.code == 127
    secret = await server.key()
    monkeypatch.setenv("STOKER_URL", f"http://{server.settings.listen}")
    monkeypatch.setenv("STOKER_API_KEY", secret)
    done = await program("run", "debian:12", "--", "echo", "over tcp")
    assert (done.code, done.out) == (0, "over tcp\n")
    monkeypatch.setenv("STOKER_API_KEY", "wrong")
    done = await program("run", "debian:12", "--", "true")
    assert done.code == 125 and "unauthenticated" in done.err.lower() or "key" in done.err
    for _ in range(100):
        if not server.engine.boxes:
            return
        await asyncio.sleep(0.05)
    pytest.fail("a run left its sandbox")


async def test_keys_events_top_logs_and_the_daemon(server: Running, stoker: Words) -> None:
    await server.sandbox(name="web")
    secret = (await stoker("key", "create", "ci")).out.strip()
    listed = json.loads((await stoker("key", "ls", "--json")).out)
    assert listed[0]["name"] == "ci" and secret not in str(listed)
    assert (await stoker("key", "revoke", listed[0]["id"])).code == 0
    assert "revoked" in (await stoker("key", "ls")).out
    event = json.loads((await stoker("events", "--after", "0", "-n", "1", "--json")).out)
    assert event["kind"]
    assert (await stoker("top")).out.split("\t")[0] == "web"
    assert json.loads((await stoker("top", "--json", "web")).out)[0]["name"] == "web"
    assert (await stoker("logs", "web")).code == 0
    status = json.loads((await stoker("daemon", "status", "--json")).out)
    assert status["running"] and status["pid"] == os.getpid()


async def test_without_a_daemon(stoker: Words, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STOKER_URL", f"unix:{tmp_path}/nothing")
    done = await stoker("ls")
    assert done.code == 125 and done.err.startswith("stoker: cannot connect to unix:") and len(done.err.splitlines()) == 2
    assert (await stoker("daemon", "status")).code == 3
    assert json.loads((await stoker("daemon", "status", "--json")).out) == {
        "running": False,
        "endpoint": f"unix:{tmp_path}/nothing",
    }


async def test_completion_of_names(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    await server.sandbox(name="web-1")
    await server.sandbox(name="db-1")
    monkeypatch.setenv("_STOKER_COMPLETE", "bash_complete")

    async def completed(line: str, index: int) -> set[str]:
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(index))
        return {word.partition(",")[2] for word in (await program()).out.splitlines() if word}

    assert await completed("stoker rm w", 2) == {"web-1"}
    assert {"web-1:", "w"} == await completed("stoker cp w", 2)
    assert {"create", "cp", "completion"} == await completed("stoker c", 1)
    monkeypatch.setenv("STOKER_URL", "unix:/nonexistent/s")
    assert await completed("stoker exec ", 2) == set()


@pytest.mark.parametrize(("word", "code"), [("image", "image_in_use"), ("kernel", "")])
async def test_images_and_kernels(server: Running, stoker: Words, word: str, code: str) -> None:
    digest = "ab" * 32
    [row] = (await stoker(word, "ls")).out.splitlines()
    assert row.startswith(f"{digest[:12]}\tdebian:bookworm\t")
    assert json.loads((await stoker(word, "ls", "--json")).out)[0]["digest"] == digest
    assert json.loads((await stoker(word, "inspect", "debian:12")).out)[0]["digest"] == digest
    done = await stoker(word, "inspect", "nothing", digest[:8])
    assert done.code == 125 and f"{word}_unknown" in done.err and digest in done.out
    done = await stoker(word, "rm", "debian:12")
    assert (done.code == 0) == (not code) and code in done.err
    assert server.engine.images.removed == ([] if code else [("kernels", "debian:12")])


async def test_fsck(stoker: Words) -> None:
    done = await stoker("fsck")
    assert done.code == 1 and "clone /pool/x.qcow2\n  expected nothing\n  found    it is there\n" in done.out
    assert "1 differences, 1 left" in done.out and "being done to it: web" in done.out
    done = await stoker("fsck", "--repair")
    assert done.code == 0 and "mended: remove it" in done.out
    assert json.loads((await stoker("fsck", "--json")).out)["differences"][0]["repaired"] is False


async def test_gc(stoker: Words) -> None:
    done = await stoker("gc")
    assert (done.code, done.out) == (0, f"image\t{'ab' * 20}\t4K\tsuperseded\n")
    assert done.err == "left alone: kernels: not ours\nfreed 4K (image 4K)\n"
    done = await stoker("gc", "--dry-run", "--json")
    assert json.loads(done.out)["dry_run"] is True


async def test_completion_scripts(stoker: Words) -> None:
    for shell in ("bash", "zsh", "fish"):
        done = await stoker("completion", shell)
        assert done.code == 0 and "_STOKER_COMPLETE" in done.out


@pytest.mark.parametrize("word", COMMANDS)
async def test_every_word_has_help(stoker: Words, word: str) -> None:
    done = await stoker(word, "--help")
    assert done.code == 0 and done.out.startswith("Usage: stoker " + word)


def test_tables_fit_the_terminal() -> None:
    columns: list[Column[tuple[str, str]]] = [
        Column("NAME", lambda r: r[0]), Column("ID", lambda r: r[0], full=True), Column("WORDS", lambda r: r[1])
    ]  # fmt: skip
    rows = [("abc", "x" * 100), ("defghi", "a\tb\x1b[31m\n")]
    lines = render_table(columns, rows, 40).splitlines()
    assert lines[0].startswith("NAME    ID      WORDS") and max(map(len, lines)) == 40
    assert "\x1b" not in lines[2] and lines[1].endswith("…")
    assert render_plain(columns, rows).splitlines()[1] == "defghi\tdefghi\ta b\N{REPLACEMENT CHARACTER}[31m "
    assert "\x1b[32mrunning" in render_table([Column("S", lambda r: r)], ["running"], 80, colour=True)


def test_places() -> None:
    assert parse_place("web:/srv") == Place("/srv", "web") and parse_place("web:") == Place(".", "web")
    assert parse_place("./a:b") == Place("./a:b") and parse_place("/x") == Place("/x")
    assert Place("/a/b/.", "web").contents and not Place("/a/b", "web").contents
    assert Place("/a/b/", "web").name == "b" and Place("dir/").name == "dir"


def test_a_console_cannot_take_over_the_terminal() -> None:
    assert tame("a\x1b[31mred\x1b[0m\r\nb") == "a\x1b[31mred\x1b[0m\nb"
    assert tame("\x1b]0;title\x07\x1b[2J\x1b[6n\x1bcx\x00") == "x"


async def test_templates(server: Running, stoker: Words) -> None:
    build = (
        "template",
        "build",
        "py",
        "debian:12",
        "--setup",
        "one",
        "-s",
        "two",
        "--start",
        "serve",
        "--ready",
        "test",
        "-e",
        "A=b",
    )
    made = await stoker(*build)
    assert (made.out, made.err.splitlines()) == ("py\n", ["==> one", "==> two"])
    quiet = await stoker(*build, "-q", "--json", "--memory", "1G")
    assert quiet.err == "" and json.loads(quiet.out)["resources"]["memory"] == 1 << 30
    [listed] = json.loads((await stoker("template", "ls", "--json")).out)
    assert (listed["name"], listed["setup"], listed["start"], listed["env"]) == ("py", ["one", "two"], "serve", {"A": "b"})
    assert listed["log"] == [] and (await stoker("template", "ls", "-q")).out == "py\n"
    assert "py" in (await stoker("template", "ls")).out
    assert json.loads((await stoker("template", "inspect", "py")).out)[0]["log"] == ["==> one", "==> two"]
    await server.sandbox(name="box")
    assert (await stoker("template", "create", "again", "box")).out == "again\n"
    assert (await stoker("create", "-q", "py", "--name", "of")).out == "of\n"
    failed = await stoker("template", "build", "bad", "debian:12", "--setup", "false")
    assert failed.code == 125 and "template_step_failed" in failed.err and "last words" in failed.err and "==> false" in failed.err
    assert (await stoker("template", "build", "py")).code == 125
    assert (await stoker("template", "rm", "py", "nosuch")).code == 125
    assert (await stoker("template", "rm", "--force", "py", "nosuch", "again")).out == "again\n"
    assert (await stoker("template", "ls", "-q")).out == ""


async def test_pause_fork_and_snapshots(server: Running, stoker: Words) -> None:
    await server.sandbox(name="box")
    assert (await stoker("pause", "box")).out == "box\n"
    assert (await stoker("resume", "box")).out == "box\n"
    assert (await stoker("fork", "-n", "2", "--name", "copy", "box")).out == "copy-1\ncopy-2\n"
    assert (await stoker("snapshot", "create", "box", "--name", "one", "--tag", "good")).out == "one\n"
    unnamed = (await stoker("snapshot", "create", "--disk-only", "box")).out.strip()
    assert unnamed.startswith("sn-")
    listed = json.loads((await stoker("snapshot", "ls", "--json")).out)
    assert [(one["name"], one["memory"]) for one in listed] == [(None, False), ("one", True)]
    tree = (await stoker("snapshot", "tree")).out.splitlines()
    assert tree[0].startswith("one  own ") and tree[1].startswith(f"└ {unnamed}  own ")
    assert json.loads((await stoker("snapshot", "inspect", "one")).out)[0]["tags"] == ["good"]
    assert (await stoker("create", "-q", "--from", "one", "--name", "again")).out == "again\n"
    for words in (("create",), ("create", "debian:12", "--from", "one"), ("create", "--from", "one", "--memory", "1G")):
        assert (await stoker(*words)).code == 125
    assert (await stoker("create", "-q", "--from", "nosuch")).code == 125
    assert (await stoker("snapshot", "prune")).out == f"{unnamed}\n"
    assert (await stoker("snapshot", "rm", "one")).out == "one\n"
    assert (await stoker("snapshot", "rm", "one")).code != 0
    assert (await stoker("snapshot", "rm", "--force", "one")).code == 0


async def test_networks(server: Running, stoker: Words) -> None:
    await server.sandbox(name="web")
    done = await stoker("network", "explain", "web", "example.org:443")
    assert (done.code, done.out) == (0, "ok   policy: it says\n     stoker network set x --egress all\n")
    done = await stoker("network", "explain", "web", "closed:443", "--udp", "--json")
    found = json.loads(done.out)
    assert (done.code, found["fault"], found["protocol"], found["steps"][0]["verdict"]) == (1, "policy", "udp", "fail")
    shown = (await stoker("network", "show", "web")).out
    assert "address:   100.80.0.1\n" in shown and "denied:    0 packets\n" in shown and "10.0.0.1:22/tcp" in shown
    assert json.loads((await stoker("network", "show", "web", "--json")).out)["publish"] == ["80:80"]
    assert (await stoker("network", "denials", "web")).out.split()[1:] == ["3x", "10.0.0.1:22/tcp"]
    assert (await stoker("network", "learned", "web")).out == "allow: a.net:443/tcp\n"
    done = await stoker("network", "set", "web", "--egress", "none", "--learn", "--json")
    assert (done.code, json.loads(done.out)["egress"]) == (0, "none")
    assert (await stoker("network", "explain", "nobody", "a:1")).code == 125
