"""Every error that a caller may see; a class's base says what kind it is. `app.problems` gives each its HTTP status."""

from pydantic import ValidationError

_MOST_REASONS = 5  # of what is wrong with one object
_LONGEST_PLACE = 200  # characters of a place, which may be the sender's own words


class ServiceError(Exception):
    """Base of all errors that a caller may see; `str()` is the sentence to show.

    `retry_after_seconds` says when the request may succeed, where that is known. The message alone makes an error, so
    `copy` gives each of those who waited for the same thing one of its own.
    """

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class InvalidRequest(ServiceError):
    """A parameter of the request is wrong; the message names it."""


class InvalidImage(InvalidRequest):
    """The bytes can't be decoded as an image; the message says why."""


class ImageTooLarge(ServiceError):
    """An image exceeds a limit; the message names the limit and its setting."""


class ModelNotFound(ServiceError):
    """No model of that name is known; the message lists near ones."""


class WeightsUnavailable(ServiceError):
    """The model is known and its weights are not in the store; the message says what to do."""


class PullFailed(WeightsUnavailable):
    """Published weights can't be fetched; the message says why, and what to do."""


class AliasesInvalid(ServiceError):
    """The store's aliases.json is broken, so that no alias can be told; models are still called by their names."""


class StoreNotWritable(ServiceError):
    """The store can't be written from here; the message gives the reason."""


class StoreUnreachable(WeightsUnavailable):
    """A remote store does not answer, or refuses; the message says which, and why."""


class StoreCacheFailed(WeightsUnavailable):
    """The local copy of a remote store has no room, or can't be written; the message names the setting."""


class ModelLoadFailed(ServiceError):
    """A model in the store can't be loaded; the message gives the reason."""


class CardInvalid(ModelLoadFailed):
    """A model card is missing, is no JSON or breaks its schema."""


class WeightsInvalid(ModelLoadFailed):
    """Base of all that can be wrong with a weights file."""


class WeightsCorrupt(WeightsInvalid):
    """The file is truncated or is not in the format its name says."""


class WeightsDigestMismatch(WeightsInvalid):
    """The file's SHA-256 is not the expected one."""


class WeightsUnsafe(WeightsInvalid):
    """The pickle asks for more than tensors and is refused."""


class WeightsMismatch(WeightsInvalid):
    """Tensors are missing, unexpected or misshapen; the message lists them by name."""


class WeightsNotFinite(WeightsInvalid):
    """A tensor holds NaN or infinity; the message names it."""


class ReferenceInvalid(ModelLoadFailed):
    """The reference images of a card are missing, changed or of the wrong shape."""


class GoldenMismatch(ModelLoadFailed):
    """No backend reproduces the model's reference logits; the message says by how much each is off."""


class AnswersWrong(ModelLoadFailed):
    """A loaded model gave wrong logits for a canary image, and so it did when it was loaded again."""


class BackendUnavailable(ModelLoadFailed):
    """The backend or device that a setting asks for can't run on this machine."""


class ModelLoading(ServiceError):
    """The model is being loaded, and the caller asked not to wait for longer."""


class MemoryBudgetExceeded(ServiceError):
    """The model does not fit into memory beside what can't be evicted; the message gives the figures."""


class ModelPinned(ServiceError):
    """The model is pinned in memory and is not unloaded before that ends."""


class MemoryExhausted(ServiceError):
    """So many bytes do not fit into memory beside what is in use; the message gives the figures."""


class OutOfMemory(ServiceError):
    """A batch did not fit into memory."""


class DeviceFailed(ServiceError):
    """A GPU gives nothing but errors from now on; the message has the first one."""


class QueueFull(ServiceError):
    """The queue is at its bound."""


class DeadlineExceeded(ServiceError):
    """The request's time ran out before its answer was there."""


class ShuttingDown(ServiceError):
    """The service is draining and takes no new work."""


def reasons(error: ValidationError, whole: str = "the file") -> str:
    """What pydantic found wrong, as one sentence: up to five places, each with its reason.

    `whole` names what is wrong as a whole.
    """
    found = error.errors(include_url=False, include_input=False, include_context=False)
    places = [f"{'.'.join(map(str, each['loc']))[:_LONGEST_PLACE] or whole}: {each['msg']}" for each in found]
    more = [f"and {len(found) - _MOST_REASONS} more"] if len(found) > _MOST_REASONS else []
    return "; ".join([*places[:_MOST_REASONS], *more])
