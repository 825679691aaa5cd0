from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from dots_ocr_client import Limiter
from dots_ocr_client.engines import admission


async def hold(slots: Limiter, until: asyncio.Event, order: list[int] | None = None, number: int = 0) -> None:
    async with slots:
        if order is not None:
            order.append(number)
        await until.wait()


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def crowd(slots: Limiter, size: int, order: list[int] | None = None) -> AsyncIterator[list[asyncio.Task[None]]]:
    """So many tasks that each want a slot and keep it until the end."""
    until = asyncio.Event()
    tasks = [asyncio.create_task(hold(slots, until, order, number)) for number in range(size)]
    await settle()
    yield tasks
    until.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert slots.in_flight == 0


def test_no_more_slots_are_held_than_there_are_and_first_come_is_first_served() -> None:
    async def run() -> None:
        slots, order = Limiter(start=3, cap=3), list[int]()
        async with crowd(slots, 8, order):
            assert (slots.in_flight, order) == (3, [0, 1, 2])
        assert order == list(range(8))

    asyncio.run(run())


def test_an_error_gives_the_slot_back() -> None:
    async def run() -> None:
        slots = Limiter(start=1, cap=1)
        with pytest.raises(KeyError):
            async with slots:
                raise KeyError
        async with asyncio.timeout(1), slots:
            assert slots.in_flight == 1

    asyncio.run(run())


def test_the_limit_grows_by_one_with_each_success_up_to_the_cap() -> None:
    async def run() -> None:
        slots = Limiter(start=2, cap=4)
        async with crowd(slots, 9):
            for expected in (3, 4, 4):
                slots.succeeded()
                await settle()
                assert (slots.limit, slots.in_flight) == (expected, expected)

    asyncio.run(run())


def test_a_client_that_knows_nothing_of_its_server_has_all_slots_at_once_and_few_when_it_is_back() -> None:
    async def run() -> None:
        slots = Limiter()
        async with crowd(slots, 65):
            assert slots.in_flight == admission.CAP
        slots.restart()
        async with crowd(slots, 65):
            assert slots.in_flight == 4
            for _ in range(4):
                slots.succeeded()
            assert slots.limit == 8

    asyncio.run(run())


def test_the_limit_does_not_grow_while_it_keeps_nobody_waiting() -> None:
    async def run() -> None:
        slots = Limiter(start=4, cap=8)
        async with crowd(slots, 3):
            slots.succeeded()
        assert slots.limit == 4

    asyncio.run(run())


def test_an_overload_halves_the_limit_for_those_who_come_then() -> None:
    async def run() -> None:
        slots = Limiter(start=8, cap=8)
        async with crowd(slots, 8):
            slots.overloaded()
            assert (slots.limit, slots.in_flight) == (4, 8)
        async with crowd(slots, 8):
            assert slots.in_flight == 4

    asyncio.run(run())


def test_complaints_about_one_overload_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Limiter(start=16, cap=16)
    slots.overloaded()
    slots.overloaded()
    assert slots.limit == 8
    monkeypatch.setattr(admission, "SAME_OVERLOAD", 0.0)
    for _ in range(9):
        slots.overloaded()
    assert slots.limit == 1


def test_after_an_overload_the_limit_grows_by_one_in_a_round() -> None:
    async def run() -> None:
        slots = Limiter(start=8, cap=8)
        slots.overloaded()
        async with crowd(slots, 9):
            for _ in range(3):
                slots.succeeded()
            assert slots.limit == 4
            for _ in range(2):
                slots.succeeded()
            assert slots.limit == 5

    asyncio.run(run())


@pytest.mark.parametrize("victims", [[2], [3], [2, 3], [0, 2], [0, 2, 3, 4], [1, 0]])
def test_whoever_stops_waiting_or_working_takes_no_slot_away(victims: list[int]) -> None:
    async def run() -> None:
        slots, order = Limiter(start=2, cap=2), list[int]()
        async with crowd(slots, 6, order) as tasks:
            for victim in victims:
                tasks[victim].cancel()  # all at once: a slot may be on its way to one that is cancelled
            await settle()
            assert slots.in_flight == 2
        assert set(order) >= set(range(6)) - set(victims)

    asyncio.run(run())


@pytest.mark.parametrize("given_first", [True, False])
def test_a_slot_goes_to_the_next_if_its_taker_is_cancelled_in_that_moment(given_first: bool) -> None:
    async def run() -> None:
        slots, order = Limiter(start=1, cap=1), list[int]()
        await slots.__aenter__()
        async with crowd(slots, 2, order) as tasks:
            if given_first:
                await slots.__aexit__(None, None, None)
            tasks[0].cancel()
            if not given_first:
                await slots.__aexit__(None, None, None)
            await settle()
            assert (tasks[0].cancelled(), order, slots.in_flight) == (True, [1], 1)

    asyncio.run(run())


@pytest.mark.parametrize(("start", "cap"), [(0, 4), (5, 4), (-1, -1)])
def test_limits_that_make_no_sense_are_refused(start: int, cap: int) -> None:
    with pytest.raises(ValueError, match="1 <= start <= cap"):
        Limiter(start, cap)
