"""What is left of an image's way, wherever it ended; the spans made of it are tested in tests/app/test_tracing.py."""

from typing import Any

import pytest
from opentelemetry.trace import INVALID_SPAN

from service.results import Timing
from service.tracing import ImageTrace, RequestTrace, Stage, current, submitted


def request(*, recorded: bool = True) -> RequestTrace:
    return RequestTrace(INVALID_SPAN, {}, recorded=recorded)


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({}, [Stage("wait", 1.0, 9.0, finished=False)]),
        ({"decoding": 2.0}, [Stage("wait", 1.0, 2.0), Stage("decode", 2.0, 9.0, finished=False)]),
        (
            {"decoding": 2.0, "decoded": 3.0, "ended": 8.0},
            [Stage("wait", 1.0, 2.0), Stage("decode", 2.0, 3.0), Stage("queue", 3.0, 8.0, finished=False)],
        ),
        (
            {"decoding": 2.0, "decoded": 3.0, "running": 5.0, "ended": 8.0},
            [
                *(Stage("wait", 1.0, 2.0), Stage("decode", 2.0, 3.0), Stage("queue", 3.0, 5.0)),
                Stage("infer", 5.0, 8.0, finished=False),
            ],
        ),
    ],
)
def test_an_image_that_failed_did_so_in_its_last_stage(marks: dict[str, Any], expected: list[Stage]) -> None:
    image = ImageTrace(request(), 1.0, **marks)

    assert [*image.stages(9.0)] == expected


def test_an_answered_image_has_the_stages_of_its_timing_up_to_its_batch() -> None:
    image = ImageTrace(request(), 1.0, timing=Timing(0.5, 1.0, 2.0, 4.0), batch_began=10.0, decoding=3.0)

    assert [*image.stages(20.0)] == [
        Stage("wait", 6.5, 7.0),
        Stage("decode", 7.0, 8.0),
        Stage("queue", 8.0, 10.0),
        Stage("infer", 10.0, 14.0),
    ]


def test_a_request_has_the_stages_of_its_slowest_image_after_the_load() -> None:
    owner = request()
    owner.loading, owner.loaded = 0.0, 1.0
    owner.images = [
        ImageTrace(owner, 1.0, timing=Timing(0.0, 1.0, 0.0, seconds), batch_began=2.0) for seconds in (1.0, 3.0, 2.0)
    ]
    owner.images.append(ImageTrace(owner, 1.0, ended=50.0))  # which failed

    assert [(each.name, each.start, each.end) for each in owner.stages(60.0)] == [
        ("load", 0.0, 1.0),
        ("wait", 1.0, 1.0),
        ("decode", 1.0, 2.0),
        ("queue", 2.0, 2.0),
        ("infer", 2.0, 5.0),
    ]


def test_a_request_that_got_no_model_ended_in_its_load() -> None:
    owner = request()
    owner.loading = 1.0

    assert [*owner.stages(4.0)] == [Stage("load", 1.0, 4.0, finished=False)]


@pytest.mark.parametrize("owner", [None, request(recorded=False)])
def test_an_image_of_a_request_that_is_not_recorded_leaves_nothing(owner: RequestTrace | None) -> None:
    token = current.set(owner)
    try:
        assert submitted(1.0) is None
        assert owner is None or owner.images == []
    finally:
        current.reset(token)
