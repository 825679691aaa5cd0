from __future__ import annotations

import math
import random

import pytest

from dots_ocr_client.engines.admission import FAILURES, MAX_PAUSE, PATIENCE, PAUSE, Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Breaker:
    monkeypatch.setattr(random, "random", lambda: 0.0)  # whole pauses
    return Breaker(clock)


def fail(breaker: Breaker, times: int = FAILURES) -> None:
    for _ in range(times):
        breaker.failed(breaker.age, "gone")


def test_it_opens_after_so_many_failures_in_a_row(breaker: Breaker) -> None:
    fail(breaker, FAILURES - 1)
    assert breaker.state == "closed"
    fail(breaker, 1)
    assert (breaker.state, breaker.seconds_left) == ("open", PAUSE)


def test_a_success_in_between_starts_the_count_anew(breaker: Breaker) -> None:
    fail(breaker, FAILURES - 1)
    breaker.succeeded()
    fail(breaker, FAILURES - 1)
    assert breaker.state == "closed"


def test_nobody_probes_while_it_is_closed_or_pauses(breaker: Breaker, clock: Clock) -> None:
    assert not breaker.begin_probe()
    fail(breaker)
    clock.now += PAUSE - 0.01
    assert not breaker.begin_probe()


def test_one_page_at_a_time_probes(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += PAUSE
    assert [breaker.begin_probe() for _ in range(3)] == [True, False, False]
    assert breaker.state == "half-open"


def test_a_probe_that_is_abandoned_lets_the_next_page_probe(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += PAUSE
    assert breaker.begin_probe()
    breaker.abandon_probe()
    assert breaker.state == "open"
    assert breaker.begin_probe()


def test_pauses_double_up_to_the_longest_and_start_anew_after_it_closed(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    pauses = []
    for _ in range(6):
        pauses.append(breaker.seconds_left)
        clock.now += breaker.seconds_left
        assert breaker.begin_probe()
        breaker.open("still gone")
    assert pauses == [1.0, 2.0, 4.0, 8.0, MAX_PAUSE, MAX_PAUSE]
    clock.now += breaker.seconds_left
    assert breaker.begin_probe()
    breaker.close()
    assert (breaker.state, breaker.seconds_left) == ("closed", 0.0)
    fail(breaker)
    assert breaker.seconds_left == PAUSE


def test_pauses_grow_only_once_an_engine_that_went_away_is_known_to_be_down(breaker: Breaker, clock: Clock) -> None:
    for _ in range(FAILURES):
        clock.now += 0.5
        breaker.failed(breaker.age, "gone", gone=True)
    pauses = []
    while breaker.gone_for < PATIENCE + 6:
        pauses.append(breaker.seconds_left)
        clock.now += breaker.seconds_left
        assert breaker.begin_probe()
        breaker.open("still gone")
    assert pauses == [PAUSE] * 9 + [PAUSE, 2.0, 4.0]


def test_it_knows_for_how_long_an_engine_has_been_away(breaker: Breaker, clock: Clock) -> None:
    breaker.failed(breaker.age, "hangs")
    assert breaker.gone_for == math.inf
    breaker.failed(breaker.age, "gone", gone=True)
    clock.now += 3
    assert breaker.gone_for == 3.0
    breaker.succeeded()
    assert breaker.gone_for == math.inf
    for _ in range(FAILURES):
        breaker.failed(breaker.age, "gone", gone=True)
        clock.now += 1
    breaker.succeeded()  # a page that was sent before
    assert (breaker.state, breaker.gone_for) == ("open", 3.0)
    breaker.close()
    assert breaker.gone_for == math.inf


def test_pauses_are_shortened_at_random(clock: Clock) -> None:
    seen = set()
    for _ in range(50):
        breaker = Breaker(clock)
        fail(breaker)
        seen.add(breaker.seconds_left)
    assert len(seen) > 10
    assert PAUSE / 2 <= min(seen) < max(seen) <= PAUSE


def test_a_failure_of_a_page_that_was_sent_before_it_closed_does_not_count(breaker: Breaker, clock: Clock) -> None:
    before = breaker.age
    fail(breaker)
    clock.now += PAUSE
    assert breaker.begin_probe()
    breaker.close()
    for _ in range(FAILURES):
        breaker.failed(before, "gone")
    assert breaker.state == "closed"


def test_failures_while_it_is_open_do_not_lengthen_the_pause(breaker: Breaker) -> None:
    fail(breaker, 3 * FAILURES)
    assert breaker.seconds_left == PAUSE
