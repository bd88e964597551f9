from collections.abc import Iterator
from copy import copy

import pytest

from service import errors


def everything(kind: type[errors.ServiceError]) -> Iterator[type[errors.ServiceError]]:
    for each in kind.__subclasses__():
        if each.__module__ == errors.__name__:
            yield each
            yield from everything(each)


@pytest.mark.parametrize("kind", [*everything(errors.ServiceError)])
def test_an_error_can_be_copied_for_each_of_those_who_waited(kind: type[errors.ServiceError]) -> None:
    error = kind("no room")
    error.__dict__["retry_after_seconds"] = 2.5

    other = copy(error)

    assert (type(other), str(other), vars(other)) == (kind, "no room", {"retry_after_seconds": 2.5})
