"""Heads of requests and responses as the proxy sends them on: nothing of what came is copied unread.

A head is parsed (httptools, strict), judged here, and written anew. So both sides always agree on where a message ends: a request
that could be read in two ways (two lengths, a length and a transfer coding, another coding than chunked, a second Host) is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

__all__ = ["BadHead", "Head", "Headers", "authority", "chunk", "judge", "request_head", "response_head", "trailers"]

Headers = list[tuple[bytes, bytes]]
HOP: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade", b"proxy-authenticate")
    + (b"proxy-authorization", b"trailer", b"content-length", b"http2-settings")
)
"""For one connection only, or written by us."""
NOT_IN_TRAILERS: Final = HOP | frozenset(
    (b"host", b"authorization", b"cookie", b"set-cookie", b"content-encoding", b"content-type")
)
FORWARDED: Final = frozenset((b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-port", b"forwarded"))
NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+\Z")
BAD_VALUE: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
TARGET: Final = re.compile(rb"(?:/[\x21-\x7e\x80-\xff]*|\*)\Z")
HOST: Final = re.compile(rb"([A-Za-z0-9._-]{1,255})(?::([0-9]{1,5}))?\Z")
REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}


class BadHead(Exception):
    """What cannot be sent on. ``status`` is the answer for a request."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


@dataclass(slots=True)
class Head:
    """A judged head: how its body is framed, what it wants of the connection."""

    length: int | None = None
    """Bytes of its body; None: chunked, or (a response) until the connection closes."""
    chunked: bool = False
    close: bool = False
    upgrade: bytes = b""
    host: bytes = b""
    expects: bool = False
    drop: frozenset[bytes] = field(default_factory=frozenset)
    """Headers that ``Connection`` names."""


def _tokens(value: bytes) -> list[bytes]:
    return [token.strip().lower() for token in value.split(b",") if token.strip()]


def judge(headers: Headers, version: str, *, request: bool) -> Head:
    """What a head says. Names are in lower case. Raises :class:`BadHead` for what two readers could understand in two ways."""
    if version not in ("1.0", "1.1"):
        raise BadHead(505, "HTTP 1.0 and 1.1 are what is spoken here")
    head = Head(length=0 if request else None, close=version != "1.1")
    lengths: list[bytes] = []
    codings: list[bytes] = []
    hosts: list[bytes] = []
    upgrade = b""
    named: list[bytes] = []
    for name, value in headers:
        if not NAME.match(name) or BAD_VALUE.search(value):
            raise BadHead(400, "a header's name or value has characters that none may have")
        if name == b"content-length":
            lengths.append(value)
        elif name == b"transfer-encoding":
            codings += _tokens(value) or [b""]
        elif name == b"host":
            hosts.append(value)
        elif name == b"connection":
            named += _tokens(value)
        elif name == b"upgrade":
            upgrade = value
        elif name == b"expect" and request:
            if value.lower() != b"100-continue":
                raise BadHead(417, "only 100-continue can be expected")
            head.expects = version == "1.1"
    if codings:
        if codings != [b"chunked"] or lengths or version != "1.1":
            raise BadHead(
                400, "the length of the body is not clear: Transfer-Encoding must be chunked, alone, without Content-Length"
            )
        head.chunked, head.length = True, None
    elif lengths:
        if len(lengths) > 1 or not lengths[0].isdigit() or len(lengths[0]) > 18:
            raise BadHead(400, "Content-Length is not one number")
        head.length = int(lengths[0])
    if request:
        if len(hosts) != 1:
            raise BadHead(400, "a request has one Host header")
        head.host = hosts[0]
    if b"close" in named:
        head.close = True
    elif version == "1.0" and b"keep-alive" in named:
        head.close = False
    # h2c would be a second protocol on the connection, whose requests nobody here looks at.
    if b"upgrade" in named and upgrade and b"h2c" not in _tokens(upgrade) and head.length in (0, None) and not head.chunked:
        head.upgrade = upgrade
    head.drop = frozenset(named)
    return head


