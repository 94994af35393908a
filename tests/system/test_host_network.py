"""The kernel's network facilities: each call acts in the namespace that its socket was opened in, whichever thread makes it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import pytest

from leaks import wait_gone
from stoker.errors import HostError, StokerError
from stoker.host import conntrack, netlink, tun
from stoker.host.namespaces import Namespace, own_namespace
from stoker.host.netlink import End, Netlink
from stoker.host.nftables import Nftables

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


@pytest.fixture
def one() -> Iterator[Namespace]:
    """A namespace. The test may not have changed the host's: its links and this thread's namespace are compared."""
    links, mine = socket.if_nameindex(), os.readlink("/proc/thread-self/ns/net")
    with Namespace.create(lambda _: None)[0] as made:
        yield made
    assert os.readlink("/proc/thread-self/ns/net") == mine
    assert wait_gone(lambda: [str(link) for link in set(socket.if_nameindex()) - set(links)]) == []


def in_another_thread(work: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert not failed, failed


def test_a_socket_acts_where_it_was_opened(one: Namespace) -> None:
    link, nft = one.run(Netlink), one.run(Nftables)
    with link, nft:

        def change() -> None:
            link.apply(netlink.set_link(1, "lo", up=True), netlink.add_address(1, IPv4Interface("9.8.7.6/32"), "lo"))
            nft.apply(["add table inet here", "add set inet here s { type ipv4_addr; }", "add element inet here s { 1.2.3.4 }"])

        before = Path("/proc/thread-self/net/fib_trie").read_text()
        in_another_thread(change)
        assert [str(found.interface) for found in link.addresses()] == ["127.0.0.1/8", "9.8.7.6/32"]
        assert link.links()[0].up and [found.name for found in link.links()] == ["lo"]
        assert "9.8.7.6" in one.run(lambda: Path("/proc/thread-self/net/fib_trie").read_text())
        assert nft.query("list set inet here s")[0]["set"]["elem"] == ["1.2.3.4"]
        assert Path("/proc/thread-self/net/fib_trie").read_text() == before
        with Nftables() as mine:
            assert all(row["table"]["name"] != "here" for row in mine.query("list tables"))
        assert link.index("lo") == 1 and link.index("nothing0") is None


def test_a_thread_is_inside_and_the_caller_is_not(one: Namespace) -> None:
    inside = one.run(lambda: os.stat("/proc/thread-self/ns/net").st_ino)
    assert inside == one.identity[1] != os.stat("/proc/thread-self/ns/net").st_ino
    with pytest.raises(KeyError, match="as it was raised"):
        one.run(lambda: {}["as it was raised"])


def test_a_failed_making_leaves_no_namespace() -> None:
    seen: list[int] = []

    def fail(namespace: Namespace) -> None:
        seen.append(namespace.fd)
        raise LookupError("within")

    with pytest.raises(LookupError):
        Namespace.create(fail)
    with pytest.raises(OSError):
        os.fstat(seen[0])


def test_a_pair_between_two_and_what_goes_with_one(one: Namespace) -> None:
    with Namespace.create(lambda _: None)[0] as two, two.run(Netlink) as outside:
        with one.run(Netlink) as inside:
            here, there = End("eth0", "02:00:00:00:00:01", 7), End("peer0", "02:00:00:00:00:02")
            inside.apply(netlink.add_veth(here, there, two.fd, mtu=1400))
            found = {link.name: link for link in (*inside.links(), *outside.links()) if link.kind == "veth"}
            assert (found["eth0"].index, found["eth0"].mac, found["peer0"].mac) == (7, here.mac, there.mac)
            assert found["eth0"].mtu == found["peer0"].mtu == 1400 and not found["eth0"].up and not found["peer0"].up
            inside.apply(netlink.set_link(7, "eth0", settings={netlink.ROUTE_LOCALNET: 1}), netlink.set_link(7, "eth0", up=True))
            assert one.run(lambda: Path("/proc/sys/net/ipv4/conf/eth0/route_localnet").read_text()) == "1\n"
            outside.apply(netlink.set_link(outside.index("peer0") or 0, "peer0", up=True))
            assert "eth0" not in one.run(lambda: Path("/proc/thread-self/net/if_inet6").read_text()), "no IPv6 address of its own"
            with pytest.raises(HostError, match="eth0") as caught:
                inside.apply(netlink.add_veth(here, End("peer1", there.mac), two.fd))
            assert caught.value.code == "link_exists"
            with pytest.raises(HostError) as caught:
                inside.apply(netlink.add_address(99, IPv4Interface("1.1.1.1/32"), "nothing"))
            assert caught.value.code == "link_unknown"
            inside.apply(
                netlink.add_address(7, IPv4Interface("10.9.0.1/24"), "eth0"),
                netlink.add_route(IPv4Network("0.0.0.0/0"), gateway=IPv4Address("10.9.0.2")),
                netlink.add_route(IPv4Network("10.8.0.0/16"), index=7),
            )
            (best,) = netlink.uplinks(inside.routes())
            assert (str(best.gateway), best.index) == ("10.9.0.2", 7)
            assert "10.8.0.0/16" in {str(route.destination) for route in inside.routes()}
            inside.apply(netlink.delete_route(IPv4Network("10.8.0.0/16"), index=7))
            assert "10.8.0.0/16" not in {str(route.destination) for route in inside.routes()}
        one.close()
        assert wait_gone(lambda: [link.name for link in outside.links() if link.name == "peer0"]) == []
        assert not outside.delete("peer0")


def test_requests_in_one_call_and_the_first_error(one: Namespace) -> None:
    with one.run(Netlink) as link:
        many = [netlink.add_address(1, IPv4Interface(f"10.0.{number // 250}.{number % 250}/32"), "lo") for number in range(400)]
        link.apply(*many)
        assert len(link.addresses()) == 400
        with pytest.raises(HostError, match="10.0.0.7/32"):
            link.apply(netlink.add_address(1, IPv4Interface("10.7.0.1/32"), "lo"), many[7], many[8])
        assert any(str(found.interface.ip) == "10.7.0.1" for found in link.addresses())


def test_taps(one: Namespace) -> None:
    fd = one.run(lambda: tun.open_tap("tap7", create=True, persistent=True, index=9, owner=1234))
    with one.run(Netlink) as link:
        assert tun.tap_name(fd) == "tap7" and link.index("tap7") == 9
        for create, code in ((True, "tap_exists"), (False, "tap_busy")):
            with pytest.raises(StokerError) as caught:
                one.run(lambda create=create: tun.open_tap("tap7", create=create))  # type: ignore[misc]
            assert caught.value.code == code
        with Namespace.of_tap(fd) as found:
            assert found.identity == one.identity
        os.close(fd)
        assert link.index("tap7") == 9, "it is persistent"
        os.close(one.run(lambda: tun.open_tap("tap7", create=False)))
        assert link.delete("tap7") and not link.delete("tap7")
        with pytest.raises(StokerError) as caught:
            one.run(lambda: tun.open_tap("tap7", create=False))
        assert caught.value.code == "tap_unknown"
        os.close(one.run(lambda: tun.open_tap("tap8", create=True)))
        assert link.index("tap8") is None, "it is not persistent"


def test_a_tap_keeps_its_namespace(one: Namespace) -> None:
    """What a machine that outlives its daemon stands on."""
    fd = one.run(lambda: tun.open_tap("tap0", create=True))
    identity = one.identity
    one.close()
    with Namespace.of_tap(fd) as found:
        assert found.identity == identity
        assert "tap0" in found.run(lambda: {name for _, name in socket.if_nameindex()})
    os.close(fd)


def test_a_transaction_is_all_or_nothing_and_says_the_line(one: Namespace) -> None:
    with one.run(Nftables) as nft:
        nft.apply(["add table inet t", "add set inet t s { type ipv4_addr; }"])
        for commands, line, code in (
            (["add element inet t s { 1.1.1.1 }", "add element inet t none { 2.2.2.2 }"], 1, "nftables_unknown"),
            (["add element inet t s { 1.1.1.1 }", "delete element inet t s { 2.2.2.2 }"], 1, "nftables_unknown"),
            (["add element inet t s { 1.1.1.1 }", "add chain inet t c", "create table inet t"], 2, "nftables_exists"),
            (["add chain inet t c", "add rule inet t c frobnicate", "add chain inet t d"], 1, "nftables_refused"),
        ):
            with pytest.raises(HostError) as caught:
                nft.apply(commands)
            assert (caught.value.code, caught.value.details.get("line")) == (code, commands[line])
        assert "elem" not in nft.query("list set inet t s")[0]["set"]
        assert not any("chain" in row for row in nft.query("list ruleset"))
        with pytest.raises(ValueError):
            nft.apply(["add table inet\nx"])
    with pytest.raises(HostError, match="closed"):
        nft.query("list ruleset")


WANTED = ("10.0.0.3", "10.0.0.3", 17, 9)


def test_connections_of_one_address_are_forgotten(one: Namespace) -> None:
    def open_now() -> set[str]:
        return {str(one.source) for one in conntrack.connections()}

    def talk() -> None:
        with Netlink() as link:
            link.apply(
                netlink.set_link(1, "lo", up=True),
                *(netlink.add_address(1, IPv4Interface(f"10.0.0.{n}/32"), "lo") for n in (1, 2, 3)),
            )
        with Nftables() as nft:
            nft.apply(
                ["add table ip t", "add chain ip t c { type filter hook input priority 0; }", "add rule ip t c ct state new accept"]
            )
        for source in ("10.0.0.1", "10.0.0.2"):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(ConnectionRefusedError):
                sock.bind((source, 0))
                sock.sendto(b"x", ("10.0.0.3", 9))
        assert {"10.0.0.1", "10.0.0.2"} <= open_now()
        assert conntrack.forget(lambda one: str(one.source) == "10.0.0.1") >= 1
        assert "10.0.0.1" not in open_now() and "10.0.0.2" in open_now()
        assert conntrack.forget(lambda one: (str(one.destination), str(one.answering), one.protocol, one.port) == WANTED) >= 1, (
            "those that led to it"
        )
        assert "10.0.0.2" not in open_now()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("10.0.0.2", 0))
            sock.sendto(b"x", ("10.0.0.3", 9))
        conntrack.forget_all()
        assert open_now() == set()

    one.run(talk)


def test_own_namespace_is_a_descriptor_of_it() -> None:
    with Namespace(own_namespace()) as mine:
        assert mine.identity[1] == os.stat("/proc/thread-self/ns/net").st_ino
        assert mine.run(lambda: os.stat("/proc/thread-self/ns/net").st_ino) == mine.identity[1]
