"""HAProxy with our configuration in front of the proxy, asked over TLS by clients that are not ours."""

from __future__ import annotations

import asyncio
import datetime
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import websockets
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from proxy_running import Place, Running, head_of, plain, running
from stoker.errors import GuestError

pytestmark = pytest.mark.anyio
CONFIGURATION = Path(__file__).resolve().parents[2] / "contrib/haproxy/stoker.cfg"
DEBIAN = Path("/etc/haproxy/haproxy.cfg")
DOMAIN = "sandbox.test"
TRUSTED = frozenset(("127.0.0.1",))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every name one below the domain, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"*.{DOMAIN}")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(f"*.{DOMAIN}")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "stoker.pem"
    path.write_bytes(
        signed.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


def haproxy() -> str:
    found = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    assert found, "scripts/setup dev installs haproxy"
    return found


def listening() -> socket.socket:
    sock = socket.create_server(("127.0.0.1", 0))
    sock.set_inheritable(True)
    return sock


@dataclass
class Front:
    """HAProxy: its ports, and who is asked through it."""

    http: int
    https: int
    proxy: int
    certificate: Path

    async def curl(self, *words: str, name: str = f"svc.{DOMAIN}") -> str:
        """What is said, heads included."""
        to = [
            "--resolve",
            f"{name}:{self.https}:127.0.0.1",
            "--cacert",
            str(self.certificate),
            "--noproxy",
            "*",
            "--max-time",
            "20",
        ]
        words = tuple(word.replace("URL", f"https://{name}:{self.https}") for word in words)
        process = await asyncio.create_subprocess_exec(
            "curl", "-q", "-sS", "-i", *to, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return out.decode().lower()

    async def dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that speaks HTTP/1.1 over TLS."""
        context = ssl.create_default_context(cafile=self.certificate)
        context.set_alpn_protocols(["http/1.1"])
        return await asyncio.open_connection("127.0.0.1", self.https, ssl=context, server_hostname=f"svc.{DOMAIN}")

    async def until(self, text: str, *words: str) -> str:
        """Asks until that is said: a health check takes its time."""
        async with asyncio.timeout(30):
            while text not in (said := await self.curl(*words)):
                await asyncio.sleep(0.1)
        return said


@contextmanager
def in_front(proxy: int, certificate: Path, directory: Path) -> Iterator[Front]:
    own = directory / "global.cfg"
    own.write_text("global\n    maxconn 200\n    log stderr local0\n")
    with listening() as http, listening() as https, open(directory / "said", "wb") as said:
        there = {
            "STOKER_HTTP": f"fd@{http.fileno()}",
            "STOKER_HTTPS": f"fd@{https.fileno()}",
            "STOKER_CERTIFICATE": str(certificate),
            "STOKER_PROXY": f"127.0.0.1:{proxy}",
        }
        process = subprocess.Popen(
            [haproxy(), "-db", "-f", own, "-f", CONFIGURATION],
            env={**os.environ, **there},
            pass_fds=[http.fileno(), https.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
        try:
            yield Front(http.getsockname()[1], https.getsockname()[1], proxy, certificate)
            assert process.poll() is None, (directory / "said").read_text()
        finally:
            process.kill()
            process.wait()


@asynccontextmanager
async def both(handler: object, certificate: Path, directory: Path) -> AsyncIterator[tuple[Running, Front]]:
    async with running(handler, trusted=TRUSTED, domain=DOMAIN) as r:  # type: ignore[arg-type]
        with in_front(r.port, certificate, directory) as front:
            yield r, front


def test_it_is_valid_behind_debians_own(certificate: Path) -> None:
    assert DEBIAN.exists(), "scripts/setup dev installs haproxy"
    words = [haproxy(), "-c", "-f", DEBIAN, "-f", CONFIGURATION]
    done = subprocess.run(words, env={**os.environ, "STOKER_CERTIFICATE": str(certificate)}, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr


@pytest.mark.parametrize("version", ["1.1", "2"])
async def test_requests(certificate: Path, tmp_path: Path, version: str) -> None:
    async with both(plain, certificate, tmp_path) as (r, front):
        http = f"--http{version}"
        claims = ["-H", "X-Forwarded-For: 6.6.6.6", "-H", "X-Forwarded-Proto: ftp", "-H", "X-Forwarded-Host: evil"]
        said = await front.until("200", http, "--interface", "127.0.0.2", *claims, "-H", "Forwarded: for=6.6.6.6", "URL/a?b=c")
        head, _, told = said.partition("\r\n\r\n")
        assert head.startswith(f"http/{version} 200") and "x-is: here" in head
        assert told.startswith("get /a?b=c http/1.1\r\n") and f"\r\nhost: svc.{DOMAIN}:{front.https}\r\n" in told
        assert "\r\nx-forwarded-for: 127.0.0.2, 127.0.0.1\r\nx-forwarded-host: svc.sandbox.test" in told
        assert "\r\nx-forwarded-proto: https\r\n" in told
        assert "6.6.6.6" not in told and "evil" not in told and "ftp" not in told
        # A body whose length nobody says, and one of some size.
        big = tmp_path / "big"
        big.write_bytes(b"z" * 300_000)
        assert (await front.curl(http, "-T", str(big), "URL/put")).endswith("z" * 300_000)
        assert r.service.connections >= 1


async def test_answers_of_the_proxys_own_get_through(certificate: Path, tmp_path: Path) -> None:
    async with both(plain, certificate, tmp_path) as (r, front):
        await front.until("200", "URL/")
        r.sandboxes.known = {"web": Place("sb-1")}
        r.sandboxes.error = GuestError("agent_unreachable", "no agent", "stoker inspect web")
        said = await front.curl("URL/", name=f"80-web.{DOMAIN}")
        assert said.startswith("http/2 503") and "retry-after: 5" in said and "no agent" in said, said
        r.sandboxes.error = GuestError("port_refused", "nothing listens on port 80 of web")
        said = await front.curl("URL/", name=f"80-web.{DOMAIN}")
        assert said.startswith("http/2 502") and "x-stoker-proxy: port_refused" in said
        assert (await front.curl("URL/", name=f"80-nobody.{DOMAIN}")).startswith("http/2 404")


async def test_bodies_are_streamed_both_ways(certificate: Path, tmp_path: Path) -> None:
    """Each piece is sent when the one before has come back: who kept one would wait for ever."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await head_of(reader)
        if b"chunked" not in head:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while length := int(await reader.readline(), 16):
            writer.write(b"%x\r\n%b" % (length, await reader.readexactly(length + 2)))
        writer.write(b"0\r\n\r\n")
        await reader.read()

    async with both(echo, certificate, tmp_path) as (_, front):
        await front.until("200", "URL/")
        reader, writer = await front.dial()
        writer.write(f"POST / HTTP/1.1\r\nHost: svc.{DOMAIN}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        async with asyncio.timeout(30):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            for number in range(20):
                piece = b"%d " % number
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                back = b""
                while back != piece:
                    back += await reader.readexactly(int(await reader.readline(), 16))
                    assert await reader.readexactly(2) == b"\r\n"
            writer.write(b"0\r\n\r\n")
            assert await reader.readexactly(5) == b"0\r\n\r\n"
        writer.close()


async def test_websockets(certificate: Path, tmp_path: Path) -> None:
    async def shout(socket_: websockets.ServerConnection) -> None:
        async for message in socket_:
            assert isinstance(message, str)
            await socket_.send(message.upper())

    async with websockets.serve(shout, "127.0.0.1", 0) as service:
        where = service.sockets[0].getsockname()[1]

        async def through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            """To a server of WebSockets that is not ours."""
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", where)

            async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
                while data := await source.read(65536):
                    target.write(data)
                target.write_eof()

            await asyncio.gather(copy(reader, to_writer), copy(to_reader, writer))
            to_writer.close()

        async with both(through, certificate, tmp_path) as (_, front):
            context = ssl.create_default_context(cafile=certificate)
            url = f"wss://svc.{DOMAIN}:{front.https}/"
            async with asyncio.timeout(60):
                await front.until("426 ", "--http1.1", "URL/")  # it wants an upgrade
                async with websockets.connect(url, host="127.0.0.1", port=front.https, ssl=context, proxy=None) as client:
                    for text in ("hello", "ä" * 100_000):
                        await client.send(text)
                        assert await client.recv() == text.upper()


async def test_the_proxy_is_away_and_comes_back(certificate: Path, tmp_path: Path) -> None:
    async with both(plain, certificate, tmp_path) as (r, front):
        await front.until("200", "URL/")
        await r.proxy.aclose()
        said = await front.until("proxy_away", "URL/")
        assert said.startswith("http/2 503") and "retry-after: 5" in said and "hint: " in said
        async with running(plain, trusted=TRUSTED, domain=DOMAIN, port=front.proxy):
            await front.until("200 ", "URL/")


async def test_without_tls_there_is_only_the_way_to_it(certificate: Path, tmp_path: Path) -> None:
    async with both(plain, certificate, tmp_path) as (_, front):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.http)
        writer.write(f"POST /a?b HTTP/1.1\r\nHost: svc.{DOMAIN}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        said = (await reader.read()).decode().lower()
        assert said.startswith("http/1.1 308 ") and f"\r\nlocation: https://svc.{DOMAIN}/a?b\r\n" in said
        writer.close()
