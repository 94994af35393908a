"""What the server needs of an engine for templates and warm sets; a part of :mod:`stoker.server.ports`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from stoker.api.models import BuildTemplate, Operation, OperationLog, Principal, SetWarm, Template, WarmSet

__all__ = ["TemplateEngine", "Templates", "Warm"]


class Templates(Protocol):
    """Names that sandboxes are created from. ``template`` is a name or an id; ``template_unknown`` (NotFound)."""

    async def get(self, who: Principal, template: str) -> Template: ...

    async def list(self, who: Principal) -> Sequence[Template]:
        """Newest first, without their logs."""

    async def remove(self, who: Principal, template: str) -> None:
        """Sandboxes that were made from it stay."""


class Warm(Protocol):
    """Machines that are up and wait for a create."""

    async def set(self, who: Principal, request: SetWarm) -> WarmSet:
        """How many wait; 0 ends the set. ``warm_unfit`` (InvalidRequest), ``too_many_warm_sets`` (CapacityExhausted)."""

    async def list(self, who: Principal) -> Sequence[WarmSet]: ...

    async def remove(self, who: Principal, warm: str) -> None: ...


class TemplateEngine(Protocol):
    @property
    def templates(self) -> Templates: ...

    @property
    def warm(self) -> Warm: ...

    async def build_template(self, who: Principal, request: BuildTemplate) -> Operation:
        """Begins; ``operation.template`` is the id of what there will be. ``template_building`` (Conflict),
        ``too_many_templates`` (CapacityExhausted). The operation may fail with ``template_step_failed``,
        ``template_step_timeout``, ``template_start_failed``, ``template_not_ready``, and as a create or a snapshot does."""

    def operation_log(self, who: Principal, operation: str, start: int) -> AbstractAsyncContextManager[AsyncIterator[OperationLog]]:
        """Lines from a number on, as they come, until the operation has ended. ``log_unknown`` (NotFound)."""
