"""Turns what a server answers into exceptions of the one tree in shared/errors.py."""

from typing import TypeVar

from shared import errors
from shared.errors import TpserveError
from shared.messages import Cancelled, Failed
from shared.protocol import Event

E = TypeVar("E", bound=Event)


class RemoteError(TpserveError):
    """An error whose code has no class of its own here; `code` is the server's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class JobCancelledError(TpserveError):
    """A job ended by `cancel`, so it has no result; `text` and `token_ids` are what there was."""

    code = "cancelled"
    http_status = 499

    def __init__(self, text: str, token_ids: list[int]) -> None:
        super().__init__(f"the job was cancelled after {len(token_ids)} tokens")
        self.text = text
        self.token_ids = token_ids


# Every class of the tree that a message alone can make; its code is its name on the wire.
_CLASS_OF_CODE: dict[str, type[TpserveError]] = {
    value.code: value
    for value in vars(errors).values()
    if isinstance(value, type)
    and issubclass(value, TpserveError)
    and value.__init__ is TpserveError.__init__
}


def remote_error(code: str, message: str) -> TpserveError:
    """The exception for a `failed` event: the class that has this code, else RemoteError."""
    error_class = _CLASS_OF_CODE.get(code)
    return RemoteError(code, message) if error_class is None else error_class(message)


def expect(event: Event, answer: type[E]) -> E:
    """`event` as the answer to a request. Raises what `failed` and `cancelled` stand for."""
    if isinstance(event, Failed):
        error = remote_error(event.code, event.message)
        error.retry_after_s = event.retry_after_s
        raise error
    if isinstance(event, Cancelled) and not isinstance(event, answer):
        raise JobCancelledError(event.text, event.token_ids)
    if not isinstance(event, answer):
        raise TpserveError(f"the server answered {event} where {answer.__name__} is due")
    return event
