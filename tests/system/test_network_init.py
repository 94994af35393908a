"""A stock Debian with an init of its own takes its lease by DHCP, from the host of a world of namespaces."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from guest_world import GuestWorld, eventually, guest_world
from lab_image import FLAVOURS, build
from lab_session import shared_settings
from network_world import HOST
from stoker.host.process import ProcessIdentity
from stoker.network import dhcp
from stoker.network.plan import INSIDE

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.timeout(900),
]
UP = "until systemctl is-system-running --wait 2>/dev/null | grep -qE 'running|degraded'; do sleep 0.2; done"
TAKE = """
printf '[Match]\\nName=eth0\\n[Network]\\nDHCP=ipv4\\n' >/etc/systemd/network/10-eth0.network
ip address flush dev eth0
systemctl unmask --quiet systemd-networkd; systemctl restart systemd-networkd
until cat /run/systemd/netif/leases/* 2>/dev/null | grep -q ^ADDRESS; do sleep 0.3; done
until ip -4 route | grep -q ^default; do sleep 0.3; done
ip -4 -o address show dev eth0; ip -4 route; cat /run/systemd/netif/leases/*
exec 3<>/dev/tcp/1.1.1.1/8080; head -1 <&3
"""


def server(made: GuestWorld, sandbox: str) -> ProcessIdentity | None:
    return next(dhcp.find(made.daemon.run_dir / "sandboxes" / sandbox), None)


def test_a_stock_debian_with_its_own_init_takes_its_lease(session_root: Path, data_dir: Path, accelerator: str) -> None:
    directory = Path(tempfile.mkdtemp(prefix="own", dir=session_root))
    # The same image as the lab's: Debian's packages as they are, systemd as process 1.
    image = build(FLAVOURS["stable"], shared_settings(directory / "shared"))
    with guest_world(directory, data_dir, accelerator) as made:
        words = {"image": f"ext4:{image.rootfs}", "kernel": str(image.kernel), "init": "image", "memory": 768 << 20}
        box = made.daemon.call("POST", "/sandboxes", 201, json=made.request("debian", hostname="castle", **words))
        made.sure("debian", UP)

        def takes() -> None:
            said = made.sure("debian", "exec bash -e", stdin=TAKE)
            assert f"inet {INSIDE.guest} " in said and f"default via {INSIDE.gateway.ip} dev eth0 proto dhcp" in said
            lease = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
            assert (lease["ADDRESS"], lease["ROUTER"]) == (str(INSIDE.guest.ip), str(INSIDE.gateway.ip))
            assert (lease["DNS"], lease["HOSTNAME"], lease["SERVER_ADDRESS"]) == ("1.1.1.1", "castle", str(INSIDE.gateway.ip))
            assert said.splitlines()[-1] == str(HOST.ip), "and it leads out"

        takes()
        first = server(made, box["id"])
        assert first is not None
        made.daemon.kill()
        made.start()
        made.sure("debian", "true")
        assert server(made, box["id"]) == first, "it outlives the daemon"
        os.kill(first.pid, 9)
        eventually(lambda: server(made, box["id"]) not in (None, first), "nobody started it again")
        takes()
        made.remove("debian")
        assert server(made, box["id"]) is None
