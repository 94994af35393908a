"""Debian's suites, where this host gets Debian from, and packages fetched by apt's own machinery with signatures checked.

apt runs with a private root (state, cache, sources) below ``cache/apt/SUITE``, so nothing of the host's own package system is
touched and no privilege is needed; the host's apt configuration (proxies, credentials) still applies. The one source names the
archive's keyring outright (``Signed-By``), so no other key the host may trust counts.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stoker.errors import HostError
from stoker.host.run import Completed, run, tool_environment
from stoker.images.progress import Progress
from stoker.images.store import Store
from stoker.images.tools import run_tied
from stoker.settings import Settings

__all__ = ["Mirrors", "fetch_packages", "find_mirrors", "keyring", "render_sources"]

WITHOUT_UPDATES = frozenset({"sid"})
KEYRINGS = ("/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp")
APT_HELPER = "/usr/lib/apt/apt-helper"


@dataclass(frozen=True, slots=True)
class Mirrors:
    """Where the archive and its security updates are; ``security`` may be empty."""

    main: str
    security: str = ""


def keyring() -> str:
    """The archive's keyring on this host."""
    for path in KEYRINGS:
        if os.path.isfile(path):
            return path
    raise _missing("debian-archive-keyring", "Debian's signatures cannot be checked")


def _missing(package: str, why: str) -> HostError:
    return HostError("tool_missing", f"{package} is not installed: {why}", f"apt-get install {package}", details={"tool": package})


def render_sources(suite: str, mirrors: Mirrors, signed_by: str, *, only_packages: bool = False) -> str:
    """A deb822 sources file for one suite with its updates and security updates."""
    stanzas = []
    suites = suite if suite in WITHOUT_UPDATES else f"{suite} {suite}-updates"
    for uri, names in ((mirrors.main, suites), (mirrors.security, "" if suite in WITHOUT_UPDATES else f"{suite}-security")):
        if uri and names:
            lines = ["Types: deb", f"URIs: {uri}", f"Suites: {names}", "Components: main"]
            lines += ["Targets: Packages"] if only_packages else []
            stanzas.append("\n".join([*lines, f"Signed-By: {signed_by}"]) + "\n")
    return "\n".join(stanzas)


