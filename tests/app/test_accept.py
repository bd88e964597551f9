import pytest
from fastapi import Request

from app.accept import choose
from app.problems import NotAcceptable

OFFERED = ("application/json", "application/x-npz", "image/png")


def request(*accept: str) -> Request:
    return Request({"type": "http", "headers": [(b"accept", each.encode()) for each in accept]})


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ([], "application/json"),
        (["*/*"], "application/json"),
        (["application/*"], "application/json"),
        (["image/*"], "image/png"),
        (["application/x-npz"], "application/x-npz"),
        (["application/json;q=0.5, image/png"], "image/png"),
        (["text/html", "application/x-npz;q=0.1"], "application/x-npz"),
        (["text/html,application/xhtml+xml,*/*;q=0.8"], "application/json"),
    ],
)
def test_the_form_that_the_caller_likes_best_is_chosen(accept: list[str], chosen: str) -> None:
    assert choose(request(*accept), OFFERED) == chosen


@pytest.mark.parametrize("accept", ["text/html", "nonsense", ";;", "a/b/c", "application/json;q=0", "\xff"])
def test_who_takes_none_of_them_is_told_what_there_is(accept: str) -> None:
    with pytest.raises(NotAcceptable, match="answers with application/json, application/x-npz, image/png"):
        choose(request(accept), OFFERED)
