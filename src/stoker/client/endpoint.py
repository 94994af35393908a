"""Where a daemon is: its Unix socket, or a URL of another host. Pure: nothing is opened here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from stoker.errors import InvalidRequest

__all__ = ["Endpoint", "parse_endpoint", "query_string"]

HINT = "STOKER_URL is http://HOST:PORT, https://HOST[:PORT][/PREFIX] or unix:/PATH/OF/SOCKET"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place that speaks Stoker's API. Either ``socket`` or ``host`` and ``port`` are set."""

    socket: Path | None = None
    host: str = ""
    port: int = 0
    tls: bool = False
    prefix: str = ""
    """A path before every target, for a daemon behind a proxy; no slash at its end."""

    @property
    def authority(self) -> str:
        """What the Host header says."""
        if self.socket is not None:
            return "localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        if self.socket is not None:
            return f"unix:{self.socket}"
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.prefix}"


def parse_endpoint(url: str) -> Endpoint:
    """``http://``, ``https://`` or ``unix:`` to an endpoint. Raises :class:`InvalidRequest` (``bad_url``)."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as e:
        raise InvalidRequest("bad_url", f"{url!r} is not a URL: {e}", HINT) from None
    if parts.scheme == "unix":
        path = parts.netloc + parts.path
        if not path.startswith("/") or parts.query or parts.fragment:
            raise InvalidRequest("bad_url", f"{url!r} names no absolute path of a socket", HINT)
        return Endpoint(socket=Path(path))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest("bad_url", f"{url!r} is no address of a daemon", HINT)
    if parts.username or parts.query or parts.fragment:
        raise InvalidRequest("bad_url", f"the daemon's address has a user, a query or a fragment: {parts.hostname}", HINT)
    tls = parts.scheme == "https"
    return Endpoint(host=parts.hostname, port=port or (443 if tls else 80), tls=tls, prefix=parts.path.rstrip("/"))


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def query_string(query: dict[str, object]) -> str:
    """``?a=1&b=2`` of what is neither None nor empty; a list gives its name once per item. Empty for nothing."""
    pairs: list[tuple[str, object]] = []
    for name, value in query.items():
        if isinstance(value, list | tuple):
            pairs.extend((name, item) for item in value)
        elif value is not None and value != "":
            pairs.append((name, value))
    # Bytes that are not UTF-8 (a guest's path) travel as surrogates and must come out as they were.
    return "?" + "&".join(f"{n}={quote(_text(v).encode('utf-8', 'surrogateescape'), safe='')}" for n, v in pairs) if pairs else ""