async def find_mirrors(settings: Settings, suite: str) -> Mirrors:
    """From the settings, else from this host's apt sources, else what mmdebstrap would use."""
    if settings.debian_mirror:
        # One URL, or two: the archive's and the security updates'. By convention the second one follows from the first.
        base, *security = [uri.rstrip("/") for uri in settings.debian_mirror.split()]
        return Mirrors(base, security[0] if security else f"{base}-security" if base.endswith("/debian") else "")
    if shutil.which("apt-get"):
        fields = "$(REPO_URI)|$(RELEASE)|$(LABEL)|$(COMPONENT)"
        listed = await run(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"], check=False)
        if (mirrors := mirrors_of_host(listed.stdout.decode(errors="replace"))) is not None:
            return mirrors
    return await _mirrors_of_mmdebstrap(suite)


def mirrors_of_host(listed: str) -> Mirrors | None:
    """Reads ``apt-get indextargets``. Before the first update apt knows no labels: then the path's last word decides."""
    main = security = ""
    for line in listed.splitlines():
        uri, _, rest = line.partition("|")
        release, label, component = (*rest.split("|"), "", "", "")[:3]
        base = uri.rstrip("/")
        if component != "main" or not re.match(r"(https?|ftp|file|mirror|tor)\b", base):
            continue
        is_security = release.endswith("-security") or "-security/" in uri
        if not label.startswith("$") and label:
            fits = label in ("Debian", "Debian-Security")
        else:
            fits = base.endswith(("/debian", "/debian-security"))
        if fits and is_security:
            security = security or base
        elif fits:
            main = main or base
    return Mirrors(main, security) if main else None


async def _mirrors_of_mmdebstrap(suite: str) -> Mirrors:
    """Lets mmdebstrap write its default sources and stops it there: its default is kept right by its maintainers."""
    hook = '--setup-hook=cat "$1"/etc/apt/sources.list >&2; exit 1'
    if not shutil.which("mmdebstrap"):
        raise _missing("mmdebstrap", "no Debian mirror is known without it")
    said = await run(["mmdebstrap", "--variant=custom", "--mode=chrootless", hook, suite, "/dev/null"], check=False)
    found = re.findall(r"^deb (?:\[[^]]*\] )?(\S+) (\S+) ", said.stderr.decode(errors="replace"), re.MULTILINE)
    main = next((uri for uri, name in found if name == suite), "")
    if not main:
        raise HostError(
            "no_mirror", "no Debian mirror is known on this host", "set debian_mirror (STOKER_DEBIAN_MIRROR) to a mirror's URL"
        )
    return Mirrors(main, next((uri for uri, name in found if name == f"{suite}-security"), ""))


def render_apt_configuration(root: Path, sandbox: bool) -> str:
    """apt.conf for a private root. The host's own files are read before it; hooks from there do not apply to us."""
    sources = root / "sources"
    lines = [
        "#clear APT::Update::Post-Invoke;",
        "#clear APT::Update::Post-Invoke-Success;",
        "#clear APT::Architectures;",
        'APT::Architecture "amd64";',
        'APT::Architectures { "amd64"; };',
        'APT::Update::Error-Mode "any";',
        'Acquire::Languages "none";',
        'Acquire::Retries "3";',
        'Acquire::http::Timeout "30";',
        'Acquire::https::Timeout "30";',
        'Dir::Etc::SourceList "/dev/null";',
        f'Dir::Etc::SourceParts "{sources}";',
        'Dir::Etc::Preferences "/dev/null";',
        'Dir::Etc::PreferencesParts "/dev/null";',
        f'Dir::State "{root}/state";',
        f'Dir::State::status "{root}/status";',
        f'Dir::Cache "{root}/cache";',
    ]
    if not sandbox:
        lines.append('APT::Sandbox::User "root";')
    return "\n".join(lines) + "\n"


def _reachable(path: Path) -> bool:
    """True if apt's own unprivileged user can get there: root's downloads then run as that user."""
    return all(parent.stat().st_mode & 0o001 for parent in (path, *path.parents))


class PrivateApt:
    """apt-get, apt-cache and apt-helper on a private root. The caller holds the suite's lock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.configuration = root / "apt.conf"

    def prepare(self, sources: str) -> None:
        if '"' in str(self.root):
            raise HostError("data_dir_refused", f"{self.root}: a quote in the path", "set STOKER_DATA_DIR to another directory")
        for directory in ("sources", "state/lists/partial", "cache/archives/partial", "packages"):
            (self.root / directory).mkdir(parents=True, exist_ok=True)
        (self.root / "status").write_bytes(b"")
        (self.root / "sources" / "debian.sources").write_text(sources)
        self.configuration.write_text(render_apt_configuration(self.root, os.geteuid() == 0 and _reachable(self.root)))

    async def __call__(self, tool: str, *words: str, on_line: Callable[[str], None] | None = None) -> Completed:
        argv: list[str | Path] = [tool, "-c", str(self.configuration), *words]
        environment = tool_environment({"LC_ALL": "C.UTF-8"})
        return await run_tied(argv, env=environment, cwd=self.root / "packages", on_line=on_line)


def _report(progress: Progress, name: str) -> Callable[[str], None]:
    """Turns apt's ``dlstatus:1:33.3333:Retrieving file 1 of 3 (2s remaining)`` into progress."""

    def line(text: str) -> None:
        if (found := re.match(r"dlstatus:\d+:([0-9.]+):(.*)", text)) is not None:
            progress.step(name, float(found[1]), 100.0, found[2])

    return line


async def _update(apt: PrivateApt, suite: str, progress: Progress) -> None:
    name = f"reading Debian {suite}'s package index"
    progress.step(name, 0.0, 100.0)
    try:
        await apt("apt-get", "-o", "APT::Status-Fd=1", "update", on_line=_report(progress, name))
    except HostError as e:
        raise _fetch_error(e, f"the package index of Debian {suite}") from None
    progress.step(name, 100.0, 100.0)


def _fetch_error(e: HostError, what: str) -> HostError:
    told = e.details.get("stderr", [])
    text = " ".join(told)
    if e.code != "tool_failed" or "No space left" in text:
        return e
    reason = next((line for line in told if line.startswith(("E:", "W:"))), e.message)
    if re.search(r"NO_PUBKEY|EXPKEYSIG|BADSIG|not signed|GPG error|not valid (yet|anymore)|is expired", text):
        return HostError(
            "signature_invalid", f"{what} is not signed as it must be: {reason}", "check the clock, or try another mirror"
        )
    hint = "check the network and the mirror: apt-get update; or set STOKER_DEBIAN_MIRROR"
    return HostError("fetch_failed", f"{what} cannot be fetched: {reason}", hint, details=e.details)


@dataclass(frozen=True, slots=True)
class _Address:
    package: str
    uri: str
    size: int
    digest: str


async def fetch_packages(suite: str, meta: str, pattern: str, settings: Settings, store: Store, progress: Progress) -> list[Path]:
    """Fetches the packages behind ``meta``: those it needs, and they need, whose names match ``pattern``. Returns verified .debs.

    (Up to trixie a kernel is one package; later the image, the modules and the configuration are packages of their own.) The files
    stay in the cache until the caller removes them; apt goes on with a partial one. Whatever is there is hashed against apt's
    signed index before it is returned.
    """
    for tool, package in (("apt-get", "apt"), ("dpkg-deb", "dpkg"), ("setpriv", "util-linux")):
        if not shutil.which(tool, path=tool_environment()["PATH"]):
            raise _missing(package, "packages cannot be fetched")
    apt = PrivateApt(store.directory("cache", "apt", suite))
    apt.prepare(render_sources(suite, await find_mirrors(settings, suite), keyring(), only_packages=True))
    await _update(apt, suite, progress)
    addresses = await _addresses(apt, await _closure(apt, suite, meta, pattern))
    kept = {f"{address.package}.deb" for address in addresses}
    for stale in (apt.root / "packages").iterdir():
        if stale.name not in kept:
            stale.unlink(missing_ok=True)
    return [await _download(apt, address, progress) for address in addresses]


async def _closure(apt: PrivateApt, suite: str, meta: str, pattern: str) -> list[str]:
    found: list[str] = []
    pending = [meta]
    while pending:
        try:
            shown = (await apt("apt-cache", "show", "--no-all-versions", *pending)).stdout.decode(errors="replace")
        except HostError as e:
            raise HostError("package_unknown", f"Debian {suite} has no {' or '.join(pending)}", "try another suite") from e
        depends = " ".join(re.findall(r"^(?:Pre-)?Depends: (.*)$", shown, re.MULTILINE))
        pending = [name for name in dict.fromkeys(re.findall(rf"(?<![\w.+-])({pattern})(?![\w.+-])", depends)) if name not in found]
        found += pending
    if not found:
        raise HostError("package_unknown", f"Debian {suite}'s {meta} depends on no {pattern}", "try another suite")
    return found


async def _addresses(apt: PrivateApt, packages: list[str]) -> list[_Address]:
    # Only addresses and hashes are asked for here: `apt-get download` itself neither resumes nor hashes what is there already.
    printed = (await apt("apt-get", "download", "--print-uris", *packages)).stdout.decode(errors="replace")
    addresses = []
    for uri, file, size, digest in re.findall(r"^'([^']+)' (\S+) (\d+) SHA256:([0-9a-f]{64})", printed, re.MULTILINE):
        addresses.append(_Address(file.split("_")[0], uri, int(size), digest))
    if len(addresses) != len(packages):
        raise HostError("package_unknown", f"apt names no address for one of {', '.join(packages)}", "try again")
    return addresses


async def _download(apt: PrivateApt, address: _Address, progress: Progress) -> Path:
    deb = apt.root / "packages" / f"{address.package}.deb"
    name = f"fetching {address.package}"
    for attempt in (1, 2):
        progress.step(name, 0.0, 100.0, f"{address.size / 1e6:.1f} MB")
        if await asyncio.to_thread(_is_intact, deb, address.digest):
            progress.step(name, 100.0, 100.0)
            return deb  # an earlier run was ended after it had fetched this
        try:
            words = ("-o", "APT::Status-Fd=1", "download-file", address.uri, str(deb), f"SHA256:{address.digest}")
            await apt(APT_HELPER, *words, on_line=_report(progress, name))
        except HostError as e:
            # What was there may be no beginning of this file: once more without it.
            if attempt == 2 or not re.search(r"[Hh]ash [Ss]um mismatch|[Uu]nexpected size", " ".join(e.details.get("stderr", ()))):
                raise _fetch_error(e, address.package) from None
        if await asyncio.to_thread(_is_intact, deb, address.digest):
            progress.step(name, 100.0, 100.0)
            return deb
        deb.unlink(missing_ok=True)
    hint = "try again, or another mirror"
    raise HostError("package_corrupt", f"{address.package} arrives damaged: its SHA-256 is not the signed index's", hint)


def _is_intact(path: Path, digest: str) -> bool:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except FileNotFoundError:
        return False
