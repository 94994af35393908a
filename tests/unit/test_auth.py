"""Who is asking: peers, groups, keys, and where a key is looked for."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stoker.api.models import ApiKey, SignedOperation
from stoker.errors import Forbidden, StokerError, Unauthenticated
from stoker.server.auth import Peer, api_key, identify, peer_of
from stoker.server.signing import Claim, Signer, load_secret

pytestmark = pytest.mark.anyio
KEY = ApiKey(id="key-aaaaaaaaaaaa", name="k", created_at=0)
SECRET = "sk_secret"


async def find_key(digest: bytes) -> ApiKey | None:
    return KEY if digest == hashlib.sha256(SECRET.encode()).digest() else None


def peer(uid: int, gid: int = 5, groups: frozenset[int] = frozenset()) -> Peer:
    return Peer(pid=1, uid=uid, gid=gid, groups=groups)


OTHER = 54321


@pytest.mark.parametrize(
    ("who", "group"),
    [
        (peer(0), None),
        (peer(os.geteuid()), None),
        (peer(OTHER, gid=77), 77),
        (peer(OTHER, groups=frozenset({77})), 77),
    ],
)
async def test_a_trusted_peer_is_the_administrator(who: Peer, group: int | None) -> None:
    found = await identify(who, None, group, find_key)
    assert (found.owner, found.admin, found.uid) == ("local", True, who.uid)


@pytest.mark.parametrize(
    ("who", "group"), [(peer(OTHER), None), (peer(OTHER, gid=78), 77), (peer(OTHER, groups=frozenset({0})), 77)]
)
async def test_any_other_peer_is_refused(who: Peer, group: int | None) -> None:
    with pytest.raises(Forbidden) as refused:
        await identify(who, None, group, find_key)
    assert refused.value.code == "peer_refused" and str(OTHER) in refused.value.message


async def test_without_a_peer_there_must_be_a_key() -> None:
    with pytest.raises(Unauthenticated) as refused:
        await identify(None, None, 77, find_key)
    assert refused.value.code == "key_required"
    found = await identify(None, SECRET, None, find_key)
    assert (found.owner, found.admin) == (KEY.id, False)


@pytest.mark.parametrize("key", ["", "guessed", SECRET + " ", "ä", "x" * 257, "a\nb"])
async def test_a_wrong_key_is_refused_even_from_a_trusted_peer(key: str) -> None:
    for who in (None, peer(0)):
        with pytest.raises(Unauthenticated) as refused:
            await identify(who, key, None, find_key)
        assert refused.value.code == "bad_key" and (not key or key not in str(refused.value))


def test_where_a_key_is_looked_for() -> None:
    assert api_key([]) is None
    assert api_key([(b"x-api-key", b"a")]) == "a"
    assert api_key([(b"authorization", b"bearer  b "), (b"x-api-key", b"a")]) == "b"
    with pytest.raises(Unauthenticated):
        api_key([(b"authorization", b"Basic abc")])


def test_the_kernel_says_who_a_peer_is() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        found = peer_of(ours)
        assert found is not None
        assert (found.pid, found.uid, found.gid) == (os.getpid(), os.geteuid(), os.getegid())
        assert set(os.getgroups()) <= set(found.groups) | {os.getegid()}
    with socket.socket() as tcp:
        assert peer_of(tcp) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may take groups")
@pytest.mark.parametrize("count", [1, 256, 257, 5000])
def test_the_kernel_says_which_groups_a_peer_has(count: int) -> None:
    """Also those that Python's own getsockopt has no room for."""
    address = f"\0stoker-test-{os.getpid()}-{count}"
    program = (
        f"import os, socket, sys; os.setgroups(range(1000, {1000 + count})); "
        f"peer = socket.socket(socket.AF_UNIX); peer.connect({address!r}); sys.stdin.read()"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        listener.settimeout(30)
        with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE):
            accepted, _ = listener.accept()
            with accepted:
                found = peer_of(accepted)
    assert found is not None and found.groups == frozenset(range(1000, 1000 + count))


def claim(**changes: object) -> Claim:
    values: dict[str, object] = {
        "sandbox": "sb-x",
        "path": "/ä",
        "operation": SignedOperation.READ,
        "expires": 100,
        "owner": "local",
    }
    return Claim(**{**values, **changes})  # type: ignore[arg-type]


def test_a_signed_claim_comes_back_until_it_expires() -> None:
    signer = Signer(b"a" * 32)
    token = signer.sign(claim())
    assert signer.check(token, now=99.9) == claim()
    with pytest.raises(Forbidden) as late:
        signer.check(token, now=100)
    assert late.value.code == "url_expired"


def test_a_damaged_or_foreign_signature_is_refused_in_the_same_words() -> None:
    signer = Signer(b"a" * 32)
    token = signer.sign(claim())
    body, _, mac = token.partition(".")
    other = Signer(b"b" * 32).sign(claim())
    moved = signer.sign(claim(path="/etc/shadow")).partition(".")[0]
    words = set()
    for bad in ("", ".", body, f"{body}.", f".{mac}", f"{moved}.{mac}", other, token + "A", token[:-1], "ä.ö", f"{body}.{mac}.x"):
        with pytest.raises(StokerError) as refused:
            signer.check(bad, now=0)
        words.add((refused.value.code, refused.value.message))
    assert words == {("bad_signature", "the URL's signature is not right")}


def test_the_secret_is_made_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "url-secret"
    first = load_secret(path)
    assert load_secret(path) == first and len(first) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["url-secret"]
    path.write_bytes(b"short")
    assert len(load_secret(path)) == 32
