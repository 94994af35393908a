"""Sandboxes, operations, keys, errors and streams of events through a real server, with an engine in memory."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server_running import LOCAL, Running, running
from stoker.api.models import CreateKey, Principal
from stoker.errors import CapacityExhausted, GuestError

pytestmark = pytest.mark.anyio


@pytest.fixture
async def daemon(short_dir: Path) -> AsyncIterator[Running]:
    async with running(short_dir, guarded=True) as found:
        yield found


async def test_a_sandbox_from_create_to_destroy(daemon: Running) -> None:
    answer = await daemon.http.post("/v1/sandboxes", json={"image": "debian:12", "name": "web", "labels": {"team": "a"}})
    assert answer.status_code == 201, answer.text
    box = answer.json()
    assert box["state"] == "running" and box["name"] == "web" and box["owner"] == "local"
    assert answer.headers["location"] == f"/v1/sandboxes/{box['id']}"
    assert (await daemon.http.get("/v1/sandboxes/web")).json()["id"] == box["id"]
    assert (await daemon.http.post("/v1/sandboxes/web/ping")).json() == {"ms": 0.1}
    timeout = {"timeout": {"seconds": 60, "mode": "idle"}}
    assert (await daemon.http.put("/v1/sandboxes/web/timeout", json=timeout)).json()["timeout"]["mode"] == "idle"
    assert (await daemon.http.post("/v1/sandboxes/web/freeze")).json()["state"] == "frozen"
    wrong = await daemon.http.post("/v1/sandboxes/web/freeze")
    assert wrong.status_code == 409 and wrong.json()["code"] == "wrong_state"
    assert (await daemon.http.post("/v1/sandboxes/web/thaw")).json()["state"] == "running"
    assert (await daemon.http.post("/v1/sandboxes/web/stop")).json()["state"] == "stopped"
    assert (await daemon.http.post("/v1/sandboxes/web/start")).json()["state"] == "running"
    assert (await daemon.http.delete("/v1/sandboxes/web")).status_code == 204
    gone = await daemon.http.get("/v1/sandboxes/web")
    assert gone.status_code == 404
    assert gone.json()["family"] == "NotFound" and gone.json()["hint"]


async def test_create_without_waiting_is_an_operation_that_can_be_followed(daemon: Running) -> None:
    daemon.engine.boot_seconds = 0.2
    answer = await daemon.http.post("/v1/sandboxes", params={"wait": "false"}, json={"image": "debian:12"})
    assert answer.status_code == 202
    operation = answer.json()
    assert operation["state"] == "running" and answer.headers["location"] == f"/v1/operations/{operation['id']}"
    seen = []
    async with daemon.http.stream("GET", f"/v1/operations/{operation['id']}/stream") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        seen += [json.loads(line[6:])["state"] async for line in stream.aiter_lines() if line.startswith("data: ")]
    assert seen == ["running", "succeeded"]
    assert (await daemon.http.get(f"/v1/operations/{operation['id']}", params={"wait": 5})).json()["state"] == "succeeded"
    assert len((await daemon.http.get("/v1/operations")).json()["items"]) == 1
    missing = await daemon.http.get("/v1/operations/op-aaaaaaaaaaaaaaaaaaaa")
    assert missing.status_code == 404


async def test_the_same_idempotency_key_gives_the_same_sandbox(daemon: Running) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = await daemon.http.post("/v1/sandboxes", json={"image": "debian:12"}, headers=headers)
    again = await daemon.http.post("/v1/sandboxes", json={"image": "debian:12"}, headers=headers)
    other = await daemon.http.post("/v1/sandboxes", json={"image": "debian:11"}, headers=headers)
    assert first.json()["id"] == again.json()["id"]
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_mismatch")
    bad = await daemon.http.post("/v1/sandboxes", json={"image": "debian:12"}, headers={"Idempotency-Key": "x" * 200})
    assert (bad.status_code, bad.json()["code"]) == (400, "bad_idempotency_key")


async def test_what_fails_in_the_boot_is_raised_with_its_own_status(daemon: Running) -> None:
    daemon.engine.fail["boot"] = GuestError("kernel_panic", "the kernel panicked", console=("a", "b"))
    answer = await daemon.http.post("/v1/sandboxes", json={"image": "debian:12"})
    assert answer.status_code == 502
    body = answer.json()
    assert body["code"] == "kernel_panic" and body["console"] == ["a", "b"] and body["details"]["sandbox"].startswith("sb-")
    daemon.engine.fail["create"] = CapacityExhausted("capacity_exhausted", "no room", details={"memory": 1})
    full = await daemon.http.post("/v1/sandboxes", json={"image": "debian:12"})
    assert full.status_code == 429 and full.json()["details"] == {"memory": 1} and full.headers["retry-after"]


async def test_a_defect_is_a_500_that_tells_nothing_of_itself(short_dir: Path) -> None:
    async with running(short_dir) as daemon:  # not guarded: a traceback is read from the sources
        daemon.engine.fail["list"] = ZeroDivisionError("a secret")
        answer = await daemon.http.get("/v1/sandboxes")
    assert answer.status_code == 500
    assert answer.json()["code"] == "internal_error" and "secret" not in answer.text


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"image": "x", "name": "a b"}, "$.name"),
        ({"image": "x", "name": "ok\n"}, "$.name"),
        ({"image": "x", "cpus": 0}, "$.cpus"),
        ({"image": "x", "memory": "512M"}, "$.memory"),
        ({"image": "x", "labels": {"": "v"}}, "labels"),
        ({"image": "x", "labels": {f"k{i}": "v" for i in range(65)}}, "$.labels"),
        ({"image": "x", "env": {"A=B": "v"}}, "env"),
        ({"image": "x", "env": {"A": "\0"}}, "env"),
        ({"image": "x", "typo": 1}, "typo"),
        ({"image": "x", "timeout": {"seconds": 0}}, "$.timeout.seconds"),
        ({"name": "x"}, "image"),
        ([], "array"),
    ],
)
async def test_a_wrong_field_is_named(daemon: Running, body: object, where: str) -> None:
    answer = await daemon.http.post("/v1/sandboxes", json=body)
    assert answer.status_code == 400
    assert answer.json()["code"] == "invalid_field" and where in answer.json()["message"]
    assert "(?!" not in answer.text


async def test_bodies_that_are_none(daemon: Running) -> None:
    post = daemon.http.post
    assert (await post("/v1/sandboxes", content=b"{", headers={"Content-Type": "application/json"})).json()[
        "code"
    ] == "invalid_json"
    assert (await post("/v1/sandboxes", content=b"\xff\xfe")).json()["code"] == "invalid_json"
    assert (await post("/v1/sandboxes", content=b"[" * 100_000)).status_code == 400
    form = await post("/v1/sandboxes", data={"image": "x"})
    assert (form.status_code, form.json()["code"]) == (400, "bad_content_type")
    large = await post("/v1/sandboxes", content=b" " * (5 << 20))
    assert (large.status_code, large.json()["code"]) == (413, "body_too_large")


async def test_query_strings_are_checked_too(daemon: Running) -> None:
    get = daemon.http.get
    for query in ("limit=0", "limit=x", "limt=1", "limit=1&limit=2", "state=nowhere", "cursor=zzz", "%ff=1", "limit=%ff", "label="):
        answer = await get("/v1/sandboxes?" + query)
        assert answer.status_code == 400, query
        assert answer.json()["family"] == "InvalidRequest"
    assert (await get("/v1/sandboxes/x?y=1")).status_code == 400


async def test_list_filters_and_pages(daemon: Running) -> None:
    for number in range(5):
        await daemon.sandbox(name=f"n{number}", labels={"n": str(number), "all": "x"})
    first = (await daemon.http.get("/v1/sandboxes", params={"limit": 2})).json()
    assert [box["name"] for box in first["items"]] == ["n4", "n3"]
    second = (await daemon.http.get("/v1/sandboxes", params={"limit": 2, "cursor": first["next"]})).json()
    assert [box["name"] for box in second["items"]] == ["n2", "n1"]
    assert len((await daemon.http.get("/v1/sandboxes?label=n=3&label=all")).json()["items"]) == 1
    assert len((await daemon.http.get("/v1/sandboxes?label=none")).json()["items"]) == 0
    assert len((await daemon.http.get("/v1/sandboxes?state=running&state=failed")).json()["items"]) == 5
    assert len((await daemon.http.get("/v1/sandboxes?state=failed")).json()["items"]) == 0
    assert len((await daemon.http.get("/v1/sandboxes?name=n3")).json()["items"]) == 1


async def test_wait_for_a_state_and_for_the_end(daemon: Running) -> None:
    box = await daemon.sandbox(name="w")
    late = await daemon.http.get("/v1/sandboxes/w/wait?state=stopped&timeout=0.05")
    assert (late.status_code, late.json()["family"]) == (408, "DeadlineExceeded")
    waiting = asyncio.create_task(daemon.http.get("/v1/sandboxes/w/wait?state=stopped&timeout=10"))
    gone = asyncio.create_task(daemon.http.get("/v1/sandboxes/w/wait?timeout=10"))
    await asyncio.sleep(0.1)
    await daemon.engine.stop(LOCAL, box.id, 0)
    assert (await waiting).json()["state"] == "stopped"
    await daemon.engine.destroy(LOCAL, box.id)
    assert (await gone).status_code == 204


async def test_pause_and_resume(daemon: Running) -> None:
    await daemon.sandbox(name="p")
    for verb, state in (("pause", "paused"), ("resume", "running")):
        answer = await daemon.http.post(f"/v1/sandboxes/p/{verb}")
        assert (answer.status_code, answer.json()["state"]) == (200, state)
        assert (await daemon.http.post(f"/v1/sandboxes/nope/{verb}")).status_code == 404


async def test_events_and_console_are_streams(daemon: Running) -> None:
    box = await daemon.sandbox(name="e")
    daemon.engine.consoles[box.id] = b"boot\n\xff"
    part = (await daemon.http.get("/v1/sandboxes/e/console")).json()
    assert part == {"text": "boot\n\ufffd", "offset": 0, "next": 6, "oldest": 0}
    async with daemon.http.stream("GET", "/v1/sandboxes/e/console/stream?offset=0") as console:
        lines = console.aiter_lines()
        assert await _next_data(lines) == part
        daemon.engine.consoles[box.id] += b"more"
        assert (await _next_data(lines))["text"] == "more"
        await daemon.engine.stop(LOCAL, box.id, 0)
        assert [line async for line in lines if line.startswith("data")] == []  # the end
    async with daemon.http.stream("GET", "/v1/sandboxes/e/events/stream", headers={"Last-Event-ID": "0"}) as stream:
        lines = stream.aiter_lines()
        first = await _next_data(lines)
        assert first["id"] == 1 and first["sandbox"] == box.id


async def _next_data(lines: AsyncIterator[str]) -> dict[str, object]:
    async with asyncio.timeout(5):
        async for line in lines:
            if line.startswith("data: "):
                return json.loads(line[6:])
    raise AssertionError("the stream ended")


async def test_metrics_for_programs_and_for_prometheus(daemon: Running) -> None:
    box = await daemon.sandbox(name="m")
    assert (await daemon.http.get("/v1/sandboxes/m/metrics?window=600")).json()["samples"][0]["memory_host"] == 4096
    text = (await daemon.http.get("/metrics")).text
    assert 'stoker_sandboxes{state="running"} 1.0' in text
    assert f'stoker_sandbox_memory_host_bytes{{name="m",sandbox="{box.id}"}} 4096.0' in text


async def test_routes_that_are_none(daemon: Running) -> None:
    for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/sandboxes/", 200), ("PATCH", "/v1/sandboxes", 405)):
        answer = await daemon.http.request(method, path)
        assert answer.status_code == status
        if status != 200:
            assert set(answer.json()) >= {"code", "message", "hint", "family"}
    assert "POST" in (await daemon.http.request("PATCH", "/v1/sandboxes")).headers["allow"]


async def test_a_key_sees_only_its_own(daemon: Running) -> None:
    mine, other = await daemon.key(), await daemon.key()
    await daemon.sandbox(name="local")
    headers = {"Authorization": f"Bearer {mine}"}
    answer = await daemon.tcp.post("/v1/sandboxes", json={"image": "debian:12", "name": "web"}, headers=headers)
    assert answer.status_code == 201, answer.text
    identity = answer.json()["id"]
    assert [b["name"] for b in (await daemon.tcp.get("/v1/sandboxes", headers=headers)).json()["items"]] == ["web"]
    theirs = {"X-API-Key": other}
    assert (await daemon.tcp.get("/v1/sandboxes", headers=theirs)).json()["items"] == []
    words = []
    for path in (f"/v1/sandboxes/{identity}", "/v1/sandboxes/sb-aaaaaaaaaaaaaaaaaaaa", "/v1/sandboxes/local"):
        hidden = await daemon.tcp.get(path, headers=theirs)
        assert hidden.status_code == 404
        words.append(hidden.json()["message"].rpartition(" ")[0])
    assert len(set(words)) == 1
    assert len((await daemon.http.get("/v1/sandboxes")).json()["items"]) == 2  # the administrator sees all
    as_key = await daemon.http.get("/v1/sandboxes", headers=theirs)
    assert as_key.json()["items"] == []  # a key shown over the Unix socket counts


async def test_keys_are_made_and_revoked_over_the_socket_only(daemon: Running) -> None:
    made = (await daemon.http.post("/v1/keys", json={"name": "ci", "quota": {"sandboxes": 2}})).json()
    headers = {"Authorization": f"Bearer {made['secret']}"}
    assert (await daemon.tcp.get("/v1/version", headers=headers)).status_code == 200
    assert made["secret"] not in (await daemon.http.get("/v1/keys")).text
    for method, path in (("POST", "/v1/keys"), ("GET", "/v1/keys"), ("DELETE", f"/v1/keys/{made['key']['id']}")):
        refused = await daemon.tcp.request(method, path, headers=headers, json={} if method == "POST" else None)
        assert (refused.status_code, refused.json()["code"]) == (403, "local_only")
    revoked = await daemon.http.delete(f"/v1/keys/{made['key']['id']}")
    assert revoked.status_code == 200 and revoked.json()["revoked_at"]
    assert (await daemon.tcp.get("/v1/version", headers=headers)).status_code == 401


async def test_tcp_wants_a_key_and_a_right_one(daemon: Running) -> None:
    key = await daemon.key()
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {key}"},
        {"X-API-Key": ""},
        {"X-API-Key": "x" * 999},
    ):
        answer = await daemon.tcp.get("/v1/sandboxes", headers=headers)
        assert answer.status_code == 401, headers
        assert answer.headers["www-authenticate"].startswith("Bearer")
    assert (await daemon.http.get("/v1/sandboxes", headers={"X-API-Key": "wrong"})).status_code == 401
    public = await daemon.tcp.get("/v1/health")
    assert public.json() == {"status": "degraded", "problems": []}
    assert (await daemon.http.get("/v1/health")).json()["problems"]
    assert (await daemon.tcp.get("/docs")).headers["content-type"].startswith("text/html")
    version = (await daemon.tcp.get("/v1/version", headers={"X-API-Key": key})).json()
    assert version["facts"] == {} and version["pid"] == os.getpid()
    assert (await daemon.http.get("/v1/version")).json()["facts"] == {"secret_fact": 1}


@pytest.mark.parametrize(
    "request_part", [{"image": "ext4:/etc/shadow"}, {"initrd": "/x"}, {"kernel": "/boot/vmlinuz"}, {"kernel": "../x"}]
)
async def test_a_key_cannot_name_paths_of_the_host(daemon: Running, request_part: dict[str, str]) -> None:
    headers = {"X-API-Key": await daemon.key()}
    body = {"image": "debian:12", **request_part}
    refused = await daemon.tcp.post("/v1/sandboxes", json=body, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (403, "local_path")
    assert (await daemon.http.post("/v1/sandboxes", json=body)).status_code == 201


async def test_the_socket_is_for_its_owner(daemon: Running) -> None:
    mode = stat.S_IMODE(daemon.settings.socket.stat().st_mode)
    assert mode in (0o600, 0o660)


async def test_two_hundred_requests_at_once(daemon: Running) -> None:
    await daemon.sandbox(name="busy")
    answers = await asyncio.gather(*(daemon.http.get("/v1/sandboxes/busy") for _ in range(200)))
    assert {a.status_code for a in answers} == {200}


async def test_quota_and_name_reach_the_engine(daemon: Running) -> None:
    created = await daemon.engine.create_key(CreateKey(name="q"))
    who = Principal(owner=created.key.id, admin=False)
    answer = await daemon.tcp.post(
        "/v1/sandboxes", json={"image": "debian:12", "memory": 64 << 20, "cpus": 2}, headers={"X-API-Key": created.secret}
    )
    box = await daemon.engine.get(who, answer.json()["id"])
    assert (box.owner, box.resources.cpus, box.resources.memory) == (created.key.id, 2, 64 << 20)
