"""The API against its own OpenAPI document: no 5xx, no answer that is not declared, whatever is sent.

Over loopback, through the real server, on the engine in memory: what is looked at is the API's own surface (parser, routing,
validation, errors, the document), and thousands of requests would boot thousands of machines.
"""

from __future__ import annotations

import asyncio
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from server_fakes import FakeEngine
from stoker.api.models import CreateKey, CreateSandbox, Principal, StartProcess
from stoker.server import listen
from stoker.server.app import all_endpoints, create_app
from stoker.server.daemon import make_server
from stoker.server.openapi import PATH_PARAMETERS

pytestmark = pytest.mark.timeout(600)
EXAMPLES, FULL_EXAMPLES = 5, 60
LOCAL = Principal()


@contextmanager
def _served(root: Path) -> Iterator[tuple[str, str]]:
    """URL and key of a server in a thread of its own, with one sandbox and one process to find."""
    ready = threading.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        engine = FakeEngine(root, harmless=True)
        secret = (await engine.create_key(CreateKey(name="schemathesis"))).secret
        key = next(iter(engine.api_keys.values()))
        who = Principal(owner=key.id, admin=False)
        operation = await engine.create(who, CreateSandbox(image="debian:12", name="box"))
        await engine.wait_operation(who, operation.id, 5)
        await engine.processes.start(who, "box", StartProcess(argv=["cat"], stdin=True, tag="echo"))
        (root / "file").write_bytes(b"content" * 1000)
        socket = listen.bind_tcp("127.0.0.1:0")
        server = make_server(create_app(engine, secret=b"x" * 32))
        host, port = socket.getsockname()[:2]
        loop = asyncio.get_running_loop()
        found.update(url=f"http://{host}:{port}", key=secret, stop=lambda: loop.call_soon_threadsafe(server.stop))
        asyncio.get_running_loop().call_soon(ready.set)
        try:
            await server.serve([socket])
        finally:
            await engine.aclose()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(20)
    try:
        yield found["url"], found["key"]
    finally:
        found["stop"]()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    with _served(tmp_path_factory.mktemp("guest")) as found:
        yield found


# Streams of events end when their client does: those are tested where somebody listens to them.
OPERATIONS = [
    pytest.param(endpoint.method, endpoint.path, mode, id=f"{endpoint.method} {endpoint.path} {mode.value}")
    for endpoint in all_endpoints()
    for mode in GenerationMode
    if not endpoint.path.endswith(("/stream", "/watch"))
    # Where nothing is sent, nothing can be wrong.
    if mode is GenerationMode.POSITIVE or endpoint.body or endpoint.query or "{" in endpoint.path
]
schemathesis.serializer.alias("application/x-tar", "application/octet-stream")
schemathesis.serializer.alias("application/zstd", "application/octet-stream")


@pytest.fixture(scope="module")
def document(served: tuple[str, str]) -> Any:
    """Without the document's word on keys: this test's own key is what each request shows."""
    raw = requests.get(f"{served[0]}/v1/openapi.json", timeout=10).json()
    del raw["security"], raw["components"]["securitySchemes"]
    loaded = schemathesis.openapi.from_dict(raw)
    loaded.config.update(base_url=served[0])
    return loaded


def _right(name: str, value: object) -> bool:
    schema = PATH_PARAMETERS[name]["schema"]
    return isinstance(value, str) and re.fullmatch(schema["pattern"], value) is not None


def _aim(case: schemathesis.Case) -> None:
    """At something that is there, most of the time, or nearly every answer would be: no such sandbox."""
    path = case.path_parameters or {}
    dice = zlib.crc32(repr((case.body, case.query, path)).encode())
    if "sandbox" in path and dice % 4 and _right("sandbox", path["sandbox"]):
        path["sandbox"] = "box" if case.method != "DELETE" or case.operation.path != "/v1/sandboxes/{sandbox}" else "other"
    if "process" in path and dice % 3 and _right("process", path["process"]):
        path["process"] = "echo"
    if case.operation.path.endswith(("/wait", "/operations/{operation}")) and isinstance(case.query, dict):
        case.query.update({"timeout": 0.1} if case.operation.path.endswith("/wait") else {"wait": 0.1})


@pytest.mark.parametrize(("method", "path", "mode"), OPERATIONS)
def test_every_answer_is_declared(
    method: str, path: str, mode: GenerationMode, document: Any, served: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    strategy = document[path][method].as_strategy(generation_mode=mode)

    @given(case=strategy)
    @settings(
        max_examples=FULL_EXAMPLES if request.config.getoption("--full") else EXAMPLES,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    def check(case: schemathesis.Case) -> None:
        _aim(case)
        # What a schema cannot say (base64, a cursor of ours, a signal's name) may still be refused with a declared 400.
        case.call_and_validate(headers={"X-API-Key": served[1]}, timeout=20, excluded_checks=[positive_data_acceptance])

    check()


def test_the_document_is_served_and_says_3_1(served: tuple[str, str]) -> None:
    document = requests.get(f"{served[0]}/v1/openapi.json", timeout=10).json()
    assert document["openapi"].startswith("3.1")
