"""Words of the command line that mean something: sizes, times, environments. Each mistake is one line that names the word."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from stoker.api.units import parse_duration, parse_size
from stoker.errors import InvalidRequest

__all__ = [
    "DURATION",
    "SIZE",
    "absolute_image",
    "absolute_kernel",
    "command_words",
    "environment",
    "existing_file",
    "network_options",
    "wire_network",
]

T = TypeVar("T")
NAME = re.compile(r"[^=\0\s]+")
LONGEST_FILE = 1 << 20


class _Parsed(click.ParamType[object]):
    """A parameter whose parser raises errors of ours."""

    def __init__(self, name: str, parse: Callable[[str], T]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except InvalidRequest as e:
            self.fail(f"{e.message} ({e.hint})" if e.hint else e.message, param, ctx)


def _positive(text: str) -> float:
    seconds = parse_duration(text)
    if seconds <= 0:
        raise InvalidRequest("bad_duration", f"{text!r} is not a time in the future")
    return seconds


def _network(text: str) -> str:
    mode, colon, bridge = text.partition(":")
    if mode not in ("none", "user", "nat", "bridge") or bool(colon) != (mode == "bridge") or (colon and not bridge):
        raise InvalidRequest("bad_network", f"there is no network {text!r}", "none, user, nat or bridge:NAME")
    return text


def _interface(text: str) -> str:
    from stoker.api.network import parse_interface

    parse_interface(text)
    return text


def wire_network(given: Mapping[str, Any]) -> dict[str, Any]:
    """``--network`` and ``--interface`` as the API has them."""
    mode, _, bridge = (given["network"] or "").partition(":")
    wire: dict[str, Any] = {"network": mode or None} | ({"bridge": bridge} if bridge else {})
    if given["interfaces"]:
        from msgspec.structs import asdict

        from stoker.api.network import parse_interface

        wire["interfaces"] = [asdict(parse_interface(text)) for text in given["interfaces"]]
    return wire


NETWORK = _Parsed("network", _network)
INTERFACE = _Parsed("interface", _interface)
SIZE = _Parsed("size", parse_size)
DURATION = _Parsed("duration", _positive)

_NETWORK = (
    click.option("--network", type=NETWORK, metavar="MODE", help="none, user, nat or bridge:NAME.  [default: as configured]"),
    click.option("--egress", metavar="RULES", help="Where it may connect to, with nat: all, none, or 'allow: ...; deny: ...'."),
    click.option("--learn", is_flag=True, help="Let what the policy denies of the public through, and record it (nat)."),
    click.option("--publish", "-p", metavar="[IP:]PORT:PORT", multiple=True, help="A port of the host that leads into it (nat)."),
    click.option("--host-access", is_flag=True, help="It may connect to the host itself, with nat."),
    click.option("--rate-in", type=SIZE, default=0, help="Bytes a second it may get, such as 10M.  [default: no limit]"),
    click.option("--rate-out", type=SIZE, default=0, help="Bytes a second it may send.  [default: no limit]"),
    click.option("--connections", type=click.IntRange(0, 1 << 20), default=0, help="How many it may have open at once (nat)."),
    click.option("--ipv6", is_flag=True, help="A private address of IPv6 besides, translated too (nat)."),
    click.option("--address", metavar="IP/PREFIX", help="Its address on the bridge; without, the image asks by DHCP."),
    click.option("--gateway", metavar="IP", help="The bridge's way out."),
    click.option(
        "--interface",
        "interfaces",
        type=INTERFACE,
        metavar="bridge:NAME[,address=A][,tap=T]",
        multiple=True,
        help="A further interface.",
    ),
    click.option("--run-id", metavar="ID", help="Interface and addresses that follow from ID and the name (nat)."),
    click.option(
        "--range", "address_range", metavar="RANGE", help="Addresses of its own, from a range of the configuration (nat)."
    ),
    click.option("--tap", metavar="IFNAME", help="The name of its interface on the host, with addresses of its own (nat)."),
)


def network_options(command: Callable[..., T]) -> Callable[..., T]:
    """What ``run`` and ``create`` say of a machine's network."""
    for option in reversed(_NETWORK):
        command = option(command)
    return command


def _pair(text: str, source: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """``K=V``, or ``K`` for this program's own value; None where that is not set."""
    name, equals, value = text.partition("=")
    if NAME.fullmatch(name) is None or "\0" in value:
        raise InvalidRequest(
            "bad_environment", f"{source}: {text[:100]!r} is not NAME=VALUE", "--env NAME=VALUE, or --env NAME to pass it on"
        )
    if equals:
        return name, value
    return (name, environ[name]) if name in environ else None


def _read_file(path: str, environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Docker's format: a variable a line, ``#`` comments, no quoting, no expansion; a bare name passes ours on."""
    try:
        with open(path, "rb") as file:
            data = file.read(LONGEST_FILE + 1)
    except OSError as e:
        raise InvalidRequest("bad_environment_file", f"{path}: {e.strerror}", "--env-file takes lines of NAME=VALUE") from None
    if len(data) > LONGEST_FILE:
        raise InvalidRequest("bad_environment_file", f"{path} is larger than {LONGEST_FILE >> 20} MiB")
    pairs = []
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        line = os.fsdecode(raw.rstrip(b"\r")).lstrip()
        if not line or line.startswith("#"):
            continue
        pair = _pair(line, f"{path}:{number}", environ)
        if pair is not None:
            pairs.append(pair)
    return pairs


def environment(
    words: Iterable[str], files: Iterable[str], environ: Mapping[str, str] | None = None
) -> tuple[tuple[str, str], ...]:
    """What ``--env-file`` and ``--env`` say together: files first, later ones win, ``--env`` over all."""
    env = os.environ if environ is None else environ
    merged: dict[str, str] = {}
    for path in files:
        merged.update(_read_file(path, env))
    for word in words:
        pair = _pair(word, "--env", env)
        if pair is not None:
            merged[pair[0]] = pair[1]
    return tuple(merged.items())


def command_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """The command behind ``IMAGE [--]``."""
    return words[1:] if words[:1] == ("--",) else words


def existing_file(option: str, path: str | None) -> Path | None:
    """An option's file as an absolute path; missing ones are refused before anything is made."""
    if path is None:
        return None
    if not os.path.isfile(path):
        raise InvalidRequest("file_missing", f"{option}: there is no file {path}")
    return Path(path).absolute()


LOCAL_TRANSPORTS = ("ext4:", "dir:", "oci:", "tar:", "docker-archive:")


def absolute_image(reference: str) -> str:
    """An image that is a path of ours, for a daemon that stands elsewhere: ``ext4:disk.img`` becomes ``ext4:/home/me/disk.img``."""
    for transport in LOCAL_TRANSPORTS:
        if reference.startswith(transport) and len(reference) > len(transport):
            return transport + os.path.abspath(reference.removeprefix(transport))
    return reference


def absolute_kernel(name: str) -> str:
    """The same for a kernel: whatever has a slash, or is a file here, is a path."""
    return os.path.abspath(name) if "/" in name or (name and ":" not in name and os.path.exists(name)) else name
