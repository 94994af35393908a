"""Slots: the interface, addresses and firewall entries of one machine; made, used again, given back.

What is on the host because of a slot follows from its id (:func:`stoker.network.plan.parse_slot`), so an entry of a ledger is
enough to release it:

=========  =======================================================================  =========================================
plan       in the host's namespace                                                  in a namespace of its own
=========  =======================================================================  =========================================
run        the TAP (persistent), its address; entries of the firewall               (none)
namespace  one end of a veth pair, its address; entries of the firewall             ``tap0``, the other end, routes, a table
bridge     the TAP (persistent), a port of an operator's bridge; entries            (none)
=========  =======================================================================  =========================================

The firewall's entries come first and go last: at no moment does the machine's interface carry packets that nobody judges.
A namespace has no name. It is held by our descriptor and by the VMM's TAP, so that of a crash nothing is left but a machine that
lives on, and :meth:`Slots.adopt` finds its namespace by that. Removing a link takes the kernel 10 to 80 ms, so it is done behind:
:meth:`Slots.drop` gives a future, until which the names and addresses count as taken.

All of it happens in the namespace that :meth:`Slots.open` was called in, whichever thread calls.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Network

from stoker.errors import Conflict, HostError
from stoker.host import conntrack, netlink, tun
from stoker.host.conntrack import Connection
from stoker.host.namespaces import Namespace, own_namespace
from stoker.host.netlink import End, Link, Netlink
from stoker.host.nftables import Nftables
from stoker.host.trace import declare, trace
from stoker.network import rules
from stoker.network.bridged import Port
from stoker.network.egress import NONE
from stoker.network.firewall import Firewall
from stoker.network.host import foreign_networks
from stoker.network.ipv6 import beside, check_ipv6, open_ipv6
from stoker.network.named import Answers
from stoker.network.plan import INSIDE, BridgePlan, Foreign, NamespacePlan, RunPlan, Taken, ula
from stoker.network.ports import require_free
from stoker.network.rules import Machine

__all__ = ["Joined", "Plan", "Slot", "Slots"]

log = logging.getLogger(__name__)
Plan = RunPlan | NamespacePlan
EVERYTHING, EVERYTHING6 = IPv4Network("0.0.0.0/0"), IPv6Network("::/0")
QUEUE = 5000
"""Packets a TAP holds for a machine that does not read."""
JUDGED = {netlink.ROUTE_LOCALNET: 1}
"""Of the host's interface of a slot: answers to what the host asked from 127.0.0.1 are let in."""
PASSING = {netlink.FORWARDING: 1}
"""Of both interfaces of a machine's namespace."""
WORKERS = 16
"""Threads that remove links. They wait for the kernel, which does several at once."""
PATIENCE = 2.0
"""Seconds that a namespace without a holder gets to take its links along, before they are removed one by one."""
TELLING = 0.5
"""Seconds in which a TCP connection that is cut still hears of its other end, so that the machine answers and is told. What is not
answered ends after a window's worth of it."""
LO, TAP, OUT = 1, 2, 3
"""Numbers of the links in a namespace of ours."""
POINTS = declare(
    "slot.judged", "slot.tap", "slot.linked", "slot.inside", "slot.up", "slot.dropping", "slot.unlinked", "slot.dropped"
)


@dataclass(slots=True)
class _Held:
    """What is up. ``tap`` is for the VMM: pass it, then :meth:`let_go` of it. The namespace is kept while the slot is."""

    tap: int
    namespace: Namespace | None = None

    def let_go(self) -> None:
        """Closes our copy of the TAP. Twice is fine."""
        if self.tap >= 0:
            fd, self.tap = self.tap, -1
            os.close(fd)

    def close(self) -> None:
        """Closes every descriptor of it; what is on the host stays as far as something else holds it."""
        self.let_go()
        if self.namespace is not None:
            self.namespace.close()


@dataclass(slots=True)
class Slot(_Held):
    """A slot with addresses of ours."""

    plan: Plan = field(kw_only=True)


@dataclass(slots=True)
class Joined(_Held):
    """A slot on a bridge. After a crash ``Joined(-1, plan=...)`` is as good: nothing else of it is held."""

    plan: BridgePlan = field(kw_only=True)


def _networks(plans: Iterable[Plan | BridgePlan]) -> list[IPv4Network]:
    return [plan.network for plan in plans if not isinstance(plan, BridgePlan)]


