"""A real daemon process with directories of its own; kernels and images are those all system tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, unix_connect

from stoker.api import websocket as wire

SHARED = ("kernels", "images", "cache")


class DaemonProcess:
    """Started and ended as its users would; ``http`` speaks to it over its Unix socket."""

    def __init__(self, directory: Path, shared: Path, accelerator: str) -> None:
        self.data_dir, self.run_dir = directory / "data", directory / "run"
        self.data_dir.mkdir(mode=0o711)
        self.run_dir.mkdir(mode=0o755)
        for name in SHARED:
            (shared / name).mkdir(parents=True, exist_ok=True)
            (self.data_dir / name).symlink_to(shared / name)
        self.env = {
            **os.environ,
            "STOKER_DATA_DIR": str(self.data_dir),
            "STOKER_RUN_DIR": str(self.run_dir),
            "STOKER_ACCEL": accelerator,
            "STOKER_CONFIG": "/nonexistent/stoker.toml",
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.socket = self.run_dir / "stoker.sock"
        self.http = httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://localhost", timeout=240)

    def start(self, *words: str) -> None:
        read, write = os.pipe()
        log = open(self.run_dir / "daemon.log", "ab")
        argv = [sys.executable, "-m", "stoker.cli", "serve", "--ready-fd", str(write), *words]
        self.process = subprocess.Popen(argv, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(write,))
        log.close()
        os.close(write)
        with open(read, "rb") as pipe:
            line = pipe.readline()
        assert line == b"ready\n", (line, self.log())

    def log(self) -> str:
        return (self.run_dir / "daemon.log").read_text()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """As bad luck does it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)

    def resident(self) -> int:
        """Bytes of this process's memory, now and at most so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    def call(self, method: str, path: str, expect: int = 200, **rest: Any) -> Any:
        answer = self.http.request(method, "/v1" + path, **rest)
        assert answer.status_code == expect, f"{method} {path}: {answer.status_code} {answer.text}\n{self.log()[-2000:]}"
        return answer.json() if answer.content else None

    def create(self, **rest: Any) -> dict[str, Any]:
        body = {"image": "debian:12", "memory": 192 << 20, "network": "none", **rest}
        return dict(self.call("POST", "/sandboxes", 201, json=body))

    def exec(self, sandbox: str, *argv: str, **rest: Any) -> dict[str, Any]:
        return dict(self.call("POST", f"/sandboxes/{sandbox}/exec", json={"argv": list(argv), **rest}))

    def websocket(self, path: str) -> ClientConnection:
        return unix_connect(str(self.socket), f"ws://localhost/v1{path}", compression=None, max_size=None, legacy=True)

    def close(self) -> None:
        """Destroys everything, then ends."""
        try:
            if self.process is not None and self.process.poll() is not None:
                self.start()
            for box in self.call("GET", "/sandboxes?limit=1000")["items"]:
                self.http.delete(f"/v1/sandboxes/{box['id']}")
        finally:
            self.stop()
            self.http.close()


@contextmanager
def daemon_process(directory: Path, shared: Path, accelerator: str) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(directory, shared, accelerator)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()


def say(socket: ClientConnection, message: Any) -> None:
    socket.send(wire.encode_message(message))


def hear(socket: ClientConnection, kind: type[Any]) -> Any:
    text = socket.recv(timeout=60)
    assert isinstance(text, str)
    message = wire.decode_daemon(text)
    assert isinstance(message, kind), message
    return message
