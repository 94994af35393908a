"""Machines of the network nat, real ones: what they reach, what they are told, and who reaches them. One daemon, two guests."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guest_world import (
    CLOSED,
    FILE,
    FOUNTAIN,
    INTRUDER,
    LAN,
    SITE,
    GuestWorld,
    arp,
    datagram,
    ethernet,
    eventually,
    same_after,
    serving,
)
from network_world import HOST
from stoker.network.plan import INSIDE

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.timeout(300),
]
DIGEST = hashlib.sha256(FILE).hexdigest()
HELPER = "/usr/lib/apt/apt-helper -o Acquire::Retries=0 -o Acquire::http::Timeout=20 -o Acquire::https::CAInfo=/ca.pem"


@pytest.fixture(scope="module")
def shared(session_root: Path, data_dir: Path, accelerator: str) -> Iterator[GuestWorld]:
    with serving(session_root, data_dir, accelerator, one={}, two={}) as made:
        yield made


@pytest.fixture
def made(shared: GuestWorld) -> Iterator[GuestWorld]:
    """Both machines are as they were made, before and afterwards."""
    shared.settled()
    with same_after(shared):
        yield shared
        for name in ("one", "two"):
            shared.set(name, egress="all", publish=[])


def download(made: GuestWorld, name: str, url: str, digest: str = DIGEST) -> dict[str, Any]:
    made.sure(name, "cat > /ca.pem", stdin=made.certificate)
    return made.daemon.exec(name, "sh", "-c", f"rm -f /file; {HELPER} download-file {url} /file SHA256:{digest} 2>&1")


def test_downloads(made: GuestWorld) -> None:
    """As apt-get does it: a name is looked up, a file is had by HTTP and by HTTPS, and is what it should be."""
    for scheme in ("http", "https"):
        before = len(made.site.served)
        done = download(made, "one", f"{scheme}://{SITE}/pool/{scheme}.deb")
        assert done["exit_code"] == 0, done
        assert made.sure("one", "sha256sum < /file").split()[0] == DIGEST
        assert made.site.served[before:] == [f"/pool/{scheme}.deb"]
    assert (SITE + ".") in made.names.names()
    assert download(made, "one", f"http://{SITE}/other", DIGEST[::-1])["exit_code"] != 0
    assert made.ask("one", "tcp/1.1.1.1", "udp/8.8.8.8") == [str(HOST.ip)] * 2


def test_by_default_the_public_and_nothing_else(made: GuestWorld) -> None:
    other = made.address("two")
    targets = ["10.1.2.3", "192.168.3.4", "169.254.169.254", str(HOST.ip), str(LAN.ip), str(INTRUDER.ip), "6.6.6.6"]
    targets += [str(INSIDE.gateway.ip), made.address("one"), other, "172.17.0.1", "100.64.0.1"]
    before = made.counted("one")
    wanted = [f"{kind}/{address}" for address in targets for kind in ("tcp", "udp")]
    wanted += [f"tcp/{other}/80", "tcp/127.0.0.1/80", "tcp/1.1.1.1"]
    *closed, neighbour, self, public = made.ask("one", *wanted)
    assert [(target, said) for target, said in zip(wanted, closed, strict=False) if said not in CLOSED] == []
    assert (neighbour in CLOSED, self, public) == (True, "one 127.0.0.1", str(HOST.ip))
    assert made.counted("one") >= before + 20
    # That it is the rules that close all this: the host has a way to each, and they answer.
    assert made.host.ask(other, 80).startswith("two ")
    for address in ("10.1.2.3", "169.254.169.254", str(INTRUDER.ip), str(HOST.ip)):
        assert "." in made.host.ask(address), address
    assert made.sure("one", "cat /proc/net/ipv6_route /proc/net/if_inet6 | grep -v ' lo$' || true") == "", "there is some IPv6"


def test_nobody_comes_in_unasked(made: GuestWorld) -> None:
    """Though the internet and the intruder have a route to machines' addresses."""
    address, before = made.address("one"), made.counted("one", "refusals")
    for place in (made.internet, made.intruder):
        assert place.ask(address, 80, timeout=0.5) == "timeout"
        assert place.ask_udp(address, 80, timeout=0.5) == "timeout"
    assert made.counted("one", "refusals") >= before + 4
    assert made.host.ask(address, 80).startswith("one ")
    made.set("one", publish=["9000:80"])
    assert made.intruder.ask(str(LAN.ip), 9000) == f"one {INTRUDER.ip}"
    assert made.intruder.ask(address, 80, timeout=0.5) == "timeout", "a published port is the host's address, not the machine's"


