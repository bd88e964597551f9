"""The name that somebody may have meant."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

_BETWEEN_WORDS = re.compile(r"[\W_]+")


def meant(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the one of `known` that `name` may stand for; nothing where there is none.

    It is the same but for case and punctuation, or the shortest with all words of `name`, or the most similar.
    """
    name, plain, names = name.lower(), _plain(name), sorted(known, key=len)
    words = {*_BETWEEN_WORDS.split(name)} - {""}
    near = [each for each in names if _plain(each) == plain]
    near += [each for each in names if words and words <= {*_BETWEEN_WORDS.split(each.lower())}]
    by_lower = {each.lower(): each for each in names}
    near += [by_lower[each] for each in get_close_matches(name, by_lower, n=1, cutoff=0.5)]
    return f"; did you mean {near[0]!r}?" if near else ""


def _plain(name: str) -> str:
    return _BETWEEN_WORDS.sub("", name.lower())
