"""Why a real machine reaches a port or does not, asked of a daemon: its agent says and tries, with nothing of that in its image."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guest_world import CLOSED, SITE, GuestWorld, eventually, guest_world
from network_world import HOST

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def made(session_root: Path, data_dir: Path, accelerator: str) -> Iterator[GuestWorld]:
    directory = Path(tempfile.mkdtemp(prefix="why", dir=session_root))
    with guest_world(directory, data_dir, accelerator) as world:
        world.create("one")
        yield world


def why(made: GuestWorld, target: str, protocol: str = "tcp") -> tuple[bool | None, str | None, dict[str, dict[str, Any]]]:
    """Whether it was reached, the fault, and the steps by their names."""
    found = made.daemon.call("POST", "/sandboxes/one/network/explain", json={"target": target, "protocol": protocol})
    assert found["milliseconds"] < 10_000
    return found["reached"], found["fault"], {step["name"]: step for step in found["steps"]}


def seen(made: GuestWorld) -> dict[str, Any]:
    return dict(made.daemon.call("GET", "/sandboxes/one/network"))


def test_what_works_and_what_is_broken(made: GuestWorld) -> None:
    assert made.daemon.exec("one", "sh", "-c", "command -v ip ss curl nslookup")["exit_code"] != 0, (
        "nothing of that is in its image"
    )
    reached, fault, steps = why(made, f"{SITE}:443")
    assert (reached, fault, {step["verdict"] for step in steps.values()}) == (True, None, {"pass"}), steps
    assert "8.8.8.8, 1.1.1.1 says" in steps["name"]["says"] and steps["translation"]["says"] == f"it leaves as {HOST.ip}"
    assert "169.254.0.22 by eth0" in steps["guest route"]["says"]
    reached, fault, steps = why(made, f"{SITE}:444")
    assert (reached, fault) == (False, "connection") and "nobody listens" in steps["connection"]["says"], steps
    reached, fault, steps = why(made, f"{SITE}:53", "udp")
    assert (reached, fault, steps["connection"]["verdict"]) == (None, None, "unknown"), steps

    made.host.run(lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("0"))
    reached, fault, steps = why(made, "8.8.8.8:443")
    made.host.run(lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))
    assert (reached, fault, steps["forwarding"]["mend"]) == (False, "forwarding", "stoker network check --fix"), steps

    made.sure("one", "cp /etc/resolv.conf /resolv && echo nameserver 7.7.7.7 > /etc/resolv.conf")
    reached, fault, steps = why(made, f"{SITE}:443")
    made.sure("one", "cp /resolv /etc/resolv.conf")
    assert fault == "name" and "7.7.7.7 did not answer" in steps["name"]["says"], steps


def test_a_policy_and_the_mend_that_it_says(made: GuestWorld) -> None:
    made.set("one", egress="allow: *.example.org:80; deny: 9.9.9.9")
    reached, fault, steps = why(made, f"{SITE}:80")
    assert (reached, fault) == (True, None) and "rule 1 of the policy" in steps["policy"]["says"], steps
    assert "led to our resolver" in steps["guest resolver"]["says"]
    _, fault, steps = why(made, "other.org:8080")
    assert fault == "name" and "no rule of the policy allows it" in steps["name"]["says"], steps
    words = steps["name"]["mend"].split("'")
    assert words[0] == "stoker network set one --egress "
    before = seen(made)["counters"]
    reached, fault, steps = why(made, "9.9.9.9:8080")
    assert (reached, fault) == (False, "policy") and "rule 2 of the policy, `deny: 9.9.9.9`" in steps["policy"]["says"], steps
    assert steps["firewall"]["verdict"] == "fail"
    after = seen(made)
    assert after["counters"]["denied"] > before["denied"] and after["counters"]["sent"] > before["sent"]
    eventually(lambda: any(one["destination"] == "9.9.9.9" for one in seen(made)["denials"]), "the denial was not recorded")
    (denial,) = [one for one in seen(made)["denials"] if one["destination"] == "9.9.9.9"]
    assert (denial["protocol"], denial["port"]) == ("tcp", 8080) and after["egress"] == "allow: *.example.org:80; deny: 9.9.9.9"
    made.set("one", egress=words[1])
    assert why(made, "other.org:8080")[:2] == (True, None), "the mend mends"
    made.set("one", egress="all")


def test_what_is_learned(made: GuestWorld) -> None:
    error = made.daemon.call("GET", "/sandboxes/one/network/learned", 409)
    assert error["code"] == "not_learned"
    made.set("one", egress="none", learn=True)
    assert seen(made)["learn"]
    made.sure("one", f"perl -e 'use Socket; inet_aton(\"{SITE}\") or die'")
    assert made.ask("one", "tcp/8.8.8.8/80", "tcp/1.1.1.1")[1] == str(HOST.ip)
    assert made.ask("one", "tcp/10.1.2.3")[0] in CLOSED
    wanted = [f"{SITE}:80/tcp", "1.1.1.1:8080/tcp", "10.1.2.3:8080/tcp"]

    def learned() -> dict[str, Any]:
        return dict(made.daemon.call("GET", "/sandboxes/one/network/learned"))

    eventually(lambda: set(wanted) <= set(learned()["rules"]), f"not learned: {learned()}")
    made.set("one", egress=learned()["egress"], learn=False)
    made.sure("one", f"perl -e 'use Socket; inet_aton(\"{SITE}\") or die'")
    assert made.ask("one", "tcp/1.1.1.1", "tcp/10.1.2.3") == [str(HOST.ip)] * 2
    assert why(made, f"{SITE}:80")[0] and why(made, f"{SITE}:443")[1] == "policy"
    made.set("one", egress="all")


def test_requests_that_can_never_be(made: GuestWorld) -> None:
    for target in ("example.org", "127.0.0.1:80", "a b:80"):
        error = made.daemon.call("POST", "/sandboxes/one/network/explain", 400, json={"target": target})
        assert error["code"] == "bad_target" and error["hint"]
    made.post("one", "freeze")
    error = made.daemon.call("POST", "/sandboxes/one/network/explain", 409, json={"target": f"{SITE}:80"})
    assert error["code"] == "wrong_state"
    made.post("one", "thaw")
    made.daemon.call("POST", "/sandboxes", 201, json={**made.request("two"), "network": "none"})
    for verb, path, body in (
        ("GET", "network", None),
        ("POST", "network/explain", {"target": f"{SITE}:80"}),
        ("GET", "network/learned", None),
    ):
        error = made.daemon.call(verb, f"/sandboxes/two/{path}", 400, **({"json": body} if body else {}))
        assert error["code"] == "bad_network" and error["hint"] == "--network nat"
