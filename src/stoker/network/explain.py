"""Why a machine reaches a port, or does not: facts in, steps out, in the order in which a packet meets what decides. Pure.

Where the facts come from does not matter here (:mod:`.looking` has the host's, the engine the guest's). A fact that could not be
had makes a step ``unknown``; a step fails only over what really stands against this one connection, so a host that is strict in
general, and lets this through, passes. The first step that fails is the cause; those behind it may follow from it.
"""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from stoker.api.network import Verdict
from stoker.errors import StokerError
from stoker.host.netlink import Way
from stoker.network.dns_wire import Rcode
from stoker.network.egress import NUMBERS, SPECIAL, Egress, Protocol, parse_egress
from stoker.network.facts import Facts, Host, Looked, Outcome, Probe

__all__ = ["Step", "judge", "wider"]

CHECK: Final = "stoker network check --fix"
ANEW: Final = "The daemon makes its tables anew within some seconds; ask again then"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that decides. ``mend``: the command that mends it; empty where there is none, or nothing to mend."""

    name: str
    verdict: Verdict
    says: str
    mend: str = ""


def judge(facts: Facts) -> list[Step]:
    """Every step that there is on this way."""
    steps = [_route(facts)]
    if facts.target.literal is None:
        steps += [_resolver(facts), _name(facts)]
    steps.append(_policy(facts))
    if facts.address is None:
        return [*steps, Step("connection", Verdict.UNKNOWN, "there is no address to connect to")]
    if facts.host is None:
        return [*steps, Step("host", Verdict.UNKNOWN, "the host was not looked at in time")]
    return [*steps, *_on_the_host(facts, facts.host)]


def _step(name: str, says: str, *, ok: bool | None = True, mend: str = "") -> Step:
    verdict = Verdict.UNKNOWN if ok is None else Verdict.PASS if ok else Verdict.FAIL
    return Step(name, verdict, says, "" if ok else mend)


def _route(facts: Facts) -> Step:
    routes, name = facts.guest.routes, "guest route"
    if routes is None:
        return _step(name, "the guest did not say what routes it has", ok=None)
    mend = f"stoker exec {facts.label} -- ip route add default via {facts.gateway} dev eth0"
    if facts.address is None:
        if any(route.network.prefixlen == 0 for route in routes):
            return _step(name, "there is a default route in the guest")
        return _step(name, "the guest has no default route", ok=False, mend=mend)
    found = next((route for route in routes if facts.address in route.network), None)
    if found is None:
        return _step(name, f"the guest has no route to {facts.address}", ok=False, mend=mend)
    via = f"via {found.gateway}" if found.gateway else "directly"
    strange = found.gateway not in (facts.gateway, None) and found.interface == "eth0"
    if strange and not (facts.probe is not None and facts.probe.works):
        return _step(
            name,
            f"the guest sends {facts.address} {via} ({found.interface}), and its gateway is {facts.gateway}",
            ok=False,
            mend=f"stoker exec {facts.label} -- ip route replace {found.network} via {facts.gateway} dev eth0",
        )
    return _step(name, f"the guest sends {facts.address} {via} by {found.interface}")


def _resolver(facts: Facts) -> Step:
    name, ours = "guest resolver", facts.machine.resolver is not None
    if facts.looked is not None and facts.looked.by == "hosts":
        return _step(name, f"{facts.target.host} is in the guest's /etc/hosts: nobody is asked")
    servers = facts.guest.nameservers
    write = f"stoker exec {facts.label} -- sh -c 'echo nameserver {{}} >/etc/resolv.conf'"
    if servers is None:
        return _step(name, "the guest's /etc/resolv.conf could not be read", ok=None)
    if not servers:
        mend = write.format("1.1.1.1")
        return _step(name, "the guest's /etc/resolv.conf names no resolver of IPv4", ok=False, mend=mend)
    led = ", and is led to our resolver" if ours and not servers[0].is_loopback else ""
    return _step(name, f"the guest asks {servers[0]}{led}")


def _name(facts: Facts) -> Step:
    looked, egress, host = facts.looked, facts.machine.egress, facts.target.host
    if looked is None:
        return _step("name", f"{host} was not looked up", ok=None)
    if looked.addresses:
        found = ", ".join(str(address) for address in looked.addresses[:4]) + (" ..." if len(looked.addresses) > 4 else "")
        if looked.by == "host":
            why = f" (asked by the host in its stead: {looked.problem})"
            return _step("name", f"{host} is {found} to {looked.server}{why}", ok=None)
        return _step("name", f"{host} is {found}" + (f", {looked.server} says" if looked.server else ", by /etc/hosts"))
    if looked.ours and not egress.look_up(host):
        position = egress.looking_up(host)
        says = "no rule of the policy allows it" if position is None else _rule_words(egress, position)
        return _step("name", f"our resolver does not answer for {host}: {says}", ok=False, mend=_allow(facts, host))
    if looked.rcode is None:
        server = looked.server or "a resolver"
        return _step("name", f"{server} did not answer: {looked.problem}", ok=False, mend=_resolver_mend(facts, looked))
    said = {Rcode.NXDOMAIN: "says there is no such name", Rcode.NOERROR: "has no IPv4 address for it that may be used"}
    says = said.get(Rcode(looked.rcode), "fails") if looked.rcode in set(Rcode) else f"answers with code {looked.rcode}"
    return _step("name", f"{host}: {looked.server} {says}", ok=False)


def _resolver_mend(facts: Facts, looked: Looked) -> str:
    """Of a resolver that did not answer."""
    if looked.ours or not looked.server:
        return "cat /etc/resolv.conf    # the host's own resolvers" if looked.ours else ""
    address = IPv4Address(looked.server)
    open_to_it = [facts.machine.egress.allows(address, NUMBERS[one], 53) for one in (Protocol.UDP, Protocol.TCP)]
    return "" if any(open_to_it) else _set(facts, wider(facts.machine.egress, f"{address}:53"))


def _rule_words(egress: Egress, position: int) -> str:
    rule = egress.rules[position]
    return f"rule {position + 1} of the policy, `{'allow' if rule.allow else 'deny'}: {rule}`"


def _set(facts: Facts, egress: str) -> str:
    return f"stoker network set {facts.label} --egress {shlex.quote(egress)}" if egress else ""


def wider(egress: Egress, rule: str) -> str:
    """The policy that has this before everything else; empty where there is no such policy."""
    rest = "" if not egress.rules else f"; {egress}"
    if egress.rest:
        rest += "; allow: public"
    try:
        return str(parse_egress(f"allow: {rule}{rest}"))
    except StokerError:
        return ""


def _allow(facts: Facts, host: str) -> str:
    target = facts.target
    return _set(facts, wider(facts.machine.egress, f"{host}:{target.port}/{target.protocol}"))


def _policy(facts: Facts) -> Step:
    target, address, host, egress = facts.target, facts.address, facts.host, facts.machine.egress
    if address is None:
        return _step("policy", f"the policy is `{egress}`", ok=None)
    about = f"{address}:{target.port}/{target.protocol}"
    if facts.machine.resolver is not None and target.port == 53:
        return _step("policy", "questions for names go to our resolver, whomever it asks")
    if host is not None and isinstance(host.way, Way) and host.way.local:
        mend = f"stoker network set {facts.label} --host-access"
        return _step("policy", f"{address} is the host itself", ok=facts.machine.host_access, mend=mend)
    special = any(address in network for network in SPECIAL)
    if host is not None and host.private and not special:
        return _step("policy", f"{address} is in a network of the operator's (setting private_networks)", ok=False)
    named = host.named if host is not None else frozenset()
    position = egress.deciding(address, NUMBERS[target.protocol], target.port, named.__contains__)
    mend = _allow(facts, _open(facts, special))
    if position is not None:
        rule = egress.rules[position]
        verb = "allows" if rule.allow else "denies"
        if egress.learn and not rule.allow and not special:
            return _step("policy", f"{_rule_words(egress, position)}, denies {about}; it learns: that is let through")
        return _step("policy", f"{_rule_words(egress, position)}, {verb} {about}", ok=rule.allow, mend=mend)
    if (egress.rest or egress.learn) and not special:
        what = "allows those" if egress.rest else "learns: what it denies of those is let through"
        return _step("policy", f"{about} is a public address, and the policy (`{egress}`) {what}")
    why = "no rule allows it"
    if special:
        why = "it is in a private or special network, which only a rule of its own opens"
    elif target.literal is None and egress.naming(target.host):
        why, mend = "its name is allowed, but our resolver has not answered with this address, or too long ago", ""
    return _step("policy", f"the policy (`{egress}`) denies {about}: {why}", ok=False, mend=mend)


def _open(facts: Facts, special: bool) -> str:
    """What a rule has to name: a name does not open a private network, and is of use only where our resolver is asked."""
    by_name = facts.target.literal is None and not special
    return facts.target.host if by_name else str(facts.address)


def _on_the_host(facts: Facts, host: Host) -> Iterator[Step]:
    probe = facts.probe
    arrived = probe is not None and (probe.counted.sent > 0 or probe.works)
    yield _slot(facts, host, arrived)
    yield _firewall(facts, host)
    yield from _host_ways(facts, host)
    if probe is None:
        why = "nothing is sent to a UDP port to try it" if facts.target.protocol is Protocol.UDP else "the guest could not try it"
        yield _step("connection", why, ok=None)
        return
    if facts.machine.connections or facts.machine.rate_in or facts.machine.rate_out:
        yield _limits(facts, probe)
    yield _others(facts, host, probe, arrived)
    yield _translation(facts, host, probe)
    yield _way_back(facts, host, probe)
    yield _answer(facts, host, probe)


def _slot(facts: Facts, host: Host, arrived: bool) -> Step:
    again = f"stoker stop {facts.label} && stoker start {facts.label}"
    if host.slot and not arrived:
        return _step("interface", host.slot, ok=False, mend=again)
    probe, name = facts.probe, facts.machine.interface
    if probe is not None and not arrived and facts.guest.routes and any(facts.address in one.network for one in facts.guest.routes):
        return _step("interface", f"nothing that the machine sent came out of {name}", ok=False, mend=again)
    seen = f", {probe.counted.sent} packets of the machine came by" if probe is not None and arrived else ""
    return _step("interface", f"{name} is up{seen}", ok=None if probe is not None and not arrived else True)


def _firewall(facts: Facts, host: Host) -> Step:
    name, probe = "firewall", facts.probe
    if host.missing:
        more = f" and {len(host.missing) - 1} more" if len(host.missing) > 1 else ""
        says = f"of the machine's entries in our tables there is no `{host.missing[0]}`{more}: somebody changed them. {ANEW}"
        return _step(name, says, ok=False)
    if host.neighbour and facts.address not in facts.machine.peers:
        says = f"{facts.address} is another machine, to which a machine may not connect, whatever its policy"
        return _step(name, says, ok=False)
    if probe is None:
        return _step(name, "the machine's entries are in our tables", ok=True)
    if probe.counted.denied and not probe.works:
        return _step(name, f"{probe.counted.denied} packets were counted as denied", ok=False, mend="")
    return _step(name, "the machine's entries are in our tables, and nothing was denied")


def _host_ways(facts: Facts, host: Host) -> Iterator[Step]:
    """Forwarding, reverse path, uplink: what the kernel says it would do with such a packet."""
    way, reverse, interface = host.way, host.reverse, facts.machine.interface
    if not host.forwards:
        yield _step("forwarding", "the host does not forward packets (net.ipv4.ip_forward is 0)", ok=False, mend=CHECK)
    elif way == errno.EHOSTUNREACH:
        mend = f"sysctl -w net.ipv4.conf.{interface}.forwarding=1"
        yield _step("forwarding", f"the host does not forward what comes in by {interface}", ok=False, mend=mend)
    else:
        yield _step("forwarding", "the host forwards packets")
    strict = interface if way == errno.EXDEV else host.out if reverse in (errno.EXDEV, errno.EINVAL) else ""
    probe = facts.probe
    if strict and not (probe is not None and probe.works):
        says = f"the kernel drops what comes in by {strict}, since it would answer by another interface (rp_filter)"
        mend = f"sysctl -w net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.{strict}.rp_filter=0"
        yield _step("reverse path", says, ok=False, mend=mend)
    elif probe is not None and probe.filtered > 0 and not probe.works:
        says = f"the kernel dropped {probe.filtered} packets meanwhile, since it would answer by another interface (rp_filter)"
        yield _step("reverse path", says, ok=False, mend=CHECK)
    else:
        yield _step("reverse path", "no packet of this connection is dropped for where it comes from (rp_filter)")
    if isinstance(way, Way):
        via = f" via {way.gateway}" if way.gateway else ""
        out = "it is an address of the host's own" if way.local else f"the host sends it out by {host.out}{via}"
        yield _step("uplink", out)
    elif way in (errno.EACCES, errno.EINVAL):
        says = f"a route of the host's forbids {facts.address} ({os.strerror(way)})"
        yield _step("uplink", says, ok=False, mend=f"ip route get {facts.address}")
    elif way == errno.ENETUNREACH:
        mend = "ip route add default via ROUTER dev INTERFACE"
        yield _step("uplink", f"the host has no route to {facts.address}", ok=False, mend=mend)
    else:
        yield _step("uplink", f"the kernel does not say how it would send it ({os.strerror(way)})", ok=None)


def _limits(facts: Facts, probe: Probe) -> Step:
    name, most, counted = "limits", facts.machine.connections, probe.counted
    if counted.crowded and not probe.works:
        says = f"it has as many connections open as it may, {most}"
        return _step(name, says, ok=False, mend=f"stoker network set {facts.label} --connections {2 * most}")
    over = [f"{dropped} that it {verb}" for dropped, verb in ((counted.over_out, "sent"), (counted.over_in, "was sent")) if dropped]
    if over:
        mend = f"stoker network set {facts.label} --rate-out 0 --rate-in 0"
        return _step(name, f"packets were dropped for being over its rate: {', '.join(over)}", ok=probe.works or None, mend=mend)
    return _step(name, "nothing of it is over a limit")


def _others(facts: Facts, host: Host, probe: Probe, arrived: bool) -> Step:
    """Other tools' firewalls: to nftables an accept of ours is not the last word."""
    name = "other firewalls"
    if probe.works or (probe.tracked is not None and not probe.tracked.answered):
        return _step(name, "no firewall of another's is in the way")
    lost_out = arrived and probe.tracked is None and not probe.counted.denied and isinstance(host.way, Way) and host.forwards
    lost_back = probe.tracked is not None and probe.tracked.answered and not probe.counted.refused
    if not (lost_out or lost_back):
        return _step(name, "nothing came that far", ok=None)
    which = "what came back" if lost_back else "it"
    if not probe.dropping:
        says = f"{which} was dropped on this host, and no chain of nftables' does that (old iptables?)"
        return _step(name, says, ok=None, mend="iptables-legacy -L -v; nft list ruleset")
    chains = ", ".join(str(one.chain) for one in probe.dropping[:4])
    says = f"{which} was dropped on this host, by another firewall: {chains}"
    mendable = any(one.rest and one.chain.hook == "forward" for one in probe.dropping)
    return _step(name, says, ok=False, mend=CHECK if mendable else f"nft list chain {probe.dropping[0].chain}")


