"""Budgets, quotas, what would fit, and the fair queue."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.api.models import Quota
from stoker.engine.admission import FIRST_TOUCH, MEMORY_RESERVE, VMM_OVERHEAD, Admission, BootQueue, HostFacts, host_facts
from stoker.errors import CapacityExhausted
from stoker.settings import Settings

MIB, GIB = 1 << 20, 1 << 30
SETTINGS = Settings(Path("/nowhere"), Path("/nowhere"), Path("/nowhere"))
HOST = HostFacts(memory_total=24 * GIB, memory_available=22 * GIB, cpus=2, disk_free=100 * GIB)


def book(facts: HostFacts = HOST, **settings: int) -> Admission:
    return Admission(replace(SETTINGS, **settings), lambda: facts)  # type: ignore[arg-type]


def admit(admission: Admission, name: str, *, memory: int = 512 * MIB, cpus: int = 1, disk: int = 0, **more: object) -> None:
    admission.admit(name, owner=str(more.pop("owner", "local")), memory=memory, cpus=cpus, disk=disk, **more)  # type: ignore[arg-type]


def test_fifty_of_512_fit_on_24_gib() -> None:
    admission = book()
    for n in range(50):
        admit(admission, f"sb-{n}")
    assert admission.totals().sandboxes == 50


def test_what_is_there_now_counts_too() -> None:
    """Machines that were admitted and have not touched their memory yet are still going to."""
    admission = book(replace(HOST, memory_available=MEMORY_RESERVE + 3 * FIRST_TOUCH))
    for n in range(3):
        admit(admission, f"sb-{n}")
    with pytest.raises(CapacityExhausted):
        admit(admission, "sb-4")
    admission.settle("sb-0")
    admit(admission, "sb-4")


def test_the_impossible_says_what_would_fit() -> None:
    admission = book(budget_memory=2 * GIB)
    admit(admission, "sb-0", memory=GIB)
    with pytest.raises(CapacityExhausted) as caught:
        admit(admission, "sb-1", memory=4 * GIB)
    details = caught.value.details
    assert caught.value.code == "capacity_exhausted" and details["resource"] == "memory" and details["scope"] == "host"
    admit(admission, "sb-1", memory=details["fits"])
    assert admission.totals().memory == 2 * GIB


def test_more_than_the_host_has_never_fits() -> None:
    with pytest.raises(CapacityExhausted):
        admit(book(), "sb-0", memory=23 * GIB)


@pytest.mark.parametrize(
    ("settings", "values", "resource"),
    [
        ({"budget_cpus": 3}, {"cpus": 2}, "cpus"),
        ({"budget_disk": 3 * GIB}, {"disk": 2 * GIB}, "disk"),
        ({"max_sandboxes": 1}, {}, "sandboxes"),
    ],
)
def test_every_budget(settings: dict[str, int], values: dict[str, int], resource: str) -> None:
    admission = book(**settings)
    admit(admission, "sb-0", **values)
    with pytest.raises(CapacityExhausted) as caught:
        admit(admission, "sb-1", **values)
    assert caught.value.details["resource"] == resource
    admission.release("sb-0")
    admit(admission, "sb-1", **values)


def test_a_full_disk_refuses() -> None:
    with pytest.raises(CapacityExhausted) as caught:
        admit(book(replace(HOST, disk_free=10 * MIB)), "sb-0")
    assert caught.value.details["resource"] == "disk"


def test_a_key_has_its_quota_and_others_their_room() -> None:
    admission = book()
    quota = Quota(sandboxes=2, memory=GIB)
    admit(admission, "sb-0", owner="key-a", memory=GIB, quota=quota)
    with pytest.raises(CapacityExhausted) as caught:
        admit(admission, "sb-1", owner="key-a", quota=quota)
    assert caught.value.details == {"resource": "memory", "scope": "key", "asked": 512 * MIB, "fits": 0}
    admit(admission, "sb-2", owner="key-b", memory=GIB, quota=quota)


def test_a_stopped_one_holds_disk_and_count_only() -> None:
    admission = book(budget_memory=GIB + VMM_OVERHEAD, max_sandboxes=2)
    admit(admission, "sb-0", memory=GIB, disk=GIB)
    admission.rest("sb-0")
    assert admission.totals() == Quota(sandboxes=1, disk=GIB)
    admit(admission, "sb-1", memory=GIB)
    with pytest.raises(CapacityExhausted):
        admit(admission, "sb-0", memory=GIB, disk=GIB)
    assert admission.totals().sandboxes == 2
    admission.release("sb-1")
    admit(admission, "sb-0", memory=GIB, disk=GIB)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 2048), st.sampled_from(["admit", "rest", "release", "settle"]))))
def test_the_budget_is_never_passed(steps: list[tuple[int, int, str]]) -> None:
    admission = book(budget_memory=3 * GIB, max_sandboxes=4)
    for number, mib, what in steps:
        name = f"sb-{number}"
        if what == "admit":
            try:
                admit(admission, name, memory=mib * MIB)
            except CapacityExhausted:
                pass
        else:
            getattr(admission, what)(name)
        totals = admission.totals()
        assert totals.memory <= 3 * GIB and totals.sandboxes <= 4


def test_this_host_has_something(tmp_path: Path) -> None:
    facts = host_facts(tmp_path)
    assert facts.memory_total >= facts.memory_available > 0 and facts.cpus > 0 and facts.disk_free > 0


@pytest.mark.anyio
async def test_turns_go_round_the_owners() -> None:
    queue, order = BootQueue(1), []

    async def boot(owner: str) -> None:
        async with queue.turn(owner):
            order.append(owner)
            await asyncio.sleep(0)

    await asyncio.gather(*(boot(owner) for owner in "aaaabbc"))
    assert order == ["a", "a", "b", "c", "a", "b", "a"] or order[:4].count("a") <= 2
    assert sorted(order) == sorted("aaaabbc")


@pytest.mark.anyio
async def test_whoever_gives_up_holds_nobody_back() -> None:
    queue = BootQueue(2)
    gate = asyncio.Event()
    done: list[int] = []

    async def boot(number: int) -> None:
        async with queue.turn("a"):
            await gate.wait()
            done.append(number)

    tasks = [asyncio.create_task(boot(n)) for n in range(8)]
    await asyncio.sleep(0)
    for number in (0, 3, 4):
        tasks[number].cancel()
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(done) == [1, 2, 5, 6, 7]
    async with asyncio.timeout(1), queue.turn("b"), queue.turn("b"):
        pass
