"""What a request may name, and what the sender of another name may have meant."""

from typing import Self

import orjson
from pydantic import BaseModel, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from service.names import meant

_MOST = 5  # unknown names of one object that are looked up; more than a response lists
_SHOWN = 100  # characters of a name


class Strict(BaseModel, extra="forbid"):
    """Takes no other names than its fields', and says for another one which are near and which there are.

    A body that came with another content type than JSON's, such as curl's, is JSON too.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _name_known(cls, value: object, check: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, bytes):
            try:
                value = orjson.loads(value)
            except orjson.JSONDecodeError as error:
                raise PydanticCustomError("json_invalid", "no JSON: {reason}", {"reason": str(error)}) from error
        try:
            return check(value)
        except ValidationError as error:
            found = error.errors(include_url=False)
            if not any(each["type"] == "extra_forbidden" for each in found):
                raise
            details = [
                InitErrorDetails(
                    type=PydanticCustomError(
                        "unknown_name" if (unknown := each["type"] == "extra_forbidden") else each["type"],
                        "{reason}",
                        {"reason": cls._known_names(str(each["loc"][-1])) if unknown and n < _MOST else each["msg"]},
                    ),
                    loc=each["loc"],
                    input=each["input"],
                )
                for n, each in enumerate(found)
            ]
            raise ValidationError.from_exception_data(error.title, details) from error

    @classmethod
    def _known_names(cls, name: str) -> str:
        return f"no such name{meant(name[:_SHOWN], cls.model_fields) or ';'} there are {', '.join(cls.model_fields)}"
