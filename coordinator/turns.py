"""What a turn of a session does in the database: before its job, and after it.

Between the two nothing is held open. `begin` stores what the user said, `end` the answers, and
`take_back` undoes `begin` for a job that was refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy import Row

from coordinator.session_tree import NewMessage, Shelf, params_of
from shared.errors import InvalidRequestError
from shared.messages import Generate, Message
from shared.session_messages import ContinueTurn, EditTurn, Regenerate, SendTurn, TurnRequest


@dataclass(frozen=True)
class BegunTurn:
    """A turn whose answer is to be written."""

    session: int
    parent: int | None
    """The message that the answer follows."""
    user_message: int | None
    """Stored by `begin`; None: nothing new."""
    continues: int | None
    """The answer that is written on; None: a new one."""
    job: Generate
    before: Row[Any]
    """The session as it was."""
    title: str = ""
    """That the turn has made for it, if it had none."""
    selected: Mapping[int, int | None] = field(default_factory=dict)
    """Messages after which another child was selected, and that child."""


def begin(shelf: Shelf, request: TurnRequest) -> BegunTurn:
    """Store what the user said and make the job for its answer.

    Raises SessionNotFoundError, InvalidRequestError.
    """
    row = shelf.row(request.session)
    match request:
        case SendTurn():
            if row.kind == "chat" and not request.text:
                raise InvalidRequestError("text is empty: say something, or use regenerate")
            if not request.text:
                return _begun(shelf, request, row, row.leaf_id)
            return _with_user_message(shelf, request, row, row.leaf_id, request.text)
        case EditTurn():
            edited = shelf.message(request.session, request.message)
            if edited.role != "user":
                raise InvalidRequestError(
                    f"message {request.message} is the {edited.role}'s: edit takes one of the "
                    "user's, regenerate writes another answer"
                )
            return _with_user_message(shelf, request, row, edited.parent_id, request.text)
        case Regenerate():
            chosen = row.leaf_id if request.message is None else request.message
            if chosen is None:
                raise InvalidRequestError(
                    f"session {request.session} has no message: send one first"
                )
            message = shelf.message(request.session, chosen)
            is_answer = message.role == "assistant"
            return _begun(shelf, request, row, message.parent_id if is_answer else message.id)
        case ContinueTurn():
            return _begun_to_continue(shelf, request, row)


def end(shelf: Shelf, turn: BegunTurn, answers: Sequence[NewMessage]) -> list[int]:
    """Store the answers, one at least, and select the first; their ids."""
    if turn.continues is not None:
        (answer,) = answers
        shelf.write_on(turn.session, turn.continues, answer)
        shelf.touch(turn.session)
        return [turn.continues]
    ids = [shelf.add(turn.session, turn.parent, answer) for answer in answers]
    # What the user said and its answer are one step of undo.
    shelf.choose(turn.session, ids[0], as_step=turn.user_message is None)
    return ids


def take_back(shelf: Shelf, turn: BegunTurn) -> None:
    """Leave nothing of a turn whose job was refused."""
    if turn.user_message is None:
        return
    shelf.forget_steps(turn.session, turn.before.step + 1)
    for parent, child in turn.selected.items():
        shelf.select_child(parent, child)
    shelf.restore(turn.before, turn.title)
    shelf.remove_last(turn.session, turn.user_message)


def _with_user_message(
    shelf: Shelf, request: SendTurn | EditTurn, row: Row[Any], above: int | None, text: str
) -> BegunTurn:
    message = shelf.add(row.id, above, NewMessage(role="user", content=text))
    selected = shelf.choose(row.id, message)
    return BegunTurn(
        session=row.id,
        parent=message,
        user_message=message,
        continues=None,
        job=_job(shelf, request, row, message),
        before=row,
        title=shelf.title_from(row.id, text),
        selected=selected,
    )


def _begun(shelf: Shelf, request: TurnRequest, row: Row[Any], parent: int | None) -> BegunTurn:
    return BegunTurn(
        session=row.id,
        parent=parent,
        user_message=None,
        continues=None,
        job=_job(shelf, request, row, parent),
        before=row,
    )


def _begun_to_continue(shelf: Shelf, request: ContinueTurn, row: Row[Any]) -> BegunTurn:
    if row.leaf_id is None:
        raise InvalidRequestError(f"session {row.id} has no answer to write on: send first")
    last = shelf.message(row.id, row.leaf_id)
    if last.role != "assistant":
        raise InvalidRequestError(
            f"the last message is the {last.role}'s: regenerate writes an answer to it"
        )
    if last.finish_reason == "stop":
        raise InvalidRequestError(
            f"answer {last.id} has ended by itself, it was not cut short: send goes on after it"
        )
    return BegunTurn(
        session=row.id,
        parent=last.parent_id,
        user_message=None,
        continues=last.id,
        job=_job(shelf, request, row, last.id),
        before=row,
    )


def _job(shelf: Shelf, request: TurnRequest, row: Row[Any], last: int | None) -> Generate:
    """The ordinary job that writes what comes after message `last`."""
    path = shelf.path(last)
    conversation = None
    if row.kind == "chat":
        system = [Message("system", row.system)] if row.system is not None else []
        conversation = [*system, *(Message(m.role, m.content) for m in path)]
    params = params_of(row) if request.params is None else request.params
    if isinstance(request, ContinueTurn):
        params = msgspec.structs.replace(params, n=1)
    return Generate(
        id=request.id,
        kind=row.kind,
        model=row.model,
        prompt="".join(m.content for m in path) if conversation is None else None,
        messages=conversation,
        params=params,
        stream=request.stream,
        priority=request.priority,
        continue_last=isinstance(request, ContinueTurn) and conversation is not None,
    )
