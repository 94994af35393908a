"""What an OpenSSH client needs of us: a key pair of this user's on this host, and a stream in the place of a network."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.api import websocket as wire
from stoker.api.models import SshAccess
from stoker.client.api import path
from stoker.client.attachment import WINDOW, Attachment, Offsets
from stoker.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stoker.client.api import Api

__all__ = ["client_key", "key_directory", "relay", "ssh_access"]

KEY = "id_ed25519"


def key_directory(environ: dict[str, str] | None = None) -> Path:
    env = dict(os.environ) if environ is None else environ
    home = Path(env.get("HOME") or "~").expanduser()
    return Path(env.get("XDG_DATA_HOME") or home / ".local/share") / "stoker-ssh"


async def client_key(directory: Path | None = None) -> Path:
    """The private key that this user logs in with (0600, its public half beside it in ``.pub``); made when there is none.

    Of two that make it at once, one wins. It opens nothing by itself: the daemon takes it on a stream that it has let in already.
    """
    place = key_directory() if directory is None else directory
    key, public = place / KEY, place / f"{KEY}.pub"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = place.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise HostError("directory_refused", f"{place} belongs to another user, or others may write to it")
        if not (key.exists() and public.exists()):
            await _make(key, public)
    except OSError as error:
        raise HostError("no_ssh_key", f"no key can be made in {place}: {error.strerror}", "set XDG_DATA_HOME") from None
    return key


async def _make(key: Path, public: Path) -> None:
    from stoker.host.run import run

    with tempfile.TemporaryDirectory(prefix=".making.", dir=key.parent) as made:
        draft = Path(made) / KEY
        try:
            if not key.exists():
                await run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "stoker", "-f", draft], timeout=60)
                try:
                    os.link(draft, key)  # never over another's
                except FileExistsError:
                    pass
            # Of the key that is there, whoever made it: somebody may have been stopped between the two.
            half = await run(["ssh-keygen", "-y", "-f", key], timeout=60)
        except HostError as error:
            if error.code == "tool_missing":
                error.hint = "apt-get install openssh-client"
            raise
        Path(f"{draft}.pub").write_bytes(half.stdout)
        os.replace(f"{draft}.pub", public)


async def ssh_access(api: Api, sandbox: str) -> SshAccess:
    """The sandbox's id and host key."""
    return await api.call("GET", path("sandboxes", sandbox, "ssh"), SshAccess)


async def relay(
    api: Api, sandbox: str, key: str, read: Callable[[], Awaitable[bytes]], write: Callable[[bytes], Awaitable[None]]
) -> None:
    """Joins our two streams with the sandbox's ssh server, until it has ended. ``key``: the public key that is to log in."""
    first = wire.Ssh(key=key, window=WINDOW)
    attachment = await Attachment.open(api, path("sandboxes", sandbox, "ssh"), first, Offsets(0, 0))

    async def send() -> None:
        while data := await read():
            if not await attachment.write(data):
                return
        await attachment.close_stdin()

    sending = asyncio.create_task(send())
    try:
        async for output in attachment:
            await write(output.data)
    except ConnectionError:
        pass  # ssh is gone
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        attachment.abort() if attachment.exit is None else await attachment.close()
