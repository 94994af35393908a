"""Connections into the guest: `connect`, both directions, their ends, losses."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading

from harness import Target, fails, host_test
from wire import DATA, EOF, frame

FIRST = 1 << 27


def inet(port: int, address: str = "127.0.0.1") -> bytes:
    return struct.pack("<H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(address) + bytes(8)


def inet6(port: int) -> bytes:
    return struct.pack("<H", socket.AF_INET6) + struct.pack(">HI", port, 0) + bytes(15) + b"\1" + bytes(4)


def local(path: str) -> bytes:
    return struct.pack("<H", socket.AF_UNIX) + path.encode() + b"\0"


class Server:
    """Takes connections on this host, where the agent runs."""

    def __init__(self, family: int = socket.AF_INET, where: object = ("127.0.0.1", 0)) -> None:
        self.sock = socket.socket(family)
        self.sock.settimeout(20)
        self.sock.bind(where)
        self.sock.listen(512)
        self.port = self.sock.getsockname()[1] if family != socket.AF_UNIX else 0

    def accept(self) -> socket.socket:
        taken, _ = self.sock.accept()
        taken.settimeout(20)
        return taken

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


@host_test
def connects_and_half_closes(a: Target) -> None:
    h = a.connect()
    places = [(Server(), inet), (Server(socket.AF_INET6, ("::1", 0)), inet6)]
    path = f"{a.directory}/listen"
    places.append((Server(socket.AF_UNIX, path), lambda _: local(path)))
    for number, (server, address) in enumerate(places):
        with server:
            id = FIRST + number
            assert h.call("connect", id=id, to=address(server.port)) == {}
            with server.accept() as s:
                h.feed(4 * id, b"GET it")
                assert s.makefile("rb").read() == b"GET it"  # the end of what is sent came, and only of that
                s.sendall(b"have it")
                h.until(lambda id=id: bytes(h.stream(4 * id + 1).data) == b"have it")
                s.shutdown(socket.SHUT_WR)
                done = h.exit_of(id)
            assert (done["code"], done["out"], done["err"]) == (0, 7, 0), done
            assert h.stream(4 * id + 2).end == 0
            h.call("forget", id=id)
            fails("not_found", h.call, "forget", id=id)


@host_test
def tells_why_not(a: Target) -> None:
    h = a.connect()
    with Server() as server:
        port = server.port
    assert fails("unreachable", h.call, "connect", id=FIRST, to=inet(port)).errno == errno.ECONNREFUSED
    assert fails("unreachable", h.call, "connect", id=FIRST, to=local("/no/such/socket")).errno == errno.ENOENT
    for wrong in (
        {"id": FIRST},
        {"id": FIRST, "to": b"\2"},
        {"id": FIRST, "to": bytes(129)},
        {"id": 5, "to": inet(1)},
        {"id": 2 * FIRST, "to": inet(1)},
    ):
        assert fails("unreachable", h.call, "connect", **wrong).errno == errno.EINVAL
    fails("bad_request", h.call, "exec", id=FIRST, argv=["true"])
    # A listener that takes nobody: it is neither refused nor made, and may be given up.
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for number in range(4):
            h.start_call("connect", id=FIRST + 10 + number, to=inet(full.getsockname()[1]))
        for number in range(4):
            h.call("forget", id=FIRST + 10 + number)
    assert not h.call("processes")["processes"]


@host_test
def keeps_connections_whole(a: Target) -> None:
    """Megabytes each way at the same time, against an end that reads slowly, and windows that hold."""
    h = a.connect()
    up, down = os.urandom(3 << 20), os.urandom(3 << 20)
    got = bytearray()
    with Server() as server:
        h.call("connect", id=FIRST, to=inet(server.port))
        with server.accept() as s:

            def other_end() -> None:
                sender = threading.Thread(target=lambda: (s.sendall(down), s.shutdown(socket.SHUT_WR)))
                sender.start()
                while data := s.recv(70_000):
                    got.extend(data)
                sender.join()

            t = threading.Thread(target=other_end)
            t.start()
            h.feed(4 * FIRST, up)
            done = h.exit_of(FIRST, 60)
            t.join()
    assert bytes(got) == up and bytes(h.stream(4 * FIRST + 1).data) == down and done["out"] == len(down)
    h.call("forget", id=FIRST)


@host_test
def tells_of_resets(a: Target) -> None:
    h = a.connect()
    with Server() as server:
        h.call("connect", id=FIRST, to=inet(server.port))
        with server.accept() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        done = h.exit_of(FIRST)
        assert done["code"] == errno.ECONNRESET, done
        h.call("forget", id=FIRST)
        # One that is given up is closed for the other end, too.
        h.call("connect", id=FIRST + 1, to=inet(server.port))
        with server.accept() as s:
            fails("not_found", h.call, "signal", id=FIRST + 1, signal=9)
            h.call("forget", id=FIRST + 1)
            assert s.recv(1) == b""
        # One that is closed by the other end takes no more, and ends when there is nothing more to say.
        h.call("connect", id=FIRST + 2, to=inet(server.port))
        server.accept().close()
        h.until(lambda: h.stream(4 * (FIRST + 2) + 1).end == 0)
        h.send(frame(EOF, 4 * (FIRST + 2), 0))
        assert h.exit_of(FIRST + 2)["code"] == 0
        h.call("forget", id=FIRST + 2)


@host_test
def goes_on_after_a_loss(a: Target) -> None:
    with Server() as server:
        h = a.connect()
        for number in range(3):
            h.call("connect", id=FIRST + number, to=inet(server.port))
        ends = [server.accept() for _ in range(3)]
        for number, s in enumerate(ends):
            h.send(frame(DATA, 4 * (FIRST + number), 0, b"before"))
            assert s.recv(6) == b"before"
            s.sendall(b"unseen")
        h = a.connect()
        assert not h.call("processes")["processes"]
        info = h.call("attach", id=FIRST, out=0, err=0)
        assert info["stdin"] == 6 and info["pid"] == 0, info
        h.call("attach", id=FIRST + 1, out=0, err=0)
        # The third is nobody's any more, which the next connect finds, whatever it is.
        fails("unreachable", h.call, "connect")
        h.call("connect", id=FIRST + 3, to=inet(server.port))
        ends.append(server.accept())
        assert ends[2].recv(1) == b""
        fails("not_found", h.call, "attach", id=FIRST + 2)
        h.send(frame(DATA, 4 * FIRST, 6, b" after"))
        assert ends[0].recv(6) == b" after"
        ends[0].sendall(b" and more")
        h.until(lambda: bytes(h.stream(4 * FIRST + 1).data) == b"unseen and more")
        for number in (0, 1, 3):
            h.call("forget", id=FIRST + number)
        for s in ends:
            s.close()


@host_test
def bounds_connections(a: Target) -> None:
    h = a.connect()
    with Server() as server:
        ends = []
        for number in range(256):
            h.call("connect", id=FIRST + number, to=inet(server.port))
            ends.append(server.accept())
        assert fails("unreachable", h.call, "connect", id=FIRST + 300, to=inet(server.port)).errno == errno.EMFILE
        h.call("forget", id=FIRST + 7)
        h.call("connect", id=FIRST + 300, to=inet(server.port))
        h = a.connect()
        h.call("connect", id=FIRST, to=inet(server.port))
        assert [s.recv(1) for s in ends] == [b""] * 256
        for s in ends:
            s.close()
        h.call("forget", id=FIRST)
