"""Files over the API on a real guest: contents, trees, watches, users, and what a hostile path can do."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api_daemon import DaemonProcess, daemon_process

MIB = 1 << 20
FILES = "/sandboxes/box/files"


@pytest.fixture(scope="module")
def daemon(session_root: Path, data_dir: Path, accelerator: str) -> Iterator[DaemonProcess]:
    directory = Path(tempfile.mkdtemp(prefix="apif", dir=session_root))
    with daemon_process(directory, data_dir, accelerator) as found:
        found.create(name="box", memory=256 * MIB)
        found.exec("box", "useradd", "-m", "-u", "1000", "alice")
        yield found


def put(daemon: DaemonProcess, path: str, content: Any, expect: int = 200, **params: Any) -> Any:
    return daemon.call("PUT", FILES, expect, params={"path": path, **params}, content=content)


def get(daemon: DaemonProcess, path: str, **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in {"Accept_Encoding": "identity", **headers}.items()}
    return daemon.http.get(f"/v1{FILES}", params={"path": path}, headers=named)


def test_content_comes_back_and_belongs_to_the_user(daemon: DaemonProcess) -> None:
    content = os.urandom(300_000)
    info = put(daemon, "/srv/deep/a.bin", content, mode=0o640)
    assert (info["path"], info["size"], info["mode"], info["user"]) == ("/srv/deep/a.bin", 300_000, 0o640, "root")
    answer = get(daemon, "/srv/deep/a.bin")
    assert answer.content == content and answer.headers["content-length"] == "300000"
    assert get(daemon, "/srv/deep/a.bin", If_None_Match=answer.headers["etag"]).status_code == 304
    part = get(daemon, "/srv/deep/a.bin", Range="bytes=1000-1999")
    assert (part.status_code, part.content) == (206, content[1000:2000])
    assert put(daemon, "/srv/deep/a.bin", b"more", append=True)["size"] == 300_004
    assert get(daemon, "/srv/deep/a.bin", If_None_Match=answer.headers["etag"]).status_code == 200
    theirs = put(daemon, "~/own.txt", b"x", user="alice")
    assert (theirs["path"], theirs["user"], theirs["uid"]) == ("/home/alice/own.txt", "alice", 1000)
    assert put(daemon, "/home/alice/no", b"x", 403, user="nobody")["code"] == "permission_denied"
    assert put(daemon, "/srv/x", b"x", 400, user="no-such-user")["code"] == "no_such_user"


def test_what_is_not_there_or_no_file(daemon: DaemonProcess) -> None:
    assert get(daemon, "/no/such").json()["code"] == "file_not_found"
    assert get(daemon, "/etc").json()["code"] == "is_directory"
    assert get(daemon, "/dev/zero").json()["code"] == "not_a_file"
    assert b"MemTotal" in get(daemon, "/proc/meminfo").content
    assert put(daemon, "/etc/passwd/x", b"", 409)["code"] in ("not_directory", "file_exists")


def test_gzip_and_an_upload_that_breaks_off_leaves_nothing(daemon: DaemonProcess) -> None:
    text = b"all work and no play\n" * 50_000
    info = daemon.call("PUT", FILES, params={"path": "/srv/z"}, content=gzip.compress(text), headers={"Content-Encoding": "gzip"})
    assert info["size"] == len(text)
    with daemon.http.stream("GET", f"/v1{FILES}", params={"path": "/srv/z"}, headers={"Accept-Encoding": "gzip"}) as answer:
        packed = b"".join(answer.iter_raw())
    assert answer.headers["content-encoding"] == "gzip" and gzip.decompress(packed) == text
    import socket

    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(daemon.socket))
        raw.sendall(
            b"PUT /v1/sandboxes/box/files?path=/srv/torn HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 5000
        )
        time.sleep(1)
    deadline = time.monotonic() + 15
    while "torn" in daemon.exec("box", "ls", "-A", "/srv")["stdout"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_names_and_trees(daemon: DaemonProcess) -> None:
    many = {"files": [{"path": "/t/a", "data": "A"}, {"path": "/t/b/c", "data": "Qw==", "base64": True, "mode": 0o755}]}
    assert [info["mode"] for info in daemon.call("POST", FILES, json=many)["items"]][1] == 0o755
    listed = daemon.call("GET", f"{FILES}/list", params={"path": "/t", "depth": 5})
    assert [entry["path"] for entry in listed["items"]] == ["/t/a", "/t/b", "/t/b/c"]
    assert daemon.call("GET", f"{FILES}/list", params={"path": "/usr", "depth": 9, "limit": 50})["truncated"]
    assert daemon.call("POST", f"{FILES}/mkdir", json={"path": "/t/d/e"})["type"] == "directory"
    assert daemon.call("POST", f"{FILES}/mkdir", 409, json={"path": "/t/d", "parents": False})["code"] == "file_exists"
    assert daemon.call("POST", f"{FILES}/symlink", json={"path": "/t/l", "target": "b/c"})["target"] == "b/c"
    assert daemon.call("GET", f"{FILES}/stat", params={"path": "/t/l", "follow": "true"})["type"] == "file"
    assert daemon.call("GET", f"{FILES}/stat", params={"path": "/t/l"})["type"] == "symlink"
    assert daemon.call("POST", f"{FILES}/move", json={"source": "/t/a", "destination": "/t/d/a"})["path"] == "/t/d/a"
    assert daemon.call("GET", f"{FILES}/exists", params={"path": "/t/a"})["exists"] is False
    assert daemon.call("POST", f"{FILES}/chmod", json={"path": "/t/d", "mode": 0o700, "recursive": True})["mode"] == 0o700
    assert daemon.call("POST", f"{FILES}/chown", json={"path": "/t/d", "owner": "alice", "recursive": True})["user"] == "alice"
    assert daemon.exec("box", "stat", "-c", "%U %a", "/t/d/a")["stdout"] == "alice 700\n"
    assert daemon.call("DELETE", FILES, 409, params={"path": "/t"})["code"] == "directory_not_empty"
    daemon.call("DELETE", FILES, 204, params={"path": "/t", "recursive": "true"})
    assert daemon.call("DELETE", FILES, 404, params={"path": "/t"})["code"] == "file_not_found"


def test_a_tree_out_and_in_and_nothing_outside_of_it(daemon: DaemonProcess) -> None:
    daemon.exec("box", "sh", "-c", "mkdir -p /o/sub; echo one > /o/one; ln -s one /o/link; echo two > /o/sub/two; chmod 700 /o/sub")
    answer = daemon.http.get(f"/v1{FILES}/tar", params={"path": "/o"}, headers={"Accept-Encoding": "identity"})
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        names = {member.name.removeprefix("./").rstrip("/"): member for member in tar}
    assert {"one", "link", "sub/two"} <= set(names) and names["link"].issym()
    daemon.call("PUT", f"{FILES}/tar", 204, params={"path": "/i/here"}, content=answer.content)
    assert daemon.exec("box", "sh", "-c", "cat /i/here/link /i/here/sub/two; stat -c %a /i/here/sub")["stdout"] == "one\ntwo\n700\n"
    hostile = io.BytesIO()
    with tarfile.open(fileobj=hostile, mode="w") as tar:
        for name in ("../escaped", "/absolute"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    daemon.http.put(f"/v1{FILES}/tar", params={"path": "/i/there"}, content=hostile.getvalue())
    assert daemon.exec("box", "sh", "-c", "ls /i/escaped /absolute 2>/dev/null | wc -l")["stdout"].strip() == "0"


def test_a_watch_sees_what_happens_in_the_guest(daemon: DaemonProcess) -> None:
    daemon.exec("box", "mkdir", "-p", "/w/sub")
    with daemon.http.stream("GET", f"/v1{FILES}/watch", params={"path": "/w", "recursive": "true"}) as stream:
        assert stream.status_code == 200
        script = "echo x > /w/sub/new; mv /w/sub/new /w/moved; rm /w/moved"
        threading.Thread(target=lambda: daemon.exec("box", "sh", "-c", script)).start()
        seen = set()
        for line in stream.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line[6:])
                seen.add((event["kind"], os.path.basename(event["path"])))
                if ("removed", "moved") in seen:
                    break
    assert ("created", "new") in seen and ("moved", "moved") in seen


def test_signed_urls_lead_to_one_file(daemon: DaemonProcess) -> None:
    put(daemon, "/srv/signed", b"for whoever has the URL")
    signed = daemon.call("POST", f"{FILES}/sign", json={"path": "/srv/signed", "expires_in": 60})
    assert daemon.http.get(signed["url"]).content == b"for whoever has the URL"
    brief = daemon.call("POST", f"{FILES}/sign", json={"path": "/srv/signed", "expires_in": 1})
    time.sleep(1.2)
    assert daemon.http.get(brief["url"]).json()["code"] == "url_expired"


@pytest.mark.parametrize("size", [32 * MIB, pytest.param(1024 * MIB, marks=[pytest.mark.full, pytest.mark.timeout(1200)])])
def test_large_files_in_constant_memory(daemon: DaemonProcess, size: int) -> None:
    if size > 100 * MIB:
        daemon.create(name="big", disk=4 << 30, memory=512 * MIB)
    box = "big" if size > 100 * MIB else "box"
    before, peak, piece = daemon.resident(), 0, os.urandom(1 << 18)

    def pieces() -> Iterator[bytes]:
        nonlocal peak
        for number in range(size // len(piece)):
            if number % 64 == 0:
                peak = max(peak, daemon.resident())
            yield piece

    began = time.monotonic()
    info = daemon.call("PUT", f"/sandboxes/{box}/files", params={"path": "/var/large"}, content=pieces())
    up = size / MIB / (time.monotonic() - began)
    assert info["size"] == size
    digest, began = hashlib.sha256(), time.monotonic()
    path = f"/v1/sandboxes/{box}/files"
    with daemon.http.stream("GET", path, params={"path": "/var/large"}, headers={"Accept-Encoding": "identity"}) as answer:
        for number, data in enumerate(answer.iter_raw()):
            digest.update(data)
            if number % 256 == 0:
                peak = max(peak, daemon.resident())
    down = size / MIB / (time.monotonic() - began)
    expected = hashlib.sha256()
    for _ in range(size // len(piece)):
        expected.update(piece)
    assert digest.digest() == expected.digest()
    assert peak - before < 24 * MIB, f"{(peak - before) / MIB:.0f} MiB"
    print(f"{size // MIB} MiB: up {up:.0f} MiB/s, down {down:.0f} MiB/s, daemon +{(peak - before) / MIB:.1f} MiB")
