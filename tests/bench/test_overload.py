"""What is compared runs in turn, and the median of each is taken."""

from collections.abc import Callable

from bench.overload import _in_turn


def test_ways_run_in_turn_and_give_their_medians() -> None:
    order: list[int] = []
    answers = {1: iter([1.0, 9.0, 2.0]), 2: iter([5.0, 4.0, 6.0])}

    def way(name: int) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return next(answers[name])

        return run

    assert _in_turn({1: way(1), 2: way(2)}, 3) == {1: 2.0, 2: 5.0}
    assert order == [1, 2] * 3
