"""Files over HTTP through a real server: contents, ranges, conditions, compression, names, watches, signed URLs."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from server_running import Running, running

pytestmark = pytest.mark.anyio


@pytest.fixture
async def daemon(short_dir: Path) -> AsyncIterator[Running]:
    async with running(short_dir) as found:  # not guarded: the fake files of the guest are read and written on the loop
        await found.sandbox(name="box")
        yield found


async def _until(condition: Callable[[], Awaitable[bool]], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


FILES = "/v1/sandboxes/box/files"


async def test_write_and_read(daemon: Running) -> None:
    body = bytes(range(256)) * 40
    put = await daemon.http.put(FILES, params={"path": "/srv/a.bin"}, content=body)
    assert put.status_code == 200 and put.json()["size"] == len(body)
    get = await daemon.http.get(FILES, params={"path": "/srv/a.bin"}, headers={"Accept-Encoding": "identity"})
    assert get.content == body and get.headers["content-length"] == str(len(body))
    assert get.headers["content-type"] == "application/octet-stream" and "attachment" in get.headers["content-disposition"]
    more = await daemon.http.put(FILES, params={"path": "/srv/a.bin", "append": "true"}, content=b"more")
    assert more.json()["size"] == len(body) + 4
    assert (await daemon.http.get(FILES, params={"path": "/srv"})).json()["code"] == "is_directory"
    assert (await daemon.http.get(FILES, params={"path": "/none"})).json()["code"] == "file_not_found"
    for params in (
        {},
        {"path": ""},
        {"path": "a\0b"},
        {"path": "x" * 5000},
        {"path": "/x", "user": "a b"},
        {"path": "/x", "typo": "1"},
    ):
        assert (await daemon.http.get(FILES, params=params)).status_code == 400


async def test_ranges_and_conditions(daemon: Running) -> None:
    await daemon.http.put(FILES, params={"path": "/r"}, content=b"0123456789")

    async def get(**headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await daemon.http.get(FILES, params={"path": "/r"}, headers=named)

    for value, content, described in (
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
        ("bytes=0-99", b"0123456789", "bytes 0-9/10"),
    ):
        part = await get(Range=value)
        assert (part.status_code, part.content, part.headers["content-range"]) == (206, content, described)
    outside = await get(Range="bytes=10-")
    assert outside.status_code == 416 and outside.headers["content-range"] == "bytes */10"
    assert outside.json()["code"] == "range_not_satisfiable"
    for odd in ("bytes=4-2", "bytes=1-2,4-5", "lines=1-2", "bytes=-", "bytes=٣-"):
        whole = await daemon.http.get(FILES, params={"path": "/r"}, headers={"Range": odd.encode()})  # type: ignore[dict-item]
        assert whole.status_code == 200, odd
    full = await get()
    tag, changed = full.headers["etag"], full.headers["last-modified"]
    assert (await get(If_None_Match=tag)).status_code == 304
    assert (await get(If_None_Match="*")).status_code == 304
    assert (await get(If_None_Match='"other"', If_Modified_Since=changed)).status_code == 200
    assert (await get(If_Modified_Since=changed)).status_code == 304
    assert (await get(If_Modified_Since=formatdate(0, usegmt=True))).status_code == 200
    assert (await get(If_Modified_Since="garbage")).status_code == 200
    assert (await get(Range="bytes=0-1", If_Range=tag)).status_code == 206
    assert (await get(Range="bytes=0-1", If_Range='"old"')).status_code == 200
    head = await daemon.http.head(FILES, params={"path": "/r"})
    assert head.headers["etag"] == tag and head.headers["content-length"] == "10" and head.content == b""


async def test_gzip_both_ways(daemon: Running) -> None:
    text = b"the same again and again\n" * 40_000
    put = await daemon.http.put(FILES, params={"path": "/z"}, content=gzip.compress(text), headers={"Content-Encoding": "gzip"})
    assert put.json()["size"] == len(text)
    async with daemon.http.stream("GET", FILES, params={"path": "/z"}, headers={"Accept-Encoding": "gzip"}) as packed:
        raw = b"".join([piece async for piece in packed.aiter_raw()])
        assert packed.headers["content-encoding"] == "gzip" and packed.headers["etag"].endswith('-gzip"')
    assert len(raw) < len(text) / 10 and gzip.decompress(raw) == text
    plain = await daemon.http.get(FILES, params={"path": "/z"}, headers={"Accept-Encoding": "gzip;q=0"})
    assert "content-encoding" not in plain.headers and plain.content == text
    for damaged in (b"no gzip", gzip.compress(text)[:-20]):
        bad = await daemon.http.put(FILES, params={"path": "/y"}, content=damaged, headers={"Content-Encoding": "gzip"})
        assert (bad.status_code, bad.json()["code"]) == (400, "bad_encoding")
    assert (await daemon.http.get(FILES, params={"path": "/y"})).status_code == 404  # whole or not at all
    unknown = await daemon.http.put(FILES, params={"path": "/y"}, content=b"x", headers={"Content-Encoding": "br"})
    assert unknown.json()["code"] == "bad_encoding"


async def test_an_upload_is_streamed(daemon: Running) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for number in range(64):
            yield bytes([number]) * 65536

    put = await daemon.http.put(FILES, params={"path": "/big"}, content=pieces())
    assert put.json()["size"] == 64 * 65536


async def test_directories_and_names(daemon: Running) -> None:
    post = daemon.http.post
    many = {"files": [{"path": "/d/a", "data": "A"}, {"path": "/d/e/b", "data": "Qg==", "base64": True}]}
    assert len((await post(FILES, json=many)).json()["items"]) == 2
    listed = (await daemon.http.get(f"{FILES}/list", params={"path": "/d", "depth": 2})).json()
    assert [entry["path"] for entry in listed["items"]] == ["/d/a", "/d/e", "/d/e/b"] and not listed["truncated"]
    assert (await daemon.http.get(f"{FILES}/list", params={"path": "/d", "limit": 1})).json()["truncated"]
    assert (await post(f"{FILES}/mkdir", json={"path": "/n/m"})).json()["type"] == "directory"
    assert (await post(f"{FILES}/move", json={"source": "/d/a", "destination": "/n/a"})).json()["path"] == "/n/a"
    assert (await daemon.http.get(f"{FILES}/exists", params={"path": "/d/a"})).json() == {"exists": False, "type": None}
    assert (await daemon.http.get(f"{FILES}/exists", params={"path": "/n/a"})).json()["type"] == "file"
    assert (await post(f"{FILES}/symlink", json={"path": "/l", "target": "n/a"})).json()["type"] == "symlink"
    assert (await daemon.http.get(f"{FILES}/stat", params={"path": "/l", "follow": "true"})).json()["type"] == "file"
    assert (await post(f"{FILES}/chmod", json={"path": "/n/a", "mode": 0o600})).json()["mode"] == 0o600
    assert (await post(f"{FILES}/chown", json={"path": "/n/a", "owner": "root:root"})).status_code == 200
    assert (await post(f"{FILES}/chmod", json={"path": "/n/a", "mode": 99999})).status_code == 400
    assert (await daemon.http.delete(FILES, params={"path": "/d"})).json()["code"] == "directory_not_empty"
    assert (await daemon.http.delete(FILES, params={"path": "/d", "recursive": "true"})).status_code == 204
    tar = await daemon.http.get(f"{FILES}/tar", params={"path": "/n"})
    assert tar.headers["content-type"] == "application/x-tar" and len(tar.content) == 10240
    assert (await daemon.http.put(f"{FILES}/tar", params={"path": "/n"}, content=b"\0" * 10240)).status_code == 204


async def test_a_watch_tells_of_changes_and_lets_go(daemon: Running) -> None:
    assert (await daemon.http.get(f"{FILES}/watch", params={"path": "/none"})).status_code == 404
    async with daemon.http.stream("GET", f"{FILES}/watch", params={"path": "/", "recursive": "true"}) as stream:
        lines = stream.aiter_lines()
        await daemon.http.put(FILES, params={"path": "/new"}, content=b"")
        async with asyncio.timeout(5):
            async for line in lines:
                if line.startswith("data: "):
                    assert json.loads(line[6:])["kind"] == "created"
                    break
        assert len(daemon.engine.files.watches) == 1

    async def released() -> bool:
        return not daemon.engine.files.watches

    await _until(released)


async def test_signed_urls(daemon: Running) -> None:
    await daemon.http.put(FILES, params={"path": "/s"}, content=b"signed")
    signed = (await daemon.http.post(f"{FILES}/sign", json={"path": "/s", "expires_in": 60})).json()
    assert signed["method"] == "GET"
    assert (await daemon.tcp.get(signed["url"])).content == b"signed"
    assert (await daemon.tcp.get(signed["url"], headers={"Range": "bytes=0-1"})).content == b"si"
    assert (await daemon.tcp.put(signed["url"], content=b"x")).json()["code"] == "wrong_operation"
    forged = signed["url"][:-2] + ("aa" if not signed["url"].endswith("aa") else "bb")
    assert (await daemon.tcp.get(forged)).json()["code"] == "bad_signature"
    writable = (await daemon.http.post(f"{FILES}/sign", json={"path": "/t", "operation": "write"})).json()
    assert (await daemon.tcp.put(writable["url"], content=b"up")).status_code == 200
    assert (await daemon.http.get(FILES, params={"path": "/t"})).content == b"up"
    made = (await daemon.http.post("/v1/keys", json={})).json()
    headers = {"X-API-Key": made["secret"]}
    assert (await daemon.tcp.post(f"{FILES}/sign", json={"path": "/s"}, headers=headers)).status_code == 404
    await daemon.tcp.post("/v1/sandboxes", json={"image": "x", "name": "own"}, headers=headers)
    theirs = (await daemon.tcp.post("/v1/sandboxes/own/files/sign", json={"path": "/s"}, headers=headers)).json()
    assert (await daemon.tcp.get(theirs["url"])).content == b"signed"
    await daemon.http.delete(f"/v1/keys/{made['key']['id']}")
    assert (await daemon.tcp.get(theirs["url"])).json()["code"] == "url_revoked"
