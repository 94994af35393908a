"""One error root for everything Stoker raises, and the two places that translate it.

::

    StokerError                 code, message, hint, details
    |- InvalidRequest           what was asked makes no sense              HTTP 400   exit 125
    |- Unauthenticated          no key, or a wrong one                     HTTP 401   exit 125
    |- Forbidden                the key may not do this                    HTTP 403   exit 125
    |- NotFound                 no such thing, or not yours                HTTP 404   exit 125
    |- Conflict                 exists already, or in the wrong state      HTTP 409   exit 125
    |- TooLarge                 a bound was passed                         HTTP 413   exit 125
    |- CapacityExhausted        the host (or quota) has no room            HTTP 429   exit 125
    |- CommandNotFound          no such command in the guest               HTTP 422   exit 127
    |- CommandNotExecutable     the command cannot be executed             HTTP 422   exit 126
    |- GuestError               the machine or its agent failed            HTTP 502   exit 125
    |- HostError                the host lacks or refuses something        HTTP 503   exit 125
    |- DeadlineExceeded         it took too long                           HTTP 504   exit 124
    `- InternalError            a defect of ours                           HTTP 500   exit 125

``code`` is stable and lower_snake_case, ``message`` says what and which object, ``hint`` is what to do next (a command where
there is one). The class gives the family, the code the case: ``except NotFound`` and ``error.code == "image_unknown"``.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "CapacityExhausted",
    "CommandNotExecutable",
    "CommandNotFound",
    "Conflict",
    "DeadlineExceeded",
    "Forbidden",
    "GuestError",
    "HostError",
    "InternalError",
    "InvalidRequest",
    "NotFound",
    "StokerError",
    "TooLarge",
    "Unauthenticated",
    "error_from_wire",
    "error_to_wire",
    "exit_code",
    "http_status",
]


class StokerError(Exception):
    """The root. ``details`` holds JSON-able facts for programs, ``console`` the last lines of the guest's console."""

    status: ClassVar[int] = 500
    exit: ClassVar[int] = 125

    def __init__(
        self,
        code: str,
        message: str,
        hint: str = "",
        *,
        details: dict[str, Any] | None = None,
        console: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.details = details or {}
        self.console = console

    def __str__(self) -> str:
        text = f"{self.message} [{self.code}]"
        return f"{text} (hint: {self.hint})" if self.hint else text


class InvalidRequest(StokerError):
    status = 400


class Unauthenticated(StokerError):
    status = 401


class Forbidden(StokerError):
    status = 403


class NotFound(StokerError):
    status = 404


class Conflict(StokerError):
    status = 409


class TooLarge(StokerError):
    status = 413


class CapacityExhausted(StokerError):
    status = 429


class CommandNotFound(StokerError):
    status = 422
    exit = 127


class CommandNotExecutable(StokerError):
    status = 422
    exit = 126


class GuestError(StokerError):
    status = 502


class HostError(StokerError):
    status = 503


class DeadlineExceeded(StokerError):
    status = 504
    exit = 124


class InternalError(StokerError):
    status = 500


FAMILIES: dict[str, type[StokerError]] = {
    family.__name__: family
    for family in (
        InvalidRequest,
        Unauthenticated,
        Forbidden,
        NotFound,
        Conflict,
        TooLarge,
        CapacityExhausted,
        CommandNotFound,
        CommandNotExecutable,
        GuestError,
        HostError,
        DeadlineExceeded,
        InternalError,
    )
}
_BY_STATUS: dict[int, type[StokerError]] = {400: InvalidRequest, **{f.status: f for f in FAMILIES.values() if f.status != 422}}


def http_status(error: StokerError) -> int:
    """The HTTP status an error is answered with."""
    return error.status


def exit_code(error: StokerError) -> int:
    """The exit code a command line ends with."""
    return error.exit


def error_to_wire(error: StokerError) -> dict[str, Any]:
    """What goes over the wire: ``{code, message, hint, family, details?, console?}``."""
    wire: dict[str, Any] = {
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "family": type(error).__name__ if type(error).__name__ in FAMILIES else "InternalError",
    }
    if error.details:
        wire["details"] = error.details
    if error.console:
        wire["console"] = list(error.console)
    return wire


def error_from_wire(status: int, wire: dict[str, Any]) -> StokerError:
    """The error a client raises for an answer; a family this client does not know is found by its status."""
    family = FAMILIES.get(str(wire.get("family", ""))) or _BY_STATUS.get(status, InternalError)
    return family(
        str(wire.get("code", "unknown")),
        str(wire.get("message", f"the server answered {status}")),
        str(wire.get("hint", "")),
        details=wire.get("details") or {},
        console=tuple(str(line) for line in wire.get("console") or ()),
    )