def authority(host: bytes) -> tuple[str, str]:
    """Name (lower case, no final dot) and port of a Host header."""
    found = HOST.match(host)
    if found is None:
        raise BadHead(400, "the Host header is not a name and a port")
    return found[1].decode().lower().rstrip("."), (found[2] or b"").decode()


def target_of(url: bytes, head: Head) -> bytes:
    """The target in origin form. One in absolute form has its host from there (RFC 9112, 3.2.2)."""
    lower = url[:7].lower()
    if lower == b"http://":
        rest = url[7:]
        end = next((i for i, c in enumerate(rest) if c in b"/?#"), len(rest))
        head.host, path = rest[:end], rest[end:]
        url = path if path[:1] == b"/" else b"/" + path
    if not TARGET.match(url) or b"#" in url:
        raise BadHead(400, "the request's target is not a path")
    return url


def _kept(headers: Headers, head: Head, without: frozenset[bytes]) -> list[bytes]:
    drop = HOP | without | head.drop if head.drop or without else HOP
    return [b"%b: %b\r\n" % pair for pair in headers if pair[0] not in drop]


def request_head(
    method: bytes, target: bytes, headers: Headers, head: Head, *, client: str, proto: str, trusted: bool, without: frozenset[bytes]
) -> bytes:
    """The head for the service. ``trusted``: the client is a proxy whose X-Forwarded headers are true; else they are dropped."""
    drop = without | FORWARDED | {b"host"}
    lines = [b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (method, target, head.host), *_kept(headers, head, drop)]
    given = {name: value for name, value in headers if name in FORWARDED} if trusted else {}
    before = given.get(b"x-forwarded-for")
    address = client.encode()
    lines.append(b"x-forwarded-for: %b\r\n" % (b"%b, %b" % (before, address) if before else address))
    lines.append(b"x-forwarded-host: %b\r\n" % given.get(b"x-forwarded-host", head.host))
    lines.append(b"x-forwarded-proto: %b\r\n" % given.get(b"x-forwarded-proto", proto.encode()))
    if head.upgrade:
        lines.append(b"connection: upgrade\r\nupgrade: %b\r\n" % head.upgrade)
    elif head.chunked:
        lines.append(b"transfer-encoding: chunked\r\n")
    elif head.length or method in (b"POST", b"PUT", b"PATCH"):
        lines.append(b"content-length: %d\r\n" % (head.length or 0))
    lines.append(b"\r\n")
    return b"".join(lines)


def response_head(
    status: int, reason: bytes, headers: Headers, head: Head, *, chunked: bool, close: bool, bodiless: bool, old: bool = False
) -> bytes:
    """The head for the client. ``bodiless``: no body follows, whatever length is told. ``old``: it speaks HTTP/1.0."""
    lines = [b"HTTP/1.1 %d %b\r\n" % (status, reason or REASONS.get(status, b"")), *_kept(headers, head, frozenset())]
    if status == 101:
        lines.append(b"connection: upgrade\r\nupgrade: %b\r\n\r\n" % head.upgrade)
        return b"".join(lines)
    if chunked:
        lines.append(b"transfer-encoding: chunked\r\n")
    elif head.length is not None and status >= 200 and status != 204 and not (bodiless and head.chunked):
        lines.append(b"content-length: %d\r\n" % head.length)
    if old and not close:
        lines.append(b"connection: keep-alive\r\n")
    elif close and status >= 200:
        lines.append(b"connection: close\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def trailers(headers: Headers) -> bytes:
    """The end of a chunked body, with those trailers that may be there."""
    kept = [
        b"%b: %b\r\n" % (name, value)
        for name, value in headers
        if name not in NOT_IN_TRAILERS and NAME.match(name) and not BAD_VALUE.search(value)
    ]
    return b"0\r\n%b\r\n" % b"".join(kept)
