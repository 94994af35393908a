"""A daemon on the host of a world of namespaces, and real guests behind it: what they reach, and who reaches them.

The daemon is started by a thread that is inside the host's namespace, so all that it does to a network it does there; over its Unix
socket it is spoken to from outside. On the internet there are a name server, HTTP and HTTPS with files, and a fountain that never
ends; on a private network beside the host, an intruder.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import re
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from api_daemon import DaemonProcess
from leaks import Process, processes, wait_gone
from name_server import NameServer
from network_world import EVERYTHING, HOST, PORT, Hosted, Place, addressed, configure, up
from stoker.host import netlink
from stoker.host.namespaces import Namespace
from stoker.host.netlink import End, Netlink
from stoker.host.nftables import Nftables
from stoker.network.plan import NAMESPACE_RANGE
from stoker.network.rules import TABLE

TOOL = Path(__file__).parent / "system" / "guest" / "net.pl"
SITE = "files.example.org"
FILE = hashlib.shake_256(b"a file of the internet's").digest(1 << 20)
FOUNTAIN = 7000
LAN, INTRUDER = IPv4Interface("192.168.77.1/24"), IPv4Interface("192.168.77.9/24")
SECOND, BEYOND = IPv4Interface("6.6.6.6/24"), IPv4Interface("6.6.6.1/24")
"""The host's other uplink and the router there."""
CLOSED = ("No route to host", "Connection refused", "timeout", "Operation not permitted")
"""What a program in a machine is told of what it may not reach."""
PATIENCE = 20.0


def eventually(look: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < deadline, why
        time.sleep(0.1)


class Fountain:
    """Sends to everybody who connects, without an end."""

    def __init__(self, address: str) -> None:
        self._socket = socket.create_server((address, FOUNTAIN))
        self._open: list[socket.socket] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._accept, self._flow)]
        for thread in self._threads:
            thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.setblocking(False)
            self._open.append(connection)

    def _flow(self) -> None:
        while not self._ended.wait(0.02):
            for one in [*self._open]:
                try:
                    one.send(b"water" * 200)
                except BlockingIOError:
                    continue
                except OSError:
                    self._open.remove(one)
                    one.close()

    def close(self) -> None:
        self._ended.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for one in (self._socket, *self._open):
            one.close()


