"""Everything this service can say no with. No HTTP here: `app.problems` gives each one its status.

- ServiceError
  - InvalidRequest          the caller's parameters
    - InvalidImage          the bytes are no image that can be decoded
  - ImageTooLarge           more bytes or pixels than a setting allows
  - ModelNotFound           no such model, version or variant
  - WeightsUnavailable      a known model whose weights are not in the store
    - PullFailed            nor can they be fetched
    - StoreUnreachable      a remote store that does not answer, or refuses
    - StoreCacheFailed      the local copy of a remote store has no room, or can't be written
  - AliasesInvalid          the store's aliases.json is broken
  - StoreNotWritable        the store can't be changed from here
  - ModelLoadFailed         the model is in the store and can't be loaded
    - CardInvalid           its card.json
    - WeightsInvalid        its weights file
      - WeightsCorrupt      truncated or not in its own format
      - WeightsDigestMismatch   not the bytes the card speaks of
      - WeightsUnsafe       a pickle that would run code
      - WeightsMismatch     tensors missing, unexpected or misshapen
      - WeightsNotFinite    NaN or infinity inside
    - ReferenceInvalid      its reference images
    - GoldenMismatch        what runs it does not give the logits it should
    - BackendUnavailable    the backend that was asked for can't run here
  - ModelLoading            on its way into memory, and the caller would not wait; carries when to come back
  - MemoryBudgetExceeded    the model does not fit beside those that can't leave memory now
  - ModelPinned             the model is to stay in memory
  - OutOfMemory             a batch did not fit; the scheduler retries with less
  - DeviceFailed            a GPU that no longer works; only a restart helps
  - QueueFull               refused at admission; carries when to come back
  - DeadlineExceeded        not answered in the time the request allowed
  - ShuttingDown            the service takes no new work
"""

from pydantic import ValidationError

_MOST_REASONS = 5  # of what is wrong with one object
_LONGEST_PLACE = 200  # characters of a place, which may be the sender's own words


class ServiceError(Exception):
    """Base of all errors that a caller may be told of; `str()` is the sentence to show.

    The message alone makes one, as `copy` does it: each of those who waited for the same thing has one of its own.
    """


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


class BackendUnavailable(ModelLoadFailed):
    """The backend or device that a setting asks for can't run on this machine."""


class ModelLoading(ServiceError):
    """The model is being loaded, and the caller asked not to wait for longer.

    `retry_after_seconds` is when it is likely to be ready, from what loading it took before.
    """

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class MemoryBudgetExceeded(ServiceError):
    """The model does not fit into memory beside what can't be evicted; the message gives the figures.

    `retry_after_seconds` is when it may fit; None if it never will, as things are.
    """

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ModelPinned(ServiceError):
    """The model is pinned in memory and is not unloaded before that ends."""


class OutOfMemory(ServiceError):
    """A batch did not fit into memory."""


class DeviceFailed(ServiceError):
    """A GPU gives nothing but errors from now on; the message has the first one."""


class QueueFull(ServiceError):
    """The queue is at its bound.

    `retry_after_seconds` is when a place is likely to be free, from the queue's length and measured batch times.
    """

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


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
