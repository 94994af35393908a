"""ssh into sandboxes: OpenSSH's own client against our server, whose guest is the real agent as a program of this host."""

from __future__ import annotations

import asyncio
import os
import signal
import termios
from collections.abc import AsyncIterator
from pathlib import Path

import asyncssh
import pytest

from command_line import STOKER
from server_running import free_port
from ssh_host import SshHost, configured, ssh_host
from stoker.api import websocket as wire
from stoker.api.models import CreateKey, CreateSandbox, Principal
from stoker.server.ssh import connection, stream
from stoker.server.ssh.connection import Connection
from stoker.server.ssh.session import Environment

pytestmark = pytest.mark.anyio


@pytest.fixture
async def host(tmp_path: Path, short_dir: Path) -> AsyncIterator[SshHost]:
    async with ssh_host(tmp_path, short_dir) as found:
        await found.server.sandbox(name="web")
        await configured(found)
        yield found


async def test_commands(host: SshHost) -> None:
    """Input, output, stderr apart, exit codes and signals; the key is made once, and what is set comes with it."""
    done = await host.ssh("web", "cat; echo err >&2; exit 7", input=b"abc" * 500_000)
    assert (done.code, done.out, done.err) == (7, b"abc" * 500_000, b"err\n")
    key = Path(host.env["XDG_DATA_HOME"]) / "stoker-ssh/id_ed25519"
    assert key.stat().st_mode & 0o777 == 0o600
    before = key.read_bytes()
    done = await host.ssh("-o", "SendEnv=LC_TEST OTHER", "web.stoker", 'echo "$LC_TEST,$OTHER"; pwd')
    assert done.out == b"from here,\n" + os.path.expanduser("~").encode() + b"\n" and done.code == 0
    assert (await host.ssh("web", "kill -TERM $$")).code == 255  # as ssh tells that a signal ended it
    assert (await host.ssh("-l", "daemon", "web", "id -un")).out == b"daemon\n"
    done = await host.ssh("-l", "nosuchuser", "web", "true")
    assert done.code == 125 and b"nosuchuser" in done.err
    # Behind the end of stdin the other direction goes on.
    assert (await host.ssh("web", "cat >/dev/null; echo late", input=b"x")).out == b"late\n"
    # The short way does the same, with nothing of the user's own configuration.
    done = await host(STOKER, "ssh", "web", "--", "echo", "$((1 + 1))", ";", "exit", "3")
    assert (done.code, done.out) == (3, b"2\n")
    assert (await host(STOKER, "ssh", "-l", "daemon", "web", "id -un")).out == b"daemon\n"
    assert (await host(STOKER, "ssh", "daemon@web", "id -un")).out == b"daemon\n"
    assert key.read_bytes() == before


async def test_a_terminal(host: SshHost) -> None:
    done = await host.ssh("-tt", "web", "stty size; tty >/dev/null && echo $TERM; kill -WINCH $$", input=b"")
    assert b"24 80" in done.out and done.code == 0
    # A login shell, driven by its input.
    done = await host.ssh("-tt", "web", input=b"echo $((40 + 2)) $-\nexit 5\n")
    assert b"42 " in done.out and done.code == 5


async def test_a_terminal_that_changes_its_size(host: SshHost) -> None:
    master, slave = os.openpty()
    try:
        termios.tcsetwinsize(slave, (30, 100))
        script = 'stty size; until [ "$(stty size)" = "50 120" ]; do sleep 0.05; done; echo resized'
        process = await host.start("ssh", "-F", host.config, "-t", "web", script, stdin=slave)
        assert process.stdout is not None and await process.stdout.readline() == b"30 100\r\n"
        termios.tcsetwinsize(slave, (50, 120))
        process.send_signal(signal.SIGWINCH)
        async with asyncio.timeout(20):
            assert await process.stdout.readline() == b"resized\r\n" and await process.wait() == 0
    finally:
        os.close(master)
        os.close(slave)


