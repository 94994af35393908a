"""The host keys of sandboxes: derived from the daemon's secret and the sandbox's id.

So each sandbox has its own, forks too, and keeps it through pauses, stops and restarts of the daemon; nothing has to be made ahead
of time, kept, or removed.
"""

from __future__ import annotations

import hmac

__all__ = ["private_key", "public_key"]


def _key(secret: bytes, sandbox: str):  # type: ignore[no-untyped-def]
    # Imported here: it takes a tenth of a second, and most daemons never see an ssh.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(hmac.digest(secret, b"stoker ssh host key 1\n" + sandbox.encode(), "sha256"))


def private_key(secret: bytes, sandbox: str) -> bytes:
    """Ed25519, in PKCS #8 and PEM."""
    from cryptography.hazmat.primitives import serialization as form

    pem: bytes = _key(secret, sandbox).private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    return pem


def public_key(secret: bytes, sandbox: str) -> str:
    """Type and base64, as in a known_hosts file."""
    from cryptography.hazmat.primitives import serialization as form

    key: bytes = _key(secret, sandbox).public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    return key.decode()
