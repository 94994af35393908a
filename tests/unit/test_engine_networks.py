"""What the engine says of networks before anything is made: requests that can never be, ranges, ports, addresses of one's own."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from msgspec import structs

from stoker.api.models import CreateSandbox, NetworkMode, SandboxState
from stoker.engine import network_words as networks
from stoker.engine.create import with_network
from stoker.engine.judged import machine_of, publication_of
from stoker.engine.network_words import check_network, has_own_addresses, planned, ranges
from stoker.engine.state import Record
from stoker.errors import CapacityExhausted, InvalidRequest
from stoker.network.egress import Protocol
from stoker.network.plan import Taken, first_guess, plan_namespace
from stoker.network.rules import SERVICES, Publication
from stoker.settings import Settings, load_settings

ASKS = ({"egress": "none"}, {"publish": ["1:1"]}, {"host_access": True}, {"run_id": "r"}, {"tap": "t"})
NAT = CreateSandbox(image="debian:12", name="web", network=NetworkMode.NAT)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    environment = {"STOKER_DATA_DIR": str(tmp_path / "data"), "STOKER_CONFIG": str(tmp_path / "none.toml")}
    return replace(load_settings(environment, root=False), network="user", ranges="apps=172.19.0.0/16, lab = 10.77.0.0/24")


def row(request: CreateSandbox) -> Record:
    return Record(
        id="sb-aaaaaaaaaaaaaaaaaaaa",
        owner="local",
        state=SandboxState.CREATING,
        request=request,
        created_at=0.0,
        name=request.name,
    )


def code(request: CreateSandbox) -> str:
    try:
        check_network(request)
    except InvalidRequest as error:
        assert error.hint
        return error.code
    return ""


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("8080:80", Publication(Protocol.TCP, 8080, 80)),
        ("127.0.0.1:8080:80/tcp", Publication(Protocol.TCP, 8080, 80, IPv4Address("127.0.0.1"))),
        ("5353:53/udp", Publication(Protocol.UDP, 5353, 53)),
    ],
)
def test_ports(text: str, published: Publication) -> None:
    assert publication_of(text) == published


@pytest.mark.parametrize(
    "text", ["", "80", ":80", "80:", "0:80", "80:65536", "1.2.3:1:2", "a:b", "1:2/icmp", "1:2:3:4", "٣:80", "-1:80"]
)
def test_what_is_no_port(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        publication_of(text)
    assert caught.value.code == "port_invalid" and caught.value.hint


def test_requests_that_can_never_be() -> None:
    assert code(NAT) == code(structs.replace(NAT, egress="all", publish=["1:1", "1:1/udp"], host_access=True)) == ""
    user = structs.replace(NAT, network=NetworkMode.USER)
    assert code(user) == ""
    for words in (
        {"egress": "none"},
        {"publish": ["1:1"]},
        {"host_access": True},
        {"run_id": "r"},
        {"tap": "t"},
        {"address_range": "a"},
    ):
        assert code(structs.replace(user, **words)) == "bad_network", words
    assert code(structs.replace(NAT, egress="allow 10.0.0.0/8")) == "egress_invalid"
    assert code(structs.replace(NAT, publish=["1:1", "1:2"])) == "port_invalid"
    assert code(structs.replace(NAT, run_id="r", name=None)) == code(structs.replace(NAT, run_id="r", tap="t")) == "run_unnamed"


def test_the_network_of_who_asks_for_none(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = CreateSandbox(image="debian:12", name="web")
    assert with_network(asked, settings).network is NetworkMode.USER
    assert with_network(asked, replace(settings, network="none")).network is NetworkMode.NONE
    for words in ASKS:
        assert with_network(structs.replace(asked, **words), settings).network is NetworkMode.NAT, words
    assert with_network(structs.replace(NAT, network=NetworkMode.NONE), settings).network is NetworkMode.NONE
    with pytest.raises(InvalidRequest, match="no network"):
        with_network(asked, replace(settings, network="wire"))
    auto = replace(settings, network="auto")
    for root, forwards, wanted in ((0, True, NetworkMode.NAT), (0, False, NetworkMode.USER), (1000, True, NetworkMode.USER)):
        monkeypatch.setattr(networks.os, "geteuid", lambda root=root: root)
        monkeypatch.setattr(networks, "forwards", lambda forwards=forwards: forwards)
        monkeypatch.setattr(networks.os.path, "exists", lambda _: True)
        assert with_network(asked, auto).network is wanted


def test_ranges(settings: Settings) -> None:
    found = ranges(settings)
    assert {name: str(one.network) for name, one in found.items()} == {
        "machines": "100.80.0.0/16",
        "default": "172.16.0.0/16",
        "apps": "172.19.0.0/16",
        "lab": "10.77.0.0/24",
    }
    for text in ("apps", "apps=", "apps=10.0.0.1/8", "a b=10.0.0.0/16", "default=10.0.0.0/16", "x=127.0.0.0/8"):
        with pytest.raises(InvalidRequest) as caught:
            ranges(replace(settings, ranges=text))
        assert caught.value.code == "range_invalid", text
    with pytest.raises(InvalidRequest, match="private_networks"):
        networks.private_networks(replace(settings, private_networks="10.0.0.1/8"))
    assert networks.private_networks(replace(settings, private_networks=" 192.0.2.0/24, ")) == [IPv4Network("192.0.2.0/24")]
    with pytest.raises(InvalidRequest, match="resolvers"):
        networks.name_servers(replace(settings, resolvers="example.org"))
    assert [one.port for one in networks.name_servers(replace(settings, resolvers="9.9.9.9, 192.0.2.1:5353"))] == [53, 5353]


def test_addresses_of_ones_own(settings: Settings) -> None:
    known = ranges(settings)
    run = structs.replace(NAT, run_id="nightly")
    assert has_own_addresses(run) and not has_own_addresses(NAT)
    plan = planned(row(run), known, Taken())
    assert (plan.tap, str(plan.guest)) == ("tap1c77f5b255d9", "172.16.212.58") and plan.tap == first_guess("nightly", "web")[0]
    other = planned(row(run), known, Taken(networks=[plan.network]))
    assert other.tap == plan.tap and other.network != plan.network, "a collision moves on"
    apps = planned(row(structs.replace(NAT, address_range="apps")), known, Taken())
    assert str(apps.guest) == "172.19.0.2" and apps.tap.startswith("tap") and len(apps.tap) == 15
    named = planned(row(structs.replace(NAT, tap="db0", address_range="lab")), known, Taken())
    assert (named.tap, str(named.host)) == ("db0", "10.77.0.1")
    with pytest.raises(CapacityExhausted, match="db0"):
        planned(row(structs.replace(NAT, tap="db0")), known, Taken(["db0"]))
    for name in ("nothing", "machines"):
        with pytest.raises(InvalidRequest) as caught:
            planned(row(structs.replace(NAT, address_range=name)), known, Taken())
        assert caught.value.code == "range_unknown" and "apps" in caught.value.hint


def test_a_policy_with_names_gets_our_resolver() -> None:
    plan = plan_namespace(Taken())
    plain = machine_of(row(structs.replace(NAT, egress="allow: 10.0.0.0/8", publish=["8080:80"])), plan)
    assert (plain.resolver, plain.host_services, len(plain.published)) == (None, (), 1)
    names = machine_of(row(structs.replace(NAT, egress="allow: *.example.org")), plan)
    assert (names.resolver, names.host_services) == (plan.host, SERVICES)
