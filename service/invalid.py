"""What pydantic found wrong, as one sentence."""

from pydantic import ValidationError

_TOLD = 5  # of what is wrong with one thing
_LONGEST = 200  # characters of a place, which may be the sender's own words


def reasons(error: ValidationError, whole: str = "the file") -> str:
    """Each wrong place and why, up to five of them; `whole` names what has no place inside."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    told = [f"{'.'.join(map(str, each['loc']))[:_LONGEST] or whole}: {each['msg']}" for each in found[:_TOLD]]
    return "; ".join([*told, *([f"and {len(found) - _TOLD} more"] if len(found) > _TOLD else [])])