async def test_signals(host: SshHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, which OpenSSH's client does not ask for and others do."""
    for name, value in host.env.items():
        monkeypatch.setenv(name, value)
    access = (await host.server.http.get("/v1/sandboxes/web/ssh")).json()
    known = asyncssh.import_known_hosts(f"web {access['host_key']}\n")
    key = str(host.config.parent / "share/stoker-ssh/id_ed25519")
    proxy = [str(STOKER), "ssh", "--proxy", "web"]
    async with asyncssh.connect(
        "web", username="@default", config=[], proxy_command=proxy, known_hosts=known, client_keys=[key], agent_path=None
    ) as conn:
        process = await conn.create_process("trap 'echo usr1' USR1; echo up; while :; do sleep 0.05; done")
        assert await process.stdout.readline() == "up\n"
        process.send_signal("USR1")
        assert await process.stdout.readline() == "usr1\n"
        process.send_signal("NONSENSE")
        process.send_signal("TERM")
        done = await process.wait()
        assert done.exit_signal is not None and done.exit_signal[0] == "TERM"


async def test_files(host: SshHost, tmp_path: Path) -> None:
    """scp and sftp without either in the guest: contents, times, modes, links, directories."""
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/big").write_bytes(os.urandom(3 << 20))
    (tmp_path / "tree/run").write_text("#!/bin/sh\n")
    (tmp_path / "tree/run").chmod(0o750)
    os.utime(tmp_path / "tree/run", (1000, 2000))
    there = tmp_path / "there"
    there.mkdir()
    done = await host("scp", "-q", "-p", "-r", "-F", host.config, tmp_path / "tree", f"web:{there}/")
    assert (done.code, done.err) == (0, b"")
    assert (there / "tree/sub/big").read_bytes() == (tmp_path / "tree/sub/big").read_bytes()
    status = (there / "tree/run").stat()
    assert status.st_mode & 0o7777 == 0o750 and status.st_mtime == 2000
    done = await host("scp", "-q", "-r", "-F", host.config, f"web:{there}/tree", tmp_path / "back")
    assert done.code == 0 and (tmp_path / "back/sub/big").read_bytes() == (there / "tree/sub/big").read_bytes()
    batch = f"cd {there}\nmkdir new\nput {tmp_path}/tree/run new/x\nrename new/x new/y\nln -s y new/z\nchmod 600 new/y\n"
    batch += "ls -l new\nrm tree/run\npwd\n"
    done = await host("sftp", "-q", "-b", "-", "-F", host.config, "web", input=batch.encode())
    assert done.code == 0 and b"-rw-------" in done.out and f"{there}\n".encode() in done.out, done
    assert os.readlink(there / "new/z") == "y" and not (there / "tree/run").exists()
    done = await host("scp", "-q", "-F", host.config, f"web:{there}/none", tmp_path / "none")
    assert done.code == 1 and b"No such file" in done.err
    line = f"scp -q -F $({STOKER} ssh-config -f) {tmp_path}/tree/run web:{there}/again"
    assert (await host("bash", "-c", line)).code == 0 and (there / "again").exists()
    # The old protocol runs the guest's own scp.
    done = await host("scp", "-O", "-q", "-F", host.config, tmp_path / "tree/run", f"web:{there}/old")
    assert done.code == 0 and (there / "old").exists(), done


async def test_forwarded_ports(host: SshHost) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port, local, nobody, dead = listening.sockets[0].getsockname()[1], free_port(), free_port(), free_port()
    process = await host.start(
        "ssh", "-F", host.config, "-L", f"{local}:localhost:{port}", "-L", f"{dead}:127.0.0.1:{nobody}", "web", "echo up; cat"
    )
    assert process.stdout is not None and await process.stdout.readline() == b"up\n"
    data = os.urandom(1 << 20).hex().encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", local)
    reading = asyncio.create_task(reader.read())
    writer.write(data)
    writer.write_eof()
    assert await reading == data.upper()
    writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", dead)
    assert await reader.read() == b""
    writer.close()
    listening.close()
    # Names of the guest's network are nobody's to resolve; ports of ours are not given to guests.
    out, err = await asyncio.wait_for(process.communicate(b""), 20)
    assert process.returncode == 0
    done = await host.ssh("-o", "ExitOnForwardFailure=yes", "-R", "0:localhost:1", "web", "true")
    assert done.code == 255


async def test_only_its_own_key_and_host_key(host: SshHost, tmp_path: Path) -> None:
    """Each sandbox has its own host key, which stays; another key than the stream's does not log in."""
    first = (await host.server.http.get("/v1/sandboxes/web/ssh")).json()
    await host.server.sandbox(name="other")
    second = (await host.server.http.get("/v1/sandboxes/other/ssh")).json()
    assert first["host_key"] != second["host_key"] and first == (await host.server.http.get("/v1/sandboxes/web/ssh")).json()
    assert (await host.server.http.get("/v1/sandboxes/none/ssh")).status_code == 404
    wrong = tmp_path / "known_hosts"
    wrong.write_text(f"web {second['host_key']}\n")
    text = host.config.read_text()
    host.config.write_text(
        "\n".join(line for line in text.splitlines() if "KnownHosts" not in line) + f"\nUserKnownHostsFile {wrong}\n"
    )
    done = await host.ssh("web", "true")
    assert done.code == 255 and b"Host key verification failed" in done.err
    host.config.write_text(text)
    assert (await host.ssh("web", "true")).code == 0
    await host("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "mine")
    host.config.write_text("\n".join(line for line in text.splitlines() if "IdentityFile" not in line) + "\n")
    done = await host.ssh("-i", tmp_path / "mine", "web", "true")
    assert done.code == 255 and b"Permission denied" in done.err
    done = await host.ssh("none.stoker", "true")
    assert done.code == 255 and b"none" in done.err and b"Traceback" not in done.err


async def test_what_a_lost_client_ran_is_hung_up(host: SshHost, tmp_path: Path) -> None:
    process = await host.start(
        "ssh", "-F", host.config, "web", f"trap 'echo hup > {tmp_path}/told; exit' HUP; echo up; while :; do sleep 0.05; done"
    )
    assert process.stdout is not None and await process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGKILL)
    async with asyncio.timeout(20):
        while not (tmp_path / "told").exists():
            await asyncio.sleep(0.02)


async def test_what_ran_outlives_the_daemon(tmp_path: Path, short_dir: Path) -> None:
    async with ssh_host(tmp_path, short_dir, guarded=False) as host:
        await host.server.sandbox(name="web")
        await configured(host)
        script = f"trap 'echo hup > {tmp_path}/told; exit' HUP; echo up; while :; do sleep 0.05; done"
        process = await host.start("ssh", "-F", host.config, "web", script)
        assert process.stdout is not None and await process.stdout.readline() == b"up\n"
        os.kill(os.getpid(), signal.SIGTERM)  # the server's, which runs in this process
        await asyncio.wait_for(host.server.task, 20)
        assert await asyncio.wait_for(process.wait(), 20) == 255
        agent = host.server.engine.processes.agent
        assert [info.running for info in await host.hub.list(agent, "ssh")] == [True] and not (tmp_path / "told").exists()


async def test_an_agent_without_sftp(host: SshHost) -> None:
    host.server.engine.processes.applet = "unheard-of"
    done = await host("sftp", "-q", "-b", "-", "-F", host.config, "web", input=b"pwd\n")
    assert done.code == 255 and b"stoker: no applet is called unheard-of (its agent is older" in done.err


async def test_streams(host: SshHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is none, and a client that does not log in."""
    async with host.server.websocket("/v1/sandboxes/web/ssh") as socket:
        await socket.send(wire.encode_message(wire.Ssh(key="rubbish")))
        message = wire.decode_daemon(await socket.recv())
        assert isinstance(message, wire.Failure) and message.error.code == "bad_ssh_key"
    monkeypatch.setattr(connection, "LOGIN", 0.3)
    key = (host.config.parent / "share/stoker-ssh/id_ed25519.pub").read_text()
    async with host.server.websocket("/v1/sandboxes/web/ssh") as socket, asyncio.timeout(20):
        await socket.send(wire.encode_message(wire.Ssh(key=key)))
        assert isinstance(wire.decode_daemon(await socket.recv()), wire.Attached)
        data = b""
        while isinstance(frame := await socket.recv(), bytes):
            data += wire.decode_data(frame)[2]
        assert data.startswith(b"SSH-2.0-Stoker") and isinstance(wire.decode_daemon(frame), wire.Exit)


async def test_a_revoked_key_opens_nothing_more(host: SshHost) -> None:
    """On a connection that was there before, too."""
    created = await host.server.engine.create_key(CreateKey(name="test"))
    who = Principal(owner=created.key.id, admin=False)
    made = await host.server.engine.create(who, CreateSandbox(image="debian:12", name="theirs"))
    await host.server.engine.wait_operation(who, made.id, 5)
    host.env |= {"STOKER_URL": f"http://{host.server.settings.listen}", "STOKER_API_KEY": created.secret}
    await configured(host)
    assert created.secret.encode() not in host.config.read_bytes()
    master = host.config.parent / "c"
    process = await host.start("ssh", "-F", host.config, "-M", "-S", master, "theirs", "echo up; cat")
    assert process.stdout is not None and await process.stdout.readline() == b"up\n"
    again = ("ssh", "-F", host.config, "-S", master, "-o", "ProxyCommand=false", "theirs", "echo in")
    assert (await host(*again)).out == b"in\n"
    await host.server.engine.revoke_key(created.key.id)
    done = await host(*again)
    assert done.code != 0 and done.out == b"" and b"revoked" in done.err
    await process.communicate(b"")


async def test_a_forward_that_opens_too_late_is_closed(host: SshHost, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class Late:
        async def aclose(self) -> None:
            closed.set()

    async def late(*_: object, **__: object) -> Late:
        asked.set()
        await asyncio.shield(go.wait())
        return Late()

    ended = asyncio.Event()
    whole = Connection.aclose

    async def noted(self: Connection) -> None:
        await whole(self)
        ended.set()

    monkeypatch.setattr(Connection, "aclose", noted)
    monkeypatch.setattr(host.server.engine.connections, "open", late)
    process = await host.start("ssh", "-F", host.config, "-W", "localhost:80", "web")
    async with asyncio.timeout(20):
        await asked.wait()
        process.kill()
        await ended.wait()
        go.set()
        await closed.wait()


async def test_bounds(host: SshHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of variables, channels and connections."""
    env = Environment()
    for i in range(100):
        env[f"LC_{i}".encode()] = b"x"
    env[b"LANG"] = b"y" * 5000
    env[b"LD_PRELOAD"] = b"z"
    assert len(env) == 32 and b"LANG" not in env and b"LD_PRELOAD" not in env
    monkeypatch.setattr(connection, "CHANNELS", 1)
    master = host.config.parent / "c"
    process = await host.start("ssh", "-F", host.config, "-M", "-S", master, "web", "echo up; cat")
    assert process.stdout is not None and await process.stdout.readline() == b"up\n"
    done = await host("ssh", "-F", host.config, "-S", master, "-o", "ProxyCommand=false", "web", "true")
    assert done.code != 0
    monkeypatch.setattr(stream, "CONNECTIONS", 1)
    done = await host.ssh("web", "true")
    assert done.code == 255 and b"ssh connections already" in done.err
    await process.communicate(b"")
    assert (await host.ssh("web", "true")).code == 0