def _translation(facts: Facts, host: Host, probe: Probe) -> Step:
    tracked, name = probe.tracked, "translation"
    if tracked is None:
        return _step(name, "the host's table of connections has none like this", ok=None)
    if tracked.answering != facts.address:
        return _step(name, f"it is led to {tracked.answering}")
    if tracked.towards == facts.machine.address and isinstance(host.way, Way) and not host.way.local:
        says = f"it leaves with the machine's own address {tracked.towards}, to which nobody out there can answer. {ANEW}"
        return _step(name, says, ok=False)
    return _step(name, f"it leaves as {tracked.towards}")


def _way_back(facts: Facts, host: Host, probe: Probe) -> Step:
    name, interface = "way back", facts.machine.interface
    if host.back != interface:
        where = f"by {host.back}" if host.back else "nowhere"
        says = f"the host sends answers for {facts.machine.address} {where}, not by {interface}"
        return _step(name, says, ok=False, mend=f"ip route get {facts.machine.address}; ip rule")
    if probe.counted.refused and not probe.works:
        return _step(name, f"our firewall refused {probe.counted.refused} packets that came for the machine", ok=False)
    if probe.works or (probe.tracked is not None and probe.tracked.answered):
        return _step(name, f"answers come back by {interface}")
    return _step(name, f"the host would send answers back by {interface}", ok=None if probe.tracked is None else True)


def _answer(facts: Facts, host: Host, probe: Probe) -> Step:
    name, target, tracked = "connection", facts.target, probe.tracked
    if probe.outcome is Outcome.CONNECTED:
        return _step(name, f"{target} took a connection of the machine's")
    if probe.works:
        says = f"{facts.address} answers, and says that nobody listens on port {target.port}"
        resets = ", ".join(str(one.chain) for one in probe.dropping[:4])
        return _step(name, says + (f" (unless a firewall says that in its place: {resets})" if resets else ""), ok=False)
    if probe.counted.denied:
        return _step(name, "our firewall did not let it through", ok=False)
    said = "nobody answered" if probe.outcome is Outcome.SILENT else f"the machine was told: {probe.why or probe.outcome.value}"
    if tracked is None or tracked.answered:
        return _step(name, said, ok=False)
    if probe.dead_gateway and isinstance(host.way, Way):
        return _step(
            name,
            f"{said}: {host.way.gateway or facts.address}, on {host.out}, is not there",
            ok=False,
            mend=f"ip neigh show dev {host.out}",
        )
    says = f"{said}: it left by {host.out}, and what is behind that does not let it through, or the server is down"
    return _step(name, says, ok=False)