def test_policies_as_a_machine_sees_them(made: GuestWorld) -> None:
    asked = ["tcp/1.1.1.1", "udp/1.1.1.1", "tcp/8.8.8.8", f"tcp/8.8.8.8/{FOUNTAIN}", "tcp/10.1.2.3", "udp/10.1.2.3", "tcp/10.1.9.3"]
    for policy, reached in (
        ("none", ""),
        ("all", "xxxx"),
        ("deny: 8.8.8.8", "xx"),
        ("allow: 8.8.8.8:8080", "..x"),
        ("deny: 10.1.9.0/24; allow: 10.1.0.0/16:8080/tcp, 1.1.1.1/udp", ".x..x"),
        ("allow: 10.0.0.0/8", "....xxx"),
        ("allow: 0.0.0.0/0", "xxxx"),
    ):
        assert made.set("one", egress=policy)["egress"] == policy
        said = made.ask("one", *asked)
        assert [one not in CLOSED for one in said] == [letter == "x" for letter in reached.ljust(len(asked), ".")], (policy, said)
    assert made.ask("two", "tcp/1.1.1.1") == [str(HOST.ip)], "another's policy is another's"
    made.set("one", egress="none")
    done = download(made, "one", f"http://{SITE}/none")
    assert done["exit_code"] != 0 and "/none" not in made.site.served


def test_forged_packets_go_nowhere_and_are_counted(made: GuestWorld) -> None:
    """What root in a machine sends with another's address, or another's MAC."""
    far = made.internet.serve("8.8.8.8", 9053)
    gateway, mine = str(INSIDE.gateway.ip), str(INSIDE.guest.ip)
    mac = made.tool("one", "mac", gateway).strip()

    def frame(payload: str, source: str = mine, sender: str = INSIDE.guest_mac) -> str:
        return ethernet(sender, 0x0800, datagram(source, "8.8.8.8", 9053, payload.encode()), mac)

    neighbour = made.address("two")
    forged = [frame(f"from {source}", source) for source in (neighbour, made.address("one"), "9.9.9.9", "127.0.0.1", "0.0.0.0")]
    forged += [frame("another's MAC", sender="02:fc:00:00:00:99"), frame("both", neighbour, "02:fc:00:00:00:99")]
    before = made.forged("one"), made.forged("two")
    made.tool("one", "frames", frame("first"), *forged, frame("last"))
    eventually(lambda: b"last" in far.heard, "what is not forged does not come through")
    assert far.heard == [b"first", b"last"]
    assert made.forged("one") == before[0] + len(forged)
    # An answer to no question, that the gateway's address is somewhere else and that another's is here, changes nothing.
    claims = [
        ethernet(sender, 0x0806, struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2) + arp(sender, address) + arp(mac, gateway), mac)
        for sender, address in (("02:fc:00:00:00:99", mine), (INSIDE.guest_mac, neighbour), (INSIDE.guest_mac, gateway))
    ]
    made.tool("one", "frames", *claims)
    assert made.ask("one", "tcp/1.1.1.1") == made.ask("two", "tcp/1.1.1.1") == [str(HOST.ip)]
    assert made.forged("two") == before[1]


def test_published_ports(made: GuestWorld) -> None:
    made.set("one", publish=["9000:80", "9000:80/udp", "127.0.0.1:9001:80"])
    router = "5.5.5.1"
    assert made.internet.ask(str(HOST.ip), 9000) == made.internet.ask_udp(str(HOST.ip), 9000) == f"one {router}"
    assert made.internet.ask(str(HOST.ip), 9001, timeout=0.5) == "ConnectionRefusedError"
    for address in ("127.0.0.1", str(HOST.ip), str(LAN.ip)):
        assert made.host.ask(address, 9000).startswith("one "), address
        assert made.host.ask_udp(address, 9000).startswith("one "), address
    assert made.host.ask("127.0.0.1", 9001).startswith("one ")
    # It is not a way from one machine to another, nor to itself.
    assert all(said in CLOSED for said in made.ask("two", f"tcp/{HOST.ip}/9000", f"udp/{HOST.ip}/9000"))
    assert made.daemon.call("GET", "/sandboxes/one")["publish"] == ["9000:80", "9000:80/udp", "127.0.0.1:9001:80"]
    refused = made.daemon.call("PUT", "/sandboxes/two/network", 409, json={"publish": ["9000:80"]})
    assert refused["code"] == "port_published" and "9000" in refused["message"] and "one" in refused["message"]
    assert "network set one" in refused["hint"]
    assert made.daemon.call("GET", "/sandboxes/two")["publish"] == []
    refused = made.daemon.call("PUT", "/sandboxes/two/network", 409, json={"publish": ["8080:80"]})
    assert refused["code"] == "port_in_use" and "tcp 8080" in refused["message"], "a program of the host's has it"
    refused = made.daemon.call("POST", "/sandboxes", 409, json=made.request("three", publish=["127.0.0.1:8080:80/udp"]))
    assert refused["code"] == "port_in_use" and "udp 127.0.0.1:8080" in refused["message"]
    assert made.host.ask(str(HOST.ip)) == str(HOST.ip), "and keeps it"
    made.gone("three")
    for bad in ("80", "0:80", "70000:80", "9000:80/sctp", "1.2.3:9000:80"):
        refused = made.daemon.call("PUT", "/sandboxes/two/network", 400, json={"publish": [bad]})
        assert refused["code"] in ("port_invalid", "invalid_field"), refused
    with made.internet.connect(str(HOST.ip), 9000) as connection:
        assert connection.recv(100) == f"one {router}\n".encode()
        made.set("one", publish=[])
        connection.settimeout(2)
        with pytest.raises(OSError):
            connection.sendall(b"still there?")
            assert not connection.recv(100)
            raise OSError("closed")
    assert made.internet.ask(str(HOST.ip), 9000, timeout=0.5) in ("ConnectionRefusedError", "timeout")
    made.set("two", publish=["9000:80"])
    assert made.internet.ask(str(HOST.ip), 9000) == f"two {router}"


