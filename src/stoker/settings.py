"""One configuration: built once at the edge, frozen, passed down.

Order: defaults, then ``/etc/stoker/stoker.toml`` (root) or ``$XDG_CONFIG_HOME/stoker/stoker.toml``, then ``STOKER_*`` variables
(``STOKER_DATA_DIR`` sets ``data_dir``). Nothing below this module reads the environment for configuration.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stoker.errors import InvalidRequest

__all__ = ["Settings", "load_settings"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """Where things live and how much is allowed. Sizes are bytes, times seconds."""

    data_dir: Path
    run_dir: Path
    config_file: Path
    qemu: str = "qemu-system-x86_64"
    accel: str = "auto"
    """``auto`` (KVM where a guest proved it, else TCG), ``kvm`` or ``tcg``."""
    debian_mirror: str = ""
    """Empty: what apt or mmdebstrap of this host use."""
    default_kernel: str = "debian:12"
    network: str = "auto"
    """What machines get that ask for none: ``auto`` (``nat`` where the daemon is root's and the host forwards packets, else
    ``user``), ``nat``, ``user`` or ``none``."""
    network_range: str = "100.80.0.0/16"
    """Where the host's ends of machines with namespaces of their own are from."""
    run_range: str = "172.16.0.0/16"
    """Where the addresses of machines with a run id are from."""
    ranges: str = ""
    """Further ranges by name, such as ``apps=172.19.0.0/16, lab=10.77.0.0/16``."""
    private_networks: str = ""
    """Networks of the operator's, by commas, that are closed to machines besides the private ones of everybody."""
    nameserver: str = "1.1.1.1"
    """Whom machines with an interface on the host ask for names."""
    resolvers: str = ""
    """Whom our resolver asks, by commas; empty: those of /etc/resolv.conf."""
    golden: int = 1
    """0: machines always boot, and no memory is put away to start later ones from."""
    parked: int = 1
    """How many machines wait for the next create of a kind that there was a moment ago; 0: none."""
    zygote: int = 1
    """0: each VMM is loaded anew, with a layout of addresses of its own."""
    boot_timeout: float = 120.0
    kvm_probe_timeout: float = 30.0
    start_timeout: float = 30.0
    """What a client gives the daemon that it starts."""
    console_bytes: int = 4 * MIB
    url: str = ""
    """Where the client finds the daemon; empty: the Unix socket in ``run_dir``, started on demand."""
    api_key: str = ""
    listen: str = ""
    """``HOST:PORT`` the daemon listens on besides its socket; empty: the socket only."""
    proxy: str = "127.0.0.1:7070"
    """``HOST:PORT`` of the reverse proxy to ports inside sandboxes; empty: none."""
    proxy_domain: str = "localhost"
    """Sandboxes are ``PORT-NAME.DOMAIN`` there."""
    proxy_trusted: str = ""
    """Addresses of proxies in front of it, by commas: their X-Forwarded headers are believed."""
    idle_exit: float = 600.0
    """An auto-started daemon ends after so long without a sandbox and a client."""
    budget_memory: int = 0
    """Memory that sandboxes may hold together; 0: most of what the host has."""
    budget_cpus: int = 0
    budget_disk: int = 0
    max_sandboxes: int = 1000
    pool: str = "auto"
    """Where new disks go: ``auto`` (a pool with a file system of its own, made where the data directory cannot share blocks and the
    daemon is root's), ``directory`` (the data directory itself), or the name of a pool."""
    pool_strategy: str = "auto"
    """How disks are made: ``auto``, ``qcow2``, ``dm-snapshot``, ``reflink`` or ``copy``."""

    @property
    def socket(self) -> Path:
        return self.run_dir / "stoker.sock"

    @property
    def database(self) -> Path:
        return self.data_dir / "stoker.db"


def _directories(environ: dict[str, str], root: bool) -> tuple[Path, Path, Path]:
    if root:
        return Path("/var/lib/stoker"), Path("/run/stoker"), Path("/etc/stoker/stoker.toml")
    home = Path(environ.get("HOME") or "/nonexistent")
    data = Path(environ.get("XDG_DATA_HOME") or home / ".local/share") / "stoker"
    # Without a session there is no XDG_RUNTIME_DIR; a directory of ours in /tmp is checked for its owner when it is made.
    run = Path(environ["XDG_RUNTIME_DIR"]) / "stoker" if environ.get("XDG_RUNTIME_DIR") else Path(f"/tmp/stoker-{os.getuid()}")
    config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "stoker" / "stoker.toml"
    return data, run, config


def _convert(name: str, kind: str, value: Any, source: str) -> Any:
    try:
        if kind == "Path":
            return Path(str(value)).expanduser()
        if kind in ("int", "float"):
            if isinstance(value, bool):
                raise ValueError
            return int(value) if kind == "int" else float(value)
        if not isinstance(value, str):
            raise ValueError
        return value
    except (TypeError, ValueError):
        raise InvalidRequest("bad_setting", f"{source}: {name} must be {kind}, not {value!r}") from None


def load_settings(environ: dict[str, str] | None = None, *, root: bool | None = None) -> Settings:
    """Reads the configuration. A wrong file or variable is an :class:`InvalidRequest` that names it."""
    env = dict(os.environ) if environ is None else environ
    data, run, config = _directories(env, os.geteuid() == 0 if root is None else root)
    config = Path(env.get("STOKER_CONFIG") or config)
    kinds = {field.name: str(field.type) for field in fields(Settings)}
    values: dict[str, Any] = {"data_dir": data, "run_dir": run, "config_file": config}
    try:
        table = tomllib.loads(config.read_text())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        table = {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InvalidRequest("bad_configuration", f"{config}: {e}", f"correct or remove {config}") from None
    for name, value in table.items():
        if name not in kinds or name == "config_file":
            raise InvalidRequest("bad_configuration", f"{config}: there is no setting {name!r}", "settings: " + ", ".join(kinds))
        values[name] = _convert(name, kinds[name], value, str(config))
    for name, kind in kinds.items():
        variable = f"STOKER_{name.upper()}"
        if name != "config_file" and env.get(variable):
            values[name] = _convert(name, kind, env[variable], variable)
    return Settings(**values)
