"""nftables through the kernel's own library (libnftables, in process): commands as text, answers as JSON.

A call is one transaction: all of its commands take effect at once, or none does. The netlink socket belongs to the namespace that
:class:`Nftables` was *made* in. Commands go in as text, since then the library points at what was refused (given JSON it says only
that something was); lists come back as JSON.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import re
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from stoker.errors import HostError

__all__ = ["Nftables"]

NFT_CTX_DEFAULT: Final = 0
OUTPUT_JSON: Final = 1 << 4
OUTPUT_NUMERIC: Final = (1 << 7) | (1 << 8) | (1 << 9)
"""Protocols, priorities and symbols as the kernel has them, not as /etc names them."""
WHERE: Final = re.compile(r"Error: (?P<reason>[^\n]*)\n(?P<text>[^\n]*)\n(?P<blank> *)\^")
ELEMENT: Final = re.compile(r"elements = \{ (.*?) \}\s", re.DOTALL)
BETWEEN: Final = "; "
CODES: Final = {
    "No such file or directory": "nftables_unknown",
    "File exists": "nftables_exists",
    "Operation not permitted": "nftables_denied",
}
_SERIAL: Final = threading.Lock()
"""The library keeps lists of its own for the whole process, and does not guard them."""


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libnftables.so.1")
    except OSError as e:
        raise HostError("nftables_missing", f"libnftables cannot be loaded: {e}", "apt-get install -y libnftables1") from None
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_get_output_buffer.restype = ctypes.c_char_p
    library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    for name in ("nft_ctx_free", "nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer", "nft_ctx_buffer_output"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.nft_ctx_buffer_error.argtypes = [ctypes.c_void_p]
    library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return library


def _refused(said: str, commands: Sequence[str]) -> HostError:
    """The error for what the library said of these commands: which reason, and a caret below the place in the one line they are."""
    match = WHERE.search(said)
    reason = match["reason"] if match else (said.strip().splitlines() or ["it said nothing"])[0]
    details: dict[str, Any] = {"reason": reason[:500]}
    about = "nftables refused"
    if match:
        place = len(match["blank"])
        for command in commands:
            if place <= len(command):
                details["line"] = command[:500]
                about = f"nftables refused “{command[:200]}”"
                break
            place -= len(command) + len(BETWEEN)
    code = next((code for words, code in CODES.items() if words in reason), "nftables_refused")
    hint = "the firewall needs root" if code == "nftables_denied" else "nft list ruleset"
    return HostError(code, f"{about}: {reason}", hint, details=details)


class Nftables:
    """The firewall of the namespace that the thread which makes this is in. Safe to use from any thread."""

    def __init__(self) -> None:
        library = _library()
        with _SERIAL:
            self._context: int | None = library.nft_ctx_new(NFT_CTX_DEFAULT)
            if not self._context:
                raise HostError("nftables_missing", "libnftables gives no context", "the kernel needs nf_tables")
            library.nft_ctx_buffer_output(self._context)
            library.nft_ctx_buffer_error(self._context)
            library.nft_ctx_output_set_flags(self._context, OUTPUT_JSON | OUTPUT_NUMERIC)

    def close(self) -> None:
        with _SERIAL:
            if self._context:
                _library().nft_ctx_free(self._context)
                self._context = None

    def __enter__(self) -> Nftables:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, text: str) -> tuple[int, str, str]:
        library = _library()
        with _SERIAL:
            if self._context is None:
                raise HostError("nftables_closed", "this firewall was closed")
            code = library.nft_run_cmd_from_buffer(self._context, text.encode())
            output = library.nft_ctx_get_output_buffer(self._context)
            error = library.nft_ctx_get_error_buffer(self._context)
        return code, (output or b"").decode(errors="replace"), (error or b"").decode(errors="replace")

    def apply(self, commands: Sequence[str]) -> None:
        """One transaction. No command has a line break in it, which the kernel's library would lose its place over. Errors:
        ``nftables_unknown`` (what is named does not exist), ``nftables_exists``, ``nftables_denied``, ``nftables_refused``; each
        says which command it was."""
        if not commands:
            return
        if any("\n" in command for command in commands):
            raise ValueError("a command with a line break")
        code, _, error = self._run(BETWEEN.join(commands))
        if code != 0:
            raise _refused(error, commands)

    def element(self, place: str, key: str) -> str | None:
        """One element of a set or map (``inet TABLE NAME``) in nft's words, with its value and counter; None when it is not there.
        It is looked up: nothing is listed."""
        command = f"get element {place} {{ {key} }}"
        code, output, error = self._run(command)
        if code == 0:
            found = ELEMENT.search(output)
            return found[1] if found else ""
        refused = _refused(error, [command])
        if refused.code != "nftables_unknown":
            raise refused
        return None

    def query(self, command: str) -> list[dict[str, Any]]:
        """What a ``list`` command answers: the objects of libnftables-json(5), without the header."""
        code, output, error = self._run(command)
        if code != 0:
            raise _refused(error, [command])
        rows: list[dict[str, Any]] = json.loads(output)["nftables"] if output.strip() else []
        return [row for row in rows if "metainfo" not in row]
