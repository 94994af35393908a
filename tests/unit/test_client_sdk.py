"""The SDK, async and sync, against the real server on an engine in memory (its processes are programs of this host)."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
import sys
import tarfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from server_running import Running, running
from stoker import (
    AsyncClient,
    AsyncSandbox,
    Client,
    CommandFailed,
    CommandNotFound,
    CommandTimeout,
    Conflict,
    DeadlineExceeded,
    HostError,
    InvalidRequest,
    NotFound,
    Sandbox,
    StokerError,
    Unauthenticated,
)
from stoker.client import archive

pytestmark = pytest.mark.anyio


@pytest.fixture
async def server(short_dir: Path) -> AsyncIterator[Running]:
    async with running(short_dir) as server:
        yield server


@pytest.fixture
async def client(server: Running) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(settings=server.settings, start=False) as client:
        yield client


@pytest.fixture
async def box(client: AsyncClient) -> AsyncSandbox:
    return await AsyncSandbox.create("debian:12", name="web", labels={"team": "a"}, client=client)


async def test_create_find_list_kill(client: AsyncClient) -> None:
    steps: list[str] = []
    box = await AsyncSandbox.create(
        "debian:12",
        name="web",
        memory="1G",
        labels={"a": "1"},
        timeout="30m",
        client=client,
        on_progress=lambda p: steps.append(p.step),
    )
    assert box.info.resources.memory == 1 << 30 and box.info.timeout is not None and box.info.timeout.seconds == 1800
    assert steps
    assert (await AsyncSandbox.connect("web", client=client)).id == box.id
    assert [b.id for b in await AsyncSandbox.list(labels={"a": "1"}, client=client)] == [box.id]
    assert await AsyncSandbox.list(labels={"a": "2"}, client=client) == []
    assert await AsyncSandbox.list(labels={"a": None}, states=("stopped",), client=client) == []
    with pytest.raises(Conflict):
        await AsyncSandbox.create("debian:12", name="web", client=client)
    assert (await box.set_timeout(idle_timeout=5)).timeout is not None
    assert await box.ping() >= 0
    assert await box.kill() and not await box.kill()
    with pytest.raises(NotFound):
        await AsyncSandbox.connect("web", client=client)


async def test_a_block_destroys_its_sandbox_even_when_it_fails(client: AsyncClient) -> None:
    with pytest.raises(ZeroDivisionError):
        async with await AsyncSandbox.create("debian:12", name="brief", client=client):
            raise ZeroDivisionError
    assert await AsyncSandbox.list(client=client) == []


async def test_a_list_longer_than_a_page(server: Running, client: AsyncClient) -> None:
    await asyncio.gather(*(server.sandbox() for _ in range(12)))
    assert len(await client.sandboxes(limit=7)) == 7
    assert len({info.id for info in await client.sandboxes()}) == 12


async def test_bad_words_are_refused_before_they_are_sent(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequest, match="two"):
        await AsyncSandbox.create("debian:12", timeout=1, idle_timeout=1, client=client)
    with pytest.raises(InvalidRequest):
        await AsyncSandbox.create("debian:12", network="lan", client=client)
    with pytest.raises(InvalidRequest):
        await AsyncSandbox.create("debian:12", memory="lots", client=client)


async def test_run(box: AsyncSandbox) -> None:
    done = await box.commands.run("echo out; echo err >&2; exit 3", env={"A": "b"})
    assert (done.stdout, done.stderr, done.exit_code, done.ok) == ("out\n", "err\n", 3, False)
    with pytest.raises(CommandFailed, match="err") as caught:
        done.check()
    assert caught.value.result is done
    with pytest.raises(CommandFailed):
        await box.commands.run("exit 1", check=True)
    assert (await box.commands.run(["printf", "%s", "a b"])).stdout == "a b"
    assert (await box.commands.run("cat", input="grüße")).stdout == "grüße"
    assert (await box.commands.run(["printf", "\\377"])).stdout_bytes == b"\xff"
    assert (await box.commands.run("kill -9 $$")).exit_code == 137
    with pytest.raises(CommandNotFound):
        await box.commands.run(["no-such-program"])


async def test_run_out_of_time(box: AsyncSandbox) -> None:
    for extra in ({}, {"on_stdout": lambda text: None}):
        with pytest.raises(CommandTimeout) as caught:
            await box.commands.run("echo begun; sleep 30", timeout=0.3, **extra)
        assert caught.value.result.stdout == "begun\n" and caught.value.result.timed_out


async def test_callbacks_get_whole_characters_and_may_be_async(box: AsyncSandbox) -> None:
    seen: list[str] = []

    async def slowly(text: str) -> None:
        await asyncio.sleep(0)
        seen.append(text)

    done = await box.commands.run(
        "printf 'gr\\303'; sleep 0.1; printf '\\274n'; echo e >&2", on_stdout=slowly, on_stderr=seen.append
    )
    assert "".join(s for s in seen if s != "e\n") == "grün" and "e\n" in seen and done.stdout == "grün"


async def test_large_input_streams_through(box: AsyncSandbox) -> None:
    data = os.urandom(1 << 20) * 20
    done = await box.commands.run("sha256sum", input=io.BytesIO(data))
    assert done.stdout.split()[0] == hashlib.sha256(data).hexdigest()
    done = await box.commands.run("head -c 10", input=(data[:1000] for _ in range(20_000)))
    assert done.stdout_bytes == data[:10]


async def runs(box: AsyncSandbox, wanted: bool) -> None:
    for _ in range(200):
        if any(p.running for p in await box.commands.list(tag="long")) == wanted:
            return
        await asyncio.sleep(0.03)
    pytest.fail(f"running is not {wanted}")


async def test_cancelling_a_run_ends_its_command(server: Running, box: AsyncSandbox) -> None:
    for extra in ({}, {"on_stdout": lambda text: None}):
        task = asyncio.create_task(box.commands.run("sleep 600", tag="long", **extra))
        await runs(box, True)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await runs(box, False)


async def test_background_processes(box: AsyncSandbox) -> None:
    process = await box.commands.start("read a; echo got $a; sleep 0.1; echo end >&2", stdin=True, tag="bg")
    assert process.info.running and (await box.commands.connect("bg")).id == process.id
    with pytest.raises(DeadlineExceeded) as caught:
        await process.wait(timeout=0.1)
    assert caught.value.code == "wait_timeout"
    await process.send_stdin("word\n")
    done = await process.wait()
    assert (done.stdout, done.stderr, done.exit_code) == ("got word\n", "end\n", 0)
    assert await process.wait() == done
    assert not await process.kill()
    again = await (await box.commands.connect(process.id)).wait()
    assert again.stdout == "got word\n"
    with pytest.raises(NotFound):
        await box.commands.connect("nobody")


async def test_a_process_read_by_two_and_left_by_one(box: AsyncSandbox) -> None:
    process = await box.commands.start("for i in 1 2 3 4 5; do echo $i; sleep 0.05; done")
    other = await box.commands.connect(process.id)
    async for output in other:
        assert output.stream == "stdout"
        break
    await other.disconnect()
    assert (await process.wait()).stdout == "1\n2\n3\n4\n5\n"
    rest = await other.wait()
    assert rest.stdout == "1\n2\n3\n4\n5\n", "what was read before is kept, and reading goes on behind it"


async def test_files(box: AsyncSandbox, tmp_path: Path) -> None:
    files = box.files
    await files.write("/srv/a.txt", "hällo")
    assert await files.read_text("/srv/a.txt") == "hällo"
    await files.write("/srv/a.txt", b"!", append=True)
    assert (await files.stat("/srv/a.txt")).size == 7
    data = os.urandom(3_000_000)
    await files.write("/srv/big", io.BytesIO(data))
    assert await files.read("/srv/big") == data
    async with await files.read_stream("/srv/big", offset=1000, length=500_000) as part:
        assert b"".join([piece async for piece in part]) == data[1000:501_000]
    assert {i.name for i in await files.write_many({"/m/1": "a", "/m/2": b"b"})} == {"1", "2"}
    assert [i.path for i in await files.list("/m")] == ["/m/1", "/m/2"]
    assert await files.exists("/m/1") and not await files.exists("/m/3")
    await files.mkdir("/d/e")
    await files.symlink("/d/link", "e")
    await files.move("/m/1", "/d/e/1")
    await files.remove("/m", recursive=True)
    with pytest.raises(NotFound) as caught:
        await files.read("/m/1")
    assert caught.value.code == "file_not_found"
    source = tmp_path / "up"
    source.write_bytes(data)
    seen: list[int] = []
    await files.upload(source, "/up", on_progress=seen.append)
    await files.download("/up", tmp_path / "down", on_progress=seen.append)
    assert (tmp_path / "down").read_bytes() == data and seen[-1] == len(data)
    signed = await files.signed_url("/up")
    assert signed.method == "GET" and (await box.url_for("/up")).startswith("unix:")


async def test_a_watch_sees_what_happens_after_it_was_made(box: AsyncSandbox) -> None:
    await box.files.mkdir("/w")
    async with await box.files.watch("/w") as watch:
        await box.files.write("/w/x", "1")
        async with asyncio.timeout(5):
            async for event in watch:
                assert event.path == "/w/x"
                break


async def test_logs_and_events_and_metrics(client: AsyncClient, box: AsyncSandbox) -> None:
    assert isinstance(await box.logs(), str)
    async with asyncio.timeout(5), await client.events(after=0) as feed:
        async for event in feed:
            assert event.kind
            break
    assert (await box.metrics()).sandbox == box.id
    assert (await client.version()).pid == os.getpid() and (await client.health()).status


async def test_keys_over_tcp(server: Running, client: AsyncClient) -> None:
    made = await client.create_key("ci")
    assert made.secret not in str(await client.keys())
    url = f"http://{server.settings.listen}"
    async with AsyncClient(url, made.secret, settings=server.settings) as remote:
        box = await AsyncSandbox.create("debian:12", client=remote)
        assert (await box.commands.run("echo hi")).stdout == "hi\n"
        done = await box.commands.run("cat", input=io.BytesIO(b"x" * (9 << 20)))
        assert len(done.stdout_bytes) == 9 << 20
        await client.revoke_key(made.key.id)
        with pytest.raises(Unauthenticated):
            await box.ping()
    async with AsyncClient(url, "", settings=server.settings) as nobody:
        with pytest.raises(Unauthenticated):
            await nobody.sandboxes()


async def test_two_hundred_streams_at_once(box: AsyncSandbox) -> None:
    seen: dict[int, str] = {}

    async def one(i: int) -> None:
        done = await box.commands.run(f"echo {i}; sleep 0.2; echo {i}", on_stdout=lambda text: None)
        seen[i] = done.stdout

    await asyncio.gather(*(one(i) for i in range(60)))
    assert seen == {i: f"{i}\n{i}\n" for i in range(60)}


def sync_part(server: Running) -> None:
    with Client(settings=server.settings, start=False) as client, Sandbox.create("debian:12", client=client) as box:
        assert box.commands.run("echo hi").stdout == "hi\n"
        seen: list[str] = []

        def nested(text: str) -> None:
            # A callback runs in this thread and may use the SDK itself.
            seen.append(text + box.commands.run("echo nested").stdout)

        box.commands.run("echo a", on_stdout=nested)
        assert seen == ["a\nnested\n"]

        def failing(text: str) -> None:
            raise KeyError(text)

        with pytest.raises(KeyError):
            box.commands.run("echo a; sleep 30", on_stdout=failing)
        process = box.commands.start("for i in 1 2 3; do echo $i; done")
        assert b"".join(output.data for output in process) == b"1\n2\n3\n"
        box.files.write("/x", io.BytesIO(b"data"))
        with box.files.read_stream("/x") as feed:
            assert list(feed) == [b"data"]
        with box.files.watch("/") as watch:
            box.files.write("/y", "1")
            assert next(iter(watch)).path == "/y"
        assert [b.id for b in Sandbox.list(client=client)] == [box.id]
        assert repr(box).startswith("<Sandbox ")
    with Client(settings=server.settings, start=False) as client:
        assert Sandbox.list(client=client) == []


async def test_the_sync_half(server: Running) -> None:
    await asyncio.to_thread(sync_part, server)


async def test_the_shared_client_closes_with_its_loop(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_URL", f"unix:{server.settings.socket}")

    def other_loop() -> None:
        async def main() -> None:
            async with await AsyncSandbox.create("debian:12") as box:
                assert (await box.commands.run("echo hi")).stdout == "hi\n"

        asyncio.run(main())  # an open connection would be a ResourceWarning, and so a failure

    await asyncio.to_thread(other_loop)


async def test_a_lease_ends_its_sandbox_with_its_holder(server: Running, client: AsyncClient) -> None:
    async with AsyncClient(settings=server.settings, start=False) as other:
        box = await AsyncSandbox.create("debian:12", lease=True, client=other)
        assert box.info.lease and (await box.commands.run("echo hi")).ok
        await asyncio.sleep(0.3)
        assert [b.id for b in await AsyncSandbox.list(client=client)] == [box.id]
        await box.release()
    for _ in range(100):
        if not await AsyncSandbox.list(client=client):
            break
        await asyncio.sleep(0.02)
    else:
        pytest.fail("the sandbox outlived its lease")
    box = await AsyncSandbox.create("debian:12", lease=True, client=client)
    assert await box.kill()


async def test_a_daemon_that_went_away_is_said_plainly(server: Running) -> None:
    async with AsyncClient(settings=replace(server.settings, run_dir=server.settings.run_dir / "no"), start=False) as client:
        began = time.monotonic()
        with pytest.raises(Exception, match="cannot connect"):
            await client.version()
        assert time.monotonic() - began < 2


def make_tree(top: Path) -> None:
    (top / "a/b").mkdir(parents=True)
    for i in range(5):
        (top / f"a/b/{i}").write_bytes(os.urandom(700_000))
    (top / "a/run").write_text("x")
    (top / "a/run").chmod(0o755)
    (top / "link").symlink_to("a/run")
    (top / "empty").mkdir()


def tree(top: Path) -> dict[str, object]:
    def content(path: Path) -> object:
        return os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None

    return {str(p.relative_to(top)): (content(p), p.is_symlink() or p.stat().st_mode) for p in top.rglob("*")}


async def test_trees_packed_and_unpacked(tmp_path: Path) -> None:
    make_tree(tmp_path / "one")
    await archive.unpack(archive.pack(tmp_path / "one"), tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    with pytest.raises(HostError) as caught:
        async for _ in archive.pack(tmp_path / "none"):
            pass
    assert caught.value.code == "file_failed"
    # Whoever stops early leaves no thread behind that waits for him.
    pieces = archive.pack(tmp_path / "one")
    async for _ in pieces:
        break
    await pieces.aclose()  # type: ignore[attr-defined]
    with pytest.raises(HostError):
        await archive.unpack(archive.pack(tmp_path / "one"), Path("/proc/none"))


def forged(*members: tuple[str, dict[str, object], bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, fields, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


LINK = {"type": tarfile.SYMTYPE}


@pytest.mark.parametrize(
    "archived",
    [
        forged(("../out", {}, b"x")),
        forged(("/etc/out", {}, b"x")),
        forged(("link", {**LINK, "linkname": ".."}, b""), ("link/out", {}, b"x")),
        forged(("link", {**LINK, "linkname": "/"}, b"")),
        forged(("d", {"type": tarfile.DIRTYPE}, b""), ("link", {**LINK, "linkname": "d"}, b""), ("link/out", {}, b"x")),
        forged(("hard", {"type": tarfile.LNKTYPE, "linkname": "../secret"}, b"")),
        forged(("null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}, b"")),
        b"no archive at all" * 100,
        forged(("cut", {}, b"x" * 5000))[:2000],
    ],
)
async def test_what_a_sandbox_sends_cannot_leave_its_place(tmp_path: Path, archived: bytes) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "down").mkdir()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(archived), 512):
            yield archived[start : start + 512]

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StokerError) as caught:
        await archive.unpack(pieces(), tmp_path / "down")
    assert caught.value.code in ("unsafe_archive", "bad_archive", "file_failed")
    assert {p for p in tmp_path.rglob("*") if "down/" not in str(p)} == set(before)
    assert (tmp_path / "secret").read_text() == "secret"


async def test_a_download_that_breaks_leaves_the_old_file(tmp_path: Path) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield b"new"
        raise HostError("connection_lost", "gone")

    (tmp_path / "file").write_text("old")
    with pytest.raises(HostError):
        await archive.save(breaking(), tmp_path / "file", 0o644)
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@asynccontextmanager
async def script(server: Running, text: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program of its own that uses the SDK, and ends with its children at the latest when the test does."""
    env = {**os.environ, "STOKER_URL": f"unix:{server.settings.socket}"}
    out = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", text, env=env, stdout=out, stderr=out, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


