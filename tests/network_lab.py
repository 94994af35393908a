"""A little world for tests of the guest's network, in namespaces of its own: nothing touches the real uplink.

Run as ``unshare --net --mount python network_lab.py DIRECTORY SPEC`` it is the *host*: services on its loopback, on private
addresses, on an address of its own that looks public, and behind a router an *internet* with a server on 1.1.1.1. It then starts
the machine that SPEC (JSON) tells of and prints what the guest's console said. See ``tests/system/test_user_network.py``.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

HOST_ADDRESSES = ("10.77.0.1/24", "192.168.77.1/24", "172.20.0.1/16", "100.64.3.1/24", "169.254.169.254/32", "5.5.5.5/32")
OWN_NETWORK = "7.7.7.0/24"
"""A whole network that the host takes for itself by a local route: no interface shows it."""
SERVED = ("127.0.0.1", "5.5.5.5", "7.7.7.7", *(address.partition("/")[0] for address in HOST_ADDRESSES))
PORT = 8080


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


SERVER = """
import socket, sys, threading
def tcp(address, port, name):
    s = socket.create_server((address, port))
    while True:
        c, _ = s.accept()
        c.recv(64); c.sendall(name.encode()); c.close()
def udp(address, port, name):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((address, port))
    while True:
        _, peer = s.recvfrom(2048); s.sendto(name.encode(), peer)
for argument in sys.argv[1:]:
    address, port, name = argument.split(",")
    for kind in (tcp, udp):
        threading.Thread(target=kind, args=(address, int(port), f"{name}/{kind.__name__}")).start()
print("up", flush=True)
"""


@contextmanager
def serve(*services: str, namespace: int | None = None) -> Iterator[None]:
    prefix = ["nsenter", f"--net=/proc/{namespace}/ns/net"] if namespace else []
    server = subprocess.Popen([*prefix, sys.executable, "-c", SERVER, *services], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        assert server.stdout is not None and server.stdout.readline() == b"up\n", "the services do not start"
        yield
    finally:
        server.kill()
        server.wait()


@contextmanager
def internet() -> Iterator[int]:
    """The namespace behind the router; yields the process that holds it."""
    holder = subprocess.Popen(["unshare", "--net", "sleep", "600"], stdin=subprocess.DEVNULL)
    try:
        for _ in range(200):
            if Path(f"/proc/{holder.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink():
                break
            threading.Event().wait(0.01)
        ip("link", "add", "uplink", "type", "veth", "peer", "name", "world", "netns", str(holder.pid))
        for words in (
            ("link", "set", "lo", "up"),
            ("addr", "add", "1.1.1.1/32", "dev", "world"),
            ("addr", "add", "10.99.0.1/32", "dev", "world"),
            ("link", "set", "world", "up"),
            ("route", "add", "default", "dev", "world"),
        ):
            subprocess.run(["nsenter", f"--net=/proc/{holder.pid}/ns/net", "ip", *words], check=True)
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def host_side(directory: Path) -> None:
    ip("link", "set", "lo", "up")
    ip("link", "set", "uplink", "up")
    for address in HOST_ADDRESSES:
        ip("addr", "add", address, "dev", "uplink")
    ip("route", "add", "local", OWN_NETWORK, "dev", "lo")
    ip("route", "add", "default", "dev", "uplink", "src", "5.5.5.5")
    resolv = directory / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\n")
    subprocess.run(["mount", "--bind", resolv, "/etc/resolv.conf"], check=True)


async def run_guest(directory: Path, plan: dict[str, str]) -> None:
    from stoker.host.addresses import host_addresses
    from stoker.network.user import plan_user_network
    from stoker.settings import load_settings
    from stoker.vmm.qemu.driver import launch
    from vmm_guest import probe_spec

    network = plan_user_network(host_addresses())
    if plan["filter"] == "open":
        network = replace(network, nameserver="10.0.2.200", denied=("255.255.255.255/32",))
    spec = probe_spec(Path(plan["kernel"]), Path(plan["initrd"]), directory / "m", *plan["words"].split(), network=network)
    machine = await launch(spec, load_settings())
    try:
        async with asyncio.timeout(100):
            ended = await machine.wait()
        print(json.dumps({"console": await machine.console_tail(200), "vmm": await machine.vmm_tail(), "code": ended.code}))
    finally:
        await machine.kill()
        await machine.close()


def main() -> None:
    directory, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    with ExitStack() as stack:
        world = stack.enter_context(internet())
        host_side(directory)
        stack.enter_context(serve(*(f"{address},{PORT},host" for address in dict.fromkeys(SERVED)), "127.0.0.1,53,resolver"))
        stack.enter_context(serve(f"1.1.1.1,{PORT},internet", f"10.99.0.1,{PORT},private", namespace=world))
        asyncio.run(run_guest(directory, plan))


if __name__ == "__main__":
    main()