def test_a_live_edit_cuts_what_is_no_longer_allowed(made: GuestWorld) -> None:
    """Under load: two downloads that never end, and datagrams; one download may go on."""
    noise = made.internet.serve("1.1.1.1", 9054)
    made.sure("one", "rm -f /kept /cut")
    for address, file in (("8.8.8.8", "/kept"), ("1.1.1.1", "/cut")):
        made.begin("one", "drain", address, str(FOUNTAIN), file, tag="drain")
    made.begin("one", "flood", "1.1.1.1", "9054", tag="flood")

    def drained(file: str) -> tuple[int, str]:
        count, _, why = made.sure("one", f"cat {file} 2>/dev/null || echo 0").strip().partition(" ")
        return int(count), why

    eventually(lambda: min(drained("/kept")[0], drained("/cut")[0]) > 20_000 and bool(noise.heard), "nothing flows")
    before = made.counted("one")
    made.set("one", egress=f"allow: 8.8.8.8:{FOUNTAIN}")
    heard = len(noise.heard)
    eventually(lambda: bool(drained("/cut")[1]), "the download goes on")
    assert drained("/cut")[1] in ("Connection reset by peer", "No route to host"), drained("/cut")
    kept = drained("/kept")[0]
    eventually(lambda: drained("/kept")[0] > kept + 20_000, "the download that is allowed does not go on")
    assert drained("/kept")[1] == ""
    assert len(noise.heard) == heard, "datagrams of a flow that is not allowed any more"
    assert made.counted("one") > before
    for tag in ("drain", "flood"):
        made.end("one", tag)


def test_rules_for_names(made: GuestWorld) -> None:
    """A name that is allowed is looked up and reached; what is not, is neither; an edit does not cut what stays allowed."""
    made.sure("one", "rm -f /kept")
    made.set("one", egress=f"allow: *.example.org:{FOUNTAIN}, *.example.org:80")
    assert made.ask("one", "tcp/9.9.9.9", "udp/9.9.9.9")[0] in CLOSED
    done = download(made, "one", f"http://{SITE}/by-name")
    assert done["exit_code"] == 0 and "/by-name" in made.site.served, done
    assert download(made, "one", f"https://{SITE}/by-name")["exit_code"] != 0, "the port is not allowed"
    asked = len(made.names.asked)
    unknown = made.daemon.exec("one", "getent", "ahostsv4", "other.org")
    assert unknown["exit_code"] == 2 and unknown["stdout"] == "", unknown
    assert not any("other" in name for name in made.names.names()[asked:]), "a question by which data leaves"
    # Whom else it asks makes no difference.
    assert made.sure("one", "cat /etc/resolv.conf").split() == ["nameserver", "1.1.1.1"]
    made.begin("one", "drain", "8.8.8.8", str(FOUNTAIN), "/kept", tag="drain")
    size = "cat /kept 2>/dev/null || echo 0"
    eventually(lambda: int(made.sure("one", size).split()[0]) > 20_000, "the name's address is closed")
    made.set("one", egress=f"allow: *.example.org:{FOUNTAIN}, other.org")
    before = int(made.sure("one", size).split()[0])
    eventually(lambda: int(made.sure("one", size).split()[0]) > before + 20_000, "what stays allowed was cut")
    assert made.sure("one", "getent ahostsv4 other.org").split()[0] == "9.9.9.9"
    assert made.ask("one", "tcp/9.9.9.9", "tcp/8.8.8.8") == [str(HOST.ip), "No route to host"]
    made.set("one", egress="allow: other.org")
    eventually(lambda: " " in made.sure("one", "cat /kept").strip(), "the download goes on")
    made.end("one", "drain")
