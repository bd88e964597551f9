"""A clock that stands still while the process does."""

import pytest

from service import awake
from service.awake import AwakeClock


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(awake, "monotonic", time)
    return time


def run(clock: AwakeClock, time: Time, seconds: float) -> None:
    for _ in range(round(seconds / 0.5)):
        time.now += 0.5
        clock.tick()


def test_all_time_counts_while_it_ticks(time: Time) -> None:
    clock = AwakeClock(0.5)
    run(clock, time, 10)

    assert clock.since(100) == 10
    assert clock.since(104) == 6
    assert clock.since(200) == 0


def test_a_pause_does_not_count_before_the_first_tick_after_it_nor_later(time: Time) -> None:
    clock = AwakeClock(0.5)
    run(clock, time, 10)
    time.now += 60
    at_once = clock.since(100)
    clock.tick()
    run(clock, time, 10)

    assert at_once == 10.5
    assert clock.since(100) == 20.5
    assert clock.since(150) == 10.0  # what began within the pause
    assert clock.since(175) == 5


def test_a_tick_that_is_a_little_late_is_no_pause(time: Time) -> None:
    clock = AwakeClock(0.5)
    time.now += 0.9
    clock.tick()

    assert clock.since(100) == pytest.approx(0.9)
