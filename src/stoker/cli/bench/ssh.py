"""A real SSH server in a guest, to measure against: Debian's own sshd, one process a connection, reached over loopback.

The packages come from the distribution with their signatures checked and are only unpacked; keys are made for this run. A
connection to the loopback port is joined to ``sshd -i`` in the guest by the bench, which is warm already: what is timed is SSH.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.api.models import StartProcess
from stoker.errors import StokerError
from stoker.host.run import run

if TYPE_CHECKING:
    from stoker.client.client import AsyncClient
    from stoker.client.process import AsyncProcess
    from stoker.client.sandbox import AsyncSandbox
    from stoker.settings import Settings

__all__ = ["login", "ssh_server", "sshd_packages"]

META = "task-ssh-server"
LIBRARIES = "wrap0|nsl2|tirpc3|wtmpdb0|ssl3(?:t64)?|gssapi-krb5-2|krb5-3|k5crypto3|krb5support0|keyutils1|com-err2"
PACKAGES = rf"openssh-server|lib(?:{LIBRARIES})"
"""sshd, and what it links to beyond a base system."""
CONFIG = """HostKey /root/bench/host
AuthorizedKeysFile /root/bench/user.pub
PermitRootLogin yes
StrictModes no
UsePAM no
"""
SETUP = """set -e
cd /root/bench
for deb in *.deb; do dpkg-deb --fsys-tarfile "$deb" | tar -x -C / --keep-directory-symlink; done
grep -q ^sshd: /etc/passwd || echo sshd:x:102:65534::/run/sshd:/usr/sbin/nologin >> /etc/passwd
mkdir -p /run/sshd
chmod 700 /run/sshd
chmod 600 host
ldconfig
/usr/sbin/sshd -t -f config
"""


async def sshd_packages(image: str, settings: Settings, directory: Path) -> list[Path]:
    from stoker.images.debian import fetch_packages
    from stoker.images.progress import NullProgress
    from stoker.images.store import Store
    from stoker.images.suites import parse_suite

    suite = parse_suite(image.rpartition(":")[2], "image_unknown", "image")
    own = replace(settings, data_dir=directory / "packages")
    own.data_dir.mkdir()
    # fetch_packages takes what its directory held before for stale: it gets one of its own.
    return await fetch_packages(suite, META, PACKAGES, own, Store(own), NullProgress())


async def _join(client: AsyncClient, sandbox: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    process: AsyncProcess | None = None
    try:
        argv = ["/usr/sbin/sshd", "-i", "-f", "/root/bench/config"]
        process = await client.open_process(sandbox, StartProcess(argv=argv, stdin=True))
        feeding = asyncio.create_task(_feed(process, reader))
        async for output in process.pieces():
            if output.stream == "stdout":
                writer.write(output.data)
                await writer.drain()
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
    except (StokerError, OSError):
        pass  # ssh says what it missed, and is counted as a failure
    finally:
        writer.close()
        if process is not None:
            await process.disconnect()


async def _feed(process: AsyncProcess, reader: asyncio.StreamReader) -> None:
    while data := await reader.read(65536):
        if not await process.write(data):
            return
    await process.end_input()


@asynccontextmanager
async def ssh_server(client: AsyncClient, box: AsyncSandbox, settings: Settings, directory: Path) -> AsyncIterator[list[str]]:
    """The words of an ssh command line that logs in to the guest as root; the command to run comes after them."""
    for name in ("host", "user"):
        await run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name])
    (directory / "config").write_text(CONFIG)
    files = [
        *await sshd_packages(box.info.image, settings, directory),
        *(directory / name for name in ("host", "user.pub", "config")),
    ]
    await box.commands.run("mkdir -p /root/bench", check=True)
    for file in files:
        with open(file, "rb") as source:
            await box.commands.run(["sh", "-c", 'cat > "/root/bench/$0"', file.name], input=source, check=True)
    await box.commands.run(SETUP, check=True, timeout=300)
    tasks: set[asyncio.Task[None]] = set()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(_join(client, box.id, reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes", "LogLevel=ERROR", "ConnectTimeout=60"]
    try:
        yield ["ssh", "-F", "none", *(word for option in options for word in ("-o", option)),
               "-i", str(directory / "user"), "-p", str(port), "root@127.0.0.1"]  # fmt: skip
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def login(words: list[str], command: str) -> None:
    """One fresh login that runs a command."""
    await run([*words, command], env=dict(os.environ), timeout=120)
