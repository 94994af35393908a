"""A daemon without HTTP for crash tests: ``engine_daemon.py DATA RUN host|real``. Commands and answers are JSON lines.

``STOKER_TRACE_KILL=POINT`` makes it kill itself there, as in the real daemon: :class:`stoker.engine.engine.Engine` arms it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from engine_guests import run
from engine_host import HostBooter
from stoker.api.models import (
    AppInfo,
    BuildTemplate,
    CopySandbox,
    CreatePool,
    CreateSandbox,
    CreateSnapshot,
    CreateVolume,
    ForkSandbox,
    Principal,
    SandboxState,
    SetWarm,
    StartProcess,
)
from stoker.api.volumes import parse_mount
from stoker.engine.engine import Engine
from stoker.engine.trace import arm
from stoker.errors import StokerError
from stoker.settings import Settings
from stoker.storage.filesystem import LEAST

ADMIN = Principal()
PARKED = int(os.environ["STOKER_PARKED"])
SETTLED = frozenset({SandboxState.RUNNING, SandboxState.FAILED, SandboxState.STOPPED})


def settings(data: Path, run: Path) -> Settings:
    return Settings(data, run, data / "none.toml", accel=os.environ.get("STOKER_ACCEL", "tcg"), parked=PARKED)


async def put_app(engine: Engine, data: bytes) -> AppInfo:
    async def pieces() -> AsyncIterator[bytes]:
        yield data

    return await engine.apps.put(ADMIN, hashlib.sha256(data).hexdigest(), pieces())


async def command(engine: Engine, words: dict[str, Any]) -> Any:
    match words["do"]:
        case "create":
            operation = await engine.create(
                ADMIN,
                CreateSandbox(
                    image=words["image"],
                    name=words["name"],
                    memory=None if words.get("wait") else 256 << 20,
                    volumes=[parse_mount(text) for text in words.get("volumes", ())],
                ),
            )
            box = await engine.wait(ADMIN, operation.sandbox or "", SETTLED, 120)
            if words.get("wait"):  # for what follows a create of a template in the background
                await engine.wait_operation(ADMIN, operation.id, 120)
                await asyncio.sleep(60)
            return {"id": box.id, "state": box.state, "error": box.error.message if box.error else None}
        case "volume":
            return {"id": (await engine.volumes.create(ADMIN, CreateVolume(name=words["name"], size=16 << 20))).id}
        case "resize_volume":
            return {"size": (await engine.volumes.resize(ADMIN, words["name"], words["size"])).size}
        case "pool":
            return {"path": (await engine.pools.create(CreatePool(name=words["name"], size=LEAST))).path}
        case "remove_pool":
            await engine.pools.remove(words["name"])
        case "remove_volume":
            await engine.volumes.remove(ADMIN, words["name"])
        case "import":
            data = Path(words["tar"]).read_bytes()

            async def pieces() -> AsyncIterator[bytes]:
                yield data

            return {"id": (await engine.volumes.import_tar(ADMIN, words["name"], 64 << 20, pieces())).id}
        case "import_snapshot":
            file = Path(words["file"]).read_bytes()

            async def parts() -> AsyncIterator[bytes]:
                yield file

            return {"id": (await engine.snapshots.import_file(ADMIN, parts(), "came")).id}
        case "app":
            return {"entries": (await put_app(engine, Path(words["file"]).read_bytes())).entries}
        case "job":
            request = StartProcess(argv=["sh", "-c", words["script"]], tag="job")
            return {"process": (await engine.processes.start(ADMIN, words["name"], request)).id}
        case "warm":
            request = SetWarm(sandbox=CreateSandbox(image="debian:12", memory=256 << 20), size=words["size"])
            await engine.warm.set(ADMIN, request)
            async with asyncio.timeout(120):
                while (await engine.warm.list(ADMIN))[0].ready < words["size"]:
                    await asyncio.sleep(0.05)
        case "park":
            async with asyncio.timeout(60):
                while not engine._waiting.parked:
                    await asyncio.sleep(0.02)
        case "pause":
            return {"state": (await engine.pause(ADMIN, words["name"])).state}
        case "template":
            # Built, with what it says in a file and a process that stays.
            service = "while :; do date >> /run/beat; sleep 0.1; done"
            build = BuildTemplate(
                name=words["name"],
                image="debian:12",
                memory=256 << 20,
                setup=[f"echo {words['words']} > /made"],
                start=service,
                ready="test -s /run/beat",
            )
            begun = await engine.build_template(ADMIN, build)
            ended = await engine.wait_operation(ADMIN, begun.id, 300)
            return {"state": ended.state, "error": ended.error.message if ended.error else None}
        case "remove_template":
            await engine.templates.remove(ADMIN, words["name"])
        case "snapshot":
            return {"id": (await engine.snapshot(ADMIN, words["name"], CreateSnapshot())).id}
        case "remove_snapshots":
            return {"removed": len(await engine.snapshots.prune(ADMIN))}
        case "start_snapshot":
            begun = await engine.start_snapshot(ADMIN, words["snapshot"], CopySandbox(name=words["name"]))
            ended = await engine.wait_operation(ADMIN, begun.id, 120)
            return {"state": ended.state, **({"error": ended.error.message} if ended.error else {})}
        case "remove_snapshot":
            await engine.snapshots.remove(ADMIN, words["snapshot"])
        case "fork":
            return {"copies": len((await engine.fork(ADMIN, words["name"], ForkSandbox(name=words.get("copy")))).items)}
        case "run":
            code, data = await run(engine, words["name"], words["script"])
            return {"code": code, "output": data.decode(errors="replace")}
        case "resume":
            return {"state": (await engine.resume(ADMIN, words["name"])).state}
        case "freeze":
            return {"state": (await engine.freeze(ADMIN, words["name"])).state}
        case "thaw":
            return {"state": (await engine.thaw(ADMIN, words["name"])).state}
        case "output":
            # The first bytes of the job, as far as it got: at least so many.
            attached = await engine.processes.attach(ADMIN, words["name"], "job", 0, 0)
            data = b""
            async with asyncio.timeout(60):
                while len(data) < words["enough"]:
                    piece = await attached.read()
                    if piece is None or piece.offset != len(data):
                        break
                    data += piece.data
            await attached.aclose()
            return {"output": data.decode()}
        case "wait":
            box = await engine.wait(ADMIN, words["name"], frozenset(map(SandboxState, words["states"])), 10)
            return {"state": box.state}
        case "id":
            return {"id": (await engine.get(ADMIN, words["name"])).id}
        case "settle":
            # The job has ended.
            while (await engine.processes.get(ADMIN, words["name"], "job")).running:
                await asyncio.sleep(0.05)
        case "arm":
            arm(words["point"])
        case "destroy":
            await engine.destroy(ADMIN, words["name"])
        case "stop":
            return {"state": (await engine.stop(ADMIN, words["name"], 0.5)).state}
        case "start":
            operation = await engine.start(ADMIN, words["name"])
            return {"state": (await engine.wait_operation(ADMIN, operation.id, 120)).state}
        case "image_rm":
            await engine.images.remove("images", words["name"])
        case "gc":
            return {"items": len((await engine.upkeep.gc(dry_run=False)).items)}
        case "fsck":
            return {"clean": (await engine.upkeep.fsck(repair=words["repair"])).clean}
        case "list":
            return {"boxes": {box.name: box.state for box in (await engine.list(ADMIN)).items}}
    return {}


async def main() -> None:
    data, run, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with Engine.open(settings(data, run), booter=HostBooter() if kind == "host" else None) as engine:
        print(json.dumps({"ready": os.getpid()}), flush=True)
        while line := await reader.readline():
            try:
                answer = await command(engine, json.loads(line))
            except StokerError as error:
                answer = {"error": error.code}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