class Site:
    """HTTP on port 80 and HTTPS on port 443 of an address: one file."""

    def __init__(self, address: str, key: Path) -> None:
        self.served: list[str] = []
        served = self.served

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", str(len(FILE)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(FILE)

            def log_message(self, *_: object) -> None: ...

        self._servers = [ThreadingHTTPServer((address, 80), Handler), ThreadingHTTPServer((address, 443), Handler)]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(key)
        self._servers[1].socket = context.wrap_socket(self._servers[1].socket, server_side=True)
        self._threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in self._servers]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def certificate(path: Path) -> str:
    """Writes a key and its own certificate for :data:`SITE`; the certificate as text."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SITE)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SITE)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    text = made.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + text)
    return text.decode()


class GuestWorld(Hosted):
    """Use :func:`guest_world`."""

    def __init__(self, stack: ExitStack, daemon: DaemonProcess) -> None:
        super().__init__(stack)
        self.daemon = daemon
        self.intruder = Place(stack)
        self.host.run(self._beside)
        self.intruder.serve(str(INTRUDER.ip))
        self.host.serve("0.0.0.0")
        self.names = self.internet.run(lambda: NameServer("1.1.1.1"))
        stack.callback(self.names.close)
        self.names.zone[(SITE, "A")] = [f"{SITE} 60 A 8.8.8.8"]
        self.names.zone[("other.org", "A")] = ["other.org 60 A 9.9.9.9"]
        key = daemon.data_dir.parent / "site.pem"
        self.certificate = certificate(key)
        self.site = self.internet.run(lambda: Site("8.8.8.8", key))
        stack.callback(self.site.close)
        self.internet.run(lambda: configure(*addressed("lo", "9.9.9.9/32")))
        self.internet.serve("9.9.9.9")
        for address in ("1.1.1.1", "8.8.8.8"):
            stack.callback(self.internet.run(lambda address=address: Fountain(address)).close)  # type: ignore[misc]
        daemon.env["STOKER_RESOLVERS"] = "1.1.1.1"
        stack.callback(lambda: self.host.run(daemon.close))
        self.start()

    def _beside(self) -> None:
        """A private network beside the host, and an uplink that is not used."""
        # Else it tells a machine that asks for much that it may not have of one denial a second, and the rest wait for nothing.
        Path("/proc/sys/net/ipv4/icmp_ratelimit").write_text("0")
        configure(netlink.add_veth(End("lan0", "02:aa:00:00:01:01"), End("eth0", "02:aa:00:00:01:02"), self.intruder.namespace.fd))
        configure(netlink.add_veth(End("up1", "02:aa:00:00:02:01"), End("net1", "02:aa:00:00:02:02"), self.internet.namespace.fd))
        for name, at in (("lan0", LAN), ("up1", SECOND)):
            index = socket.if_nametoindex(name)
            configure(up(name), netlink.add_address(index, at, name))

        def there(name: str, at: IPv4Interface) -> None:
            configure(up(name), netlink.add_address(socket.if_nametoindex(name), at, name))

        self.intruder.run(lambda: there("eth0", INTRUDER))
        self.intruder.run(lambda: configure(netlink.add_route(EVERYTHING, gateway=LAN.ip)))
        self.internet.run(lambda: there("net1", BEYOND))
        self.internet.run(lambda: configure(netlink.add_route(NAMESPACE_RANGE.network, gateway=HOST.ip)))

    # -- the daemon ---------------------------------------------------------------------------------------------------

    def start(self, trace_kill: str = "") -> None:
        """``trace_kill``: where it is to die."""
        self.daemon.env["STOKER_TRACE_KILL"] = trace_kill
        self.host.run(self.daemon.start)

    def state(self) -> dict[str, list[str]]:
        """What there is on the host because of machines. A slot is called by its sandbox's name, whichever it is now."""
        slots = {}
        for box in self.daemon.call("GET", "/sandboxes")["items"]:
            if box["address"]:
                host = IPv4Address(box["address"]) - 1
                mac = ":".join(f"{byte:02x}" for byte in IPv4Address(box["address"]).packed)
                slots[box["name"]] = (f"stk{int(host):08x}", str(host), box["address"], mac)

        def named(texts: Iterable[str]) -> list[str]:
            found = []
            for text in texts:
                text = re.sub("'counter': {[^}]*}", "", text)
                for name, words in slots.items():
                    text = re.sub(r"(?<![0-9.])(" + "|".join(map(re.escape, words)) + r")(?![0-9.])", name, text)
                found.append(text)
            return sorted(found)

        with self.host.run(Netlink) as link:
            addresses = [str(found.interface) for found in link.addresses()]
        return {
            "links": named(self.interfaces()),
            "addresses": named(addresses),
            "routes": named(self.routes()),
            "elements": named(self.left()),
            "namespaces": [str(len(self.namespaces()))],
            "processes": sorted(one.words[0] for one in self.processes()),
        }

    def processes(self) -> list[Process]:
        """Those of machines and of what else the daemon started for them, itself left out, and keys that it has made for later."""
        found = processes(self.daemon.data_dir.parent)
        return [one for one in found if one.pid != self.daemon.pid and "ssh-keygen" not in one.words]

    def settled(self) -> None:
        """Nothing that later machines begin with is being made."""
        eventually(lambda: not any("golden" in str(one) for one in self.processes()), "never settled")
        seen: list[dict[str, list[str]]] = []

        def calm() -> bool:
            """Descriptors of what is over are closed a moment later."""
            seen.append(self.state())
            time.sleep(0.5)
            return seen[-1:] == seen[-2:-1]

        eventually(calm, "the host is never calm")

    def namespaces(self) -> dict[str, str]:
        """Those that the daemon holds, by the numbers of its descriptors."""
        found = {}
        for number in os.listdir(f"/proc/{self.daemon.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found[number] = os.readlink(f"/proc/{self.daemon.pid}/fd/{number}")
        return {number: text for number, text in found.items() if text.startswith("net:")}

    def counted(self, name: str, which: str = "denials") -> int:
        """Packets of a machine that the host's firewall denied, or those to it that it refused (``refusals``)."""
        address = self.address(name)
        with self.host.run(Nftables) as nft:
            (pins,) = [row["set"] for row in nft.query(f"list set {TABLE} pinned") if "set" in row]
            (found,) = [row["set"] for row in nft.query(f"list set {TABLE} {which}") if "set" in row]
        (interface,) = [one["concat"][0] for one in pins["elem"] if one["concat"][2] == address]
        values = {one["elem"]["val"]: one["elem"]["counter"]["packets"] for one in found["elem"]}
        return int(values[interface])

    def forged(self, name: str) -> int:
        """Packets of a machine that were dropped in its own namespace, since they were not its own."""
        address = self.address(name)
        for text in self.namespaces():
            with Namespace(os.open(f"/proc/{self.daemon.pid}/fd/{text}", os.O_RDONLY)) as one, one.run(Netlink) as link:
                if address in {str(found.interface.ip) for found in link.addresses()}:
                    with one.run(Nftables) as nft:
                        rows = nft.query(f"list chain {TABLE} guard")
                    words = [word for row in rows for word in row.get("rule", {}).get("expr", [])]
                    return sum(word["counter"]["packets"] for word in words if "counter" in word)
        raise AssertionError(f"{name} has no namespace")

    # -- machines -----------------------------------------------------------------------------------------------------

    def create(self, name: str, **words: Any) -> dict[str, Any]:
        """One with the tool of these tests in it."""
        made = dict(self.daemon.call("POST", "/sandboxes", 201, json=self.request(name, **words)))
        self.sure(name, "cat > /net.pl", stdin=TOOL.read_text())
        return made

    @staticmethod
    def request(name: str, **words: Any) -> dict[str, Any]:
        return {"image": "debian:12", "name": name, "network": "nat", "memory": 256 << 20, **words}

    def sure(self, name: str, script: str, **words: Any) -> str:
        done = self.daemon.exec(name, "sh", "-c", script, **words)
        assert done["exit_code"] == 0, done
        return str(done["stdout"])

    def tool(self, name: str, *words: str) -> str:
        done = self.daemon.exec(name, "perl", "/net.pl", *words)
        assert done["exit_code"] == 0, done
        return str(done["stdout"])

    def ask(self, name: str, *targets: str, timeout: int = 2) -> list[str]:
        """``tcp/ADDRESS/PORT`` each; a port that is not said is that of the world's servers."""
        whole = [target if target.count("/") == 2 else f"{target}/{PORT}" for target in targets]
        return self.tool(name, "ask", str(timeout), *whole).splitlines()

    def begin(self, name: str, *words: str, tag: str) -> None:
        self.daemon.call("POST", f"/sandboxes/{name}/processes", 201, json={"argv": ["perl", "/net.pl", *words], "tag": tag})

    def serve(self, name: str, port: int, word: str) -> None:
        self.begin(name, "serve", str(port), word, tag="serve")
        eventually(lambda: self.ask(name, f"tcp/127.0.0.1/{port}") == [f"{word} 127.0.0.1"], "nobody serves in the guest")

    def end(self, name: str, tag: str) -> None:
        """Ends what was begun under this tag."""
        for process in self.daemon.call("GET", f"/sandboxes/{name}/processes")["items"]:
            if process["running"] and process["tag"] == tag:
                self.post(f"{name}/processes/{process['id']}", "signal", expect=204, json={"signal": 9})

    def set(self, name: str, **words: Any) -> dict[str, Any]:
        return dict(self.daemon.call("PUT", f"/sandboxes/{name}/network", json=words))

    def post(self, name: str, verb: str, **words: Any) -> Any:
        return self.daemon.call("POST", f"/sandboxes/{name}/{verb}", **words)

    def address(self, name: str) -> str:
        return str(self.daemon.call("GET", f"/sandboxes/{name}")["address"])

    def gone(self, name: str) -> None:
        """Whatever became of it, it is not there afterwards."""
        if any(box["name"] == name for box in self.daemon.call("GET", "/sandboxes")["items"]):
            self.remove(name)

    def remove(self, *names: str) -> None:
        for name in names:
            self.daemon.call("DELETE", f"/sandboxes/{name}", 204)


@contextmanager
def guest_world(directory: Path, shared: Path, accelerator: str) -> Iterator[GuestWorld]:
    daemon = DaemonProcess(directory, shared, accelerator)
    (daemon.data_dir / "golden").symlink_to(shared / "golden")
    (shared / "golden").mkdir(exist_ok=True)
    with ExitStack() as stack:
        made = GuestWorld(stack, daemon)
        links, routes = made.interfaces(), made.routes()
        yield made
        for box in daemon.call("GET", "/sandboxes?limit=1000")["items"]:
            daemon.call("DELETE", f"/sandboxes/{box['id']}", 204)
        left = wait_gone(lambda: sorted((made.interfaces() - links) | (made.routes() - routes)) + made.left())
        assert not left, "machines left something on the host"
    assert not wait_gone(lambda: [str(process) for process in processes(directory)])


@contextmanager
def serving(root: Path, shared: Path, accelerator: str, **boxes: dict[str, Any]) -> Iterator[GuestWorld]:
    """Such a world with machines, by their names, made as they are asked for; each serves its name on port 80."""
    with guest_world(Path(tempfile.mkdtemp(prefix="net", dir=root)), shared, accelerator) as made:
        for name, words in boxes.items():
            made.create(name, **words)
        for name in boxes:
            made.serve(name, 80, name)
        made.settled()
        yield made


@contextmanager
def same_after(made: GuestWorld) -> Iterator[None]:
    """The host is afterwards what it was before."""
    before = made.state()
    yield

    def other() -> list[str]:
        after = made.state()
        return [f"{kind}: {before[kind]} became {after[kind]}" for kind in before if before[kind] != after[kind]]

    left = wait_gone(other, PATIENCE)
    assert not left, "\n".join(left)


def reached(made: GuestWorld, port: int = 9000) -> str:
    """What a machine says to who comes from the internet."""
    return made.internet.ask(str(HOST.ip), port, timeout=5)


def dies(made: GuestWorld, point: str, work: Callable[[], object]) -> None:
    """The daemon is killed at a point while it does ``work``, and another is started."""
    made.daemon.stop()
    made.start(point)
    with pytest.raises(Exception, match="(?i)disconnect|reset|closed|refused"):
        work()
    assert made.daemon.process is not None
    assert made.daemon.process.wait(60) == -9
    made.start()


def ethernet(source: str, kind: int, body: bytes, target: str) -> str:
    return (bytes.fromhex((target + source).replace(":", "")) + struct.pack("!H", kind) + body).hex()


def datagram(source: str, target: str, port: int, payload: bytes) -> bytes:
    """An IPv4 packet with a UDP datagram in it."""
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(payload), 1, 0, 64, 17, 0) + ends
    total = sum(struct.unpack("!10H", header))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return header[:10] + struct.pack("!H", checksum) + header[12:] + struct.pack("!HHHH", 4000, port, 8 + len(payload), 0) + payload


def arp(mac: str, address: str) -> bytes:
    return bytes.fromhex(mac.replace(":", "")) + socket.inet_aton(address)
