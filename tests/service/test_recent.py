"""Counts of the last minute, on a clock of the test's own."""

from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from service.recent import Recent


class Clock:
    def __init__(self) -> None:
        self.now = 1000.25

    def __call__(self) -> float:
        return self.now


def test_whole_seconds_are_counted_and_the_current_one_is_not_yet() -> None:
    clock = Clock()
    recent = Recent[str](clock)

    recent.count("a")
    recent.count("a")
    assert (recent.counts(), recent.seconds) == ({}, 0)

    clock.now += 1
    recent.count("b")
    assert (recent.counts(), recent.seconds) == ({"a": 2}, 1)


def test_what_is_older_than_a_minute_is_forgotten() -> None:
    clock = Clock()
    recent = Recent[str](clock)
    recent.count("a")
    clock.now += 60
    assert (recent.counts(), recent.seconds) == ({"a": 1}, 60)

    clock.now += 1

    assert (recent.counts(), recent.seconds) == ({}, 60)


def test_a_long_pause_costs_no_more_than_a_minute() -> None:
    clock = Clock()
    recent = Recent[str](clock)
    recent.count("a")

    clock.now += 1e9  # a turn for each second of that would take hours
    recent.count("b")
    assert recent.counts() == {}

    clock.now += 1
    assert recent.counts() == {"b": 1}


def test_counts_are_those_of_a_list_of_all_times() -> None:
    clock, rng = Clock(), np.random.default_rng(1)
    start = clock.now
    recent = Recent[int](clock)
    times: list[tuple[int, int]] = []
    for _ in range(5000):
        clock.now += rng.choice((0, 0.01, 0.2, 3, 70) if rng.random() < 0.01 else (0, 0.05))
        key = int(rng.integers(3))
        recent.count(key)
        times.append((int(clock.now - start), key))

        now = int(clock.now - start)
        assert recent.counts() == Counter(each for second, each in times if now - 60 <= second < now)


def test_threads_count_together() -> None:
    clock = Clock()
    recent = Recent[str](clock)

    with ThreadPoolExecutor(4) as threads:
        for _ in range(4):
            threads.submit(lambda: deque(map(recent.count, "a" * 5000), 0))

    clock.now += 1
    assert recent.counts() == {"a": 20_000}