class Slots:
    """Makes and removes slots. Made by :meth:`open`; safe to use from any thread."""

    def __init__(self, firewall: Firewall, home: Namespace, link: Netlink) -> None:
        self.firewall = firewall
        self._home, self._link = home, link
        self._behind = ThreadPoolExecutor(WORKERS, thread_name_prefix="slots")
        self._leaving: dict[str, tuple[Plan | BridgePlan, Future[None]]] = {}
        self._lock = threading.Lock()
        self._stale: set[IPv4Address | IPv6Address] = set()
        self._walking = threading.Lock()

    @classmethod
    def open(cls, firewall: Firewall) -> Slots:
        """In the namespace of the calling thread, which is that of the firewall."""
        with ExitStack() as undo:
            home = undo.enter_context(Namespace(own_namespace()))
            link = undo.enter_context(Netlink())
            undo.pop_all()
        return cls(firewall, home, link)

    def close(self) -> None:
        """Waits for what is being removed. Slots that are up stay."""
        self._behind.shutdown(wait=True)
        self._link.close()
        self._home.close()

    def __enter__(self) -> Slots:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def foreign(self, besides: Collection[str] = ()) -> list[Foreign]:
        """See :func:`.host.foreign_networks`."""
        return foreign_networks(self._link, besides)

    def taken(self, plans: Iterable[Plan | BridgePlan] = ()) -> Taken:
        """What new slots must keep clear of: what is on the host, ``plans`` that are promised, and what is being removed."""
        with self._lock:
            known = [*plans, *(plan for plan, _ in self._leaving.values())]
        names = {link.name for link in self._link.links()} | {plan.interface for plan in known}
        return Taken(names, [*(found.network for found in self.foreign()), *_networks(known)])

    def up(self, plan: Plan, machine: Machine, *, owner: int | None = None, mtu: int = 0) -> Slot:
        """Makes a slot. ``owner``: the user who may open the TAP besides root. ``mtu`` 0: the kernel's. ``machine.ipv6``: with IPv6
        addresses; that cannot be changed while it is up.

        Undone in order when a step fails. Errors: ``tap_exists``, ``link_exists``, ``port_published``, ``port_in_use``,
        ``ipv6_unavailable``, ``network_unprepared``, and what the parts raise.
        """
        if machine.ipv6:
            self._home.run(check_ipv6)
        if (machine.interface, machine.mac, machine.address) != (plan.interface, plan.source_mac, plan.address):
            raise ValueError("the machine is not the plan's")
        self._check_free(plan)
        self._require_free(machine)
        with ExitStack() as undo:
            self.firewall.put(machine)
            undo.callback(self.firewall.remove, machine.interface)
            trace("slot.judged")
            if isinstance(plan, RunPlan):
                slot = Slot(self._home.run(lambda: self._run_up(plan, machine.ipv6, owner, mtu)), plan=plan)
            else:
                slot = self._namespace_up(plan, machine.ipv6, owner, mtu)
            undo.pop_all()
        trace("slot.up")
        return slot

    def _check_free(self, plan: Plan | BridgePlan) -> None:
        if plan.interface in self.firewall.interfaces or plan.interface in self._leaving:
            raise Conflict("slot_taken", f"the slot of {plan.interface} is in use", "stoker fsck")

    def join(self, plan: BridgePlan, port: Port, *, owner: int | None = None) -> Joined:
        """Makes a slot on a bridge, which has to be there; it is as large a packet as the bridge takes.

        Undone in order when a step fails. Errors: ``bridge_unknown``, ``tap_exists``, and what the parts raise.
        """
        if (port.interface, port.mac) != (plan.interface, plan.mac):
            raise ValueError("the machine is not the plan's")
        self._check_free(plan)
        bridge = self._link.link(plan.bridge)
        if bridge is None or bridge.kind != "bridge":
            why = "there is no such interface" if bridge is None else f"it is {bridge.kind or 'hardware'}"
            raise HostError("bridge_unknown", f"{plan.bridge} is no bridge of this host: {why}", "ip -brief link show type bridge")
        with ExitStack() as undo:
            self.firewall.put(port)
            undo.callback(self.firewall.remove, port.interface)
            trace("slot.judged")
            tap = self._home.run(lambda: self._join(plan, bridge, owner))
            undo.pop_all()
        trace("slot.up")
        return Joined(tap, plan=plan)

    @staticmethod
    def rejoin(plan: BridgePlan) -> Joined:
        """One that outlived its daemon."""
        return Joined(-1, plan=plan)

    def _join(self, plan: BridgePlan, bridge: Link, owner: int | None) -> int:
        """The TAP; runs in the host's namespace."""
        with ExitStack() as undo:
            tap = tun.open_tap(plan.tap, create=True, persistent=True, owner=owner)
            undo.callback(self._link.delete, plan.tap)
            undo.callback(os.close, tap)
            trace("slot.tap")
            index = self._link.index(plan.tap)
            if index is None:
                raise HostError("tap_unknown", f"the TAP {plan.tap} went away", "does something else remove TAPs?")
            self._link.apply(
                netlink.set_link(index, plan.tap, mac=plan.tap_mac, mtu=bridge.mtu, queue=QUEUE, settings={}),
                netlink.set_link(index, f"{plan.tap} as a port of {plan.bridge}", master=bridge.index),
                netlink.guard_port(index, plan.tap),
                netlink.set_link(index, plan.tap, up=True),
            )
            trace("slot.linked")
            undo.pop_all()
        return tap

    def _run_up(self, plan: RunPlan, ipv6: bool, owner: int | None, mtu: int) -> int:
        """The TAP; runs in the host's namespace."""
        with ExitStack() as undo:
            tap = tun.open_tap(plan.tap, create=True, persistent=True, owner=owner)
            undo.callback(self._link.delete, plan.tap)
            undo.callback(os.close, tap)
            trace("slot.tap")
            index = self._link.index(plan.tap)
            if index is None:
                raise HostError("tap_unknown", f"the TAP {plan.tap} went away", "does something else remove TAPs?")
            own, more = IPv4Interface((plan.host, 30)), []
            if ipv6:
                open_ipv6(plan.tap)
                more = beside(index, own, plan.guest, plan.mac, plan.tap)
            self._link.apply(
                netlink.set_link(index, plan.tap, mac=plan.tap_mac, mtu=mtu, queue=QUEUE, settings=JUDGED),
                netlink.set_link(index, plan.tap, up=True),
                netlink.add_address(index, own, plan.tap),
                *more,
            )
            trace("slot.linked")
            undo.pop_all()
        return tap

    def _namespace_up(self, plan: NamespacePlan, ipv6: bool, owner: int | None, mtu: int) -> Slot:
        namespace, tap = Namespace.create(lambda _: self._inside_up(plan, ipv6, owner, mtu))
        trace("slot.linked")
        return Slot(tap, namespace, plan=plan)

    def _inside_up(self, plan: NamespacePlan, ipv6: bool, owner: int | None, mtu: int) -> int:
        """What is in the machine's namespace; runs there. A failure takes the namespace along."""
        guest = INSIDE
        tap = tun.open_tap(guest.tap, create=True, persistent=True, owner=owner, index=TAP)
        with ExitStack() as undo, Netlink() as link, Nftables() as nft:
            undo.callback(os.close, tap)
            trace("slot.tap")
            nft.apply(rules.inside(plan.host, guest, ipv6=ipv6))
            here, there = End(guest.out, plan.source_mac, OUT), End(plan.veth, plan.veth_mac)
            out, more = IPv4Interface((plan.address, 31)), []
            pair = [netlink.add_veth(here, there, self._home.fd, mtu=mtu)]
            if ipv6:
                link.apply(pair.pop())  # it is there before it is opened
                open_ipv6(guest.tap, guest.out, forward=True)
                more = [
                    *beside(TAP, guest.gateway, guest.guest.ip, guest.guest_mac, guest.tap),
                    *beside(OUT, out, plan.host, plan.veth_mac, guest.out),
                    netlink.add_route(EVERYTHING6, gateway=ula(plan.host)),
                ]
            link.apply(
                *pair,
                netlink.set_link(LO, "lo", up=True),
                netlink.set_link(TAP, guest.tap, mac=guest.tap_mac, mtu=mtu, queue=QUEUE, settings=PASSING),
                netlink.set_link(OUT, guest.out, settings=PASSING),
                netlink.set_link(TAP, guest.tap, up=True),
                netlink.set_link(OUT, guest.out, up=True),
                netlink.add_address(TAP, guest.gateway, guest.tap),
                netlink.add_address(OUT, out, guest.out),
                netlink.add_route(EVERYTHING, gateway=plan.host),
                *more,
            )
            trace("slot.inside")
            self._outside_up(plan, ipv6)
            link.apply(netlink.settle_link(OUT, guest.out))
            undo.pop_all()
        return tap

    def _outside_up(self, plan: NamespacePlan, ipv6: bool) -> None:
        """The host's end of the pair; runs anywhere."""
        index = self._link.index(plan.veth)
        if index is None:
            raise HostError("link_unknown", f"the interface {plan.veth} went away", "does something else remove interfaces?")
        own, more = IPv4Interface((plan.host, 31)), []
        if ipv6:
            self._home.run(lambda: open_ipv6(plan.veth))
            more = beside(index, own, plan.address, plan.source_mac, plan.veth)
        self._link.apply(
            netlink.set_link(index, plan.veth, settings=JUDGED),
            netlink.set_link(index, plan.veth, up=True),
            netlink.add_address(index, own, plan.veth),
            *more,
        )

    def change(self, machine: Machine, names: Answers | None = None) -> Future[None]:
        """Another policy, other ports, other peers for a machine that is up. What it sends is judged anew at once; the future is
        done when nothing comes in any more over connections that it may not have. ``names``: :meth:`.Resolver.known`. Raises what
        :meth:`Firewall.put` does, and ``port_in_use``."""
        self._require_free(machine)
        self.firewall.put(machine, names)

        own = {machine.address, machine.address6}
        peers = {*machine.peers, *map(ula, machine.peers)}

        def unwanted(one: Connection) -> bool:
            if one.source not in own or one.destination in peers:
                return False
            return machine.egress.allows(one.destination, one.protocol, one.port) is False

        def cut() -> None:
            # Who only listens is told when it answers to what comes in: for a moment more, that does.
            if any(one.protocol == socket.IPPROTO_TCP and unwanted(one) for one in self._home.run(conntrack.connections)):
                self._home.run(lambda: conntrack.forget(lambda one: one.protocol != socket.IPPROTO_TCP and unwanted(one)))
                time.sleep(TELLING)
            self._home.run(lambda: conntrack.forget(unwanted))

        return self._behind.submit(cut)

    def _require_free(self, machine: Machine) -> None:
        """The ports it publishes anew are no program's of the host. Raises ``port_in_use``."""
        if fresh := self.firewall.fresh(machine):
            self._home.run(lambda: require_free(fresh))

    def park(self, slot: Slot) -> Future[Slot]:
        """Takes a slot from a machine that has ended, for :meth:`reuse`: closed in both directions at once, its connections
        forgotten behind. The future is done when it may be used again."""
        slot.let_go()
        plan = slot.plan
        self.firewall.put(Machine(plan.interface, plan.source_mac, plan.address, NONE))

        def clean() -> Slot:
            if slot.namespace is not None:
                slot.namespace.run(conntrack.forget_all)
            self._forget(plan)
            return slot

        return self._behind.submit(clean)

    def reuse(self, slot: Slot, machine: Machine) -> Slot:
        """Gives a parked slot to a machine. Its plan stays. Errors: ``tap_busy``, ``port_published``, HostError."""
        self._require_free(machine)
        opened = partial(tun.open_tap, slot.plan.tap if isinstance(slot.plan, RunPlan) else INSIDE.tap, create=False)
        tap = (slot.namespace or self._home).run(opened)
        try:
            self.firewall.put(machine)
        except BaseException:
            os.close(tap)
            raise
        slot.tap = tap
        return slot

    def adopt(self, plan: Plan, vmm_tap: int | None) -> Slot:
        """A slot that outlived its daemon. ``vmm_tap``: a copy of the VMM's descriptor (``pidfd_getfd``), which stays the caller's;
        it leads to the namespace."""
        if isinstance(plan, RunPlan) or vmm_tap is None:
            return Slot(-1, plan=plan)
        return Slot(-1, Namespace.of_tap(vmm_tap), plan=plan)

    def drop(self, plan: Plan | BridgePlan, slot: Slot | Joined | None = None) -> Future[None]:
        """Removes a slot by what its plan says, whatever of it is there; twice is fine. The VMM has ended.

        Returns when the slot is given back; the future is done when nothing of it is left. Until then :meth:`taken` counts it.
        """
        trace("slot.dropping")
        whole = slot is not None and slot.namespace is not None
        if slot is not None:
            slot.close()
        with self._lock:
            if plan.interface in self._leaving:
                return self._leaving[plan.interface][1]
            future = self._behind.submit(self._finish, plan, whole)
            self._leaving[plan.interface] = (plan, future)
            return future

    def _finish(self, plan: Plan | BridgePlan, whole: bool) -> None:
        """``whole``: the interface's namespace was let go of, and goes with it."""
        try:
            # A socket of its own: on the common one, others would wait for the kernel as long as we do.
            with self._home.run(Netlink) as link:
                deadline = time.monotonic() + PATIENCE
                while whole and link.index(plan.interface) is not None and time.monotonic() < deadline:
                    time.sleep(0.01)
                link.delete(plan.interface)
            trace("slot.unlinked")
            self.firewall.remove(plan.interface)
            if not isinstance(plan, BridgePlan):
                self._forget(plan)
            trace("slot.dropped")
        finally:
            with self._lock:
                self._leaving.pop(plan.interface, None)

    def _forget(self, plan: Plan) -> None:
        """Forgets the connections of a slot's address; of all slots that wait for that in one walk."""
        with self._lock:
            self._stale |= {plan.address, ula(plan.address)}
        with self._walking:
            with self._lock:
                if plan.address not in self._stale:
                    return  # somebody took it along
                addresses, self._stale = self._stale, set()
            try:
                self._home.run(
                    lambda: conntrack.forget(lambda one: not addresses.isdisjoint({one.source, one.destination, one.answering}))
                )
            except HostError as error:
                log.warning("%s", error)  # what is left ends by itself
