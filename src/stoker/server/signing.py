"""Signed URLs: one file of one sandbox, read or written without a key until a moment passes.

A token is the claim (JSON, base64url), a dot, and its HMAC-SHA256. The secret is 32 bytes in ``data_dir/url-secret`` (0600), made
on first use: losing it makes every URL invalid and gives the sandboxes other ssh host keys, and nothing else.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

import msgspec

from stoker.api.models import SignedOperation
from stoker.errors import Forbidden

__all__ = ["Claim", "Signer", "load_secret"]


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a token allows. ``owner`` is on whose behalf: the URL can do no more than they can, as long as they can."""

    sandbox: str
    path: str
    operation: SignedOperation
    expires: int
    owner: str
    user: str | None = None


def load_secret(path: Path) -> bytes:
    """The secret kept at ``path``; of two that make it at once, one wins."""
    try:
        data = path.read_bytes()
        if len(data) == 32:
            return data
    except FileNotFoundError:
        pass
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return path.read_bytes()


class Signer:
    """Makes and checks tokens."""

    def __init__(self, secret: bytes) -> None:
        self._key = hashlib.sha256(b"stoker signed url 1\n" + secret).digest()

    def sign(self, claim: Claim) -> str:
        body = base64.urlsafe_b64encode(msgspec.json.encode(claim)).rstrip(b"=")
        return f"{body.decode()}.{self._mac(body)}"

    def check(self, token: str, now: float | None = None) -> Claim:
        """Raises one and the same ``Forbidden`` for a token that is damaged, forged or of another daemon."""
        body, _, mac = token.partition(".")
        try:
            if not hmac.compare_digest(self._mac(body.encode("ascii")), mac):
                raise ValueError
            claim = msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=Claim)
        except (ValueError, TypeError, binascii.Error, msgspec.DecodeError):
            raise Forbidden("bad_signature", "the URL's signature is not right", "ask for a new one") from None
        if claim.expires <= (time.time() if now is None else now):
            raise Forbidden("url_expired", "the URL has expired", "ask for a new one")
        return claim

    def _mac(self, body: bytes) -> str:
        return base64.urlsafe_b64encode(hmac.digest(self._key, body, "sha256")).rstrip(b"=").decode()