FORKING = """
import os
import signal
from stoker import Sandbox
box = Sandbox.create("debian:12")
assert box.commands.run("echo a").stdout == "a\\n"
child = os.fork()
assert all(box.commands.run(f"echo {i}").stdout == f"{i}\\n" for i in range(20))
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
box.kill()
print("good")
"""


async def test_a_fork_does_not_use_its_parents_connections(server: Running) -> None:
    async with script(server, FORKING) as process:
        out, err = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, out) == (0, b"good\n"), err.decode()


INTERRUPTED = """
from stoker import Sandbox
box = Sandbox.create("debian:12")
print("made", flush=True)
try:
    box.commands.run("sleep 600", tag="long")
except KeyboardInterrupt:
    print([p.running for p in box.commands.list(tag="long")][:0], flush=True)
    raise SystemExit(5)
"""


async def test_an_interrupt_ends_what_was_waited_for(server: Running, client: AsyncClient) -> None:
    async with script(server, INTERRUPTED) as process:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"made\n"
        (box,) = await AsyncSandbox.list(client=client)
        await runs(box, True)
        process.send_signal(2)
        _, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 5, err.decode()
    await runs(box, False)


async def test_a_create_that_is_cancelled_leaves_nothing(server: Running, client: AsyncClient) -> None:
    for delay in (0.0, 0.001, 0.005, 0.02, 0.05):
        task = asyncio.create_task(AsyncSandbox.create("debian:12", client=client))
        await asyncio.sleep(delay)
        task.cancel()
        done = (await asyncio.gather(task, return_exceptions=True))[0]
        if isinstance(done, AsyncSandbox):
            await done.kill()
        assert await AsyncSandbox.list(client=client) == []


async def test_a_create_out_of_time_leaves_nothing(server: Running, client: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr("stoker.client.operations._finish", never)
    with pytest.raises(DeadlineExceeded) as caught:
        await AsyncSandbox.create("debian:12", client=client, ready_timeout=0.1)
    assert caught.value.code == "operation_timeout"
    assert await AsyncSandbox.list(client=client) == []
