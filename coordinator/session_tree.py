"""One owner's sessions in the database: rows, and the tree of messages that each session is.

A session's selected path goes from a message without a parent to its leaf. Every message remembers
which of its children was selected last, and the session every choice of a leaf, for undo and redo.
Reading a session costs as much as its path is long, however large its tree.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET
from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    CursorResult,
    Row,
    and_,
    delete,
    func,
    insert,
    select,
    tuple_,
    update,
)

from coordinator.tables import leaf_choices, messages, sessions
from shared.errors import InvalidRequestError, SessionNotFoundError
from shared.messages import FinishReason, Role, SamplingParams, Timings
from shared.session_messages import (
    ConfigureSession,
    CreateSession,
    SessionInfo,
    Sessions,
    SessionState,
    StoredMessage,
)

_TITLE_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class NewMessage:
    """What is to be stored of a message besides its place in the tree."""

    role: Role
    content: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    timings: Timings | None = None
    model: str | None = None
    finish_reason: FinishReason | None = None
    partial: bool = False
    created: float | None = None
    """None: now."""


class Shelf:
    """The sessions of one owner, within one transaction."""

    def __init__(self, connection: Connection, owner: str) -> None:
        self.connection, self.owner = connection, owner

    # --- sessions ---------------------------------------------------------------------------------

    def create(self, request: CreateSession) -> int:
        """A session without messages; its id."""
        return self.insert_session(
            kind=request.kind,
            title=request.title,
            model=request.model,
            system=request.system,
            params=request.params,
        )

    def insert_session(self, *, params: SamplingParams, **values: Any) -> int:
        """A row; its times are now unless given."""
        now = time.time()
        row = {"created": now, "updated": now, "step": 0, **values}
        row |= {"owner": self.owner, "params": msgspec.json.encode(params).decode()}
        done = self.connection.execute(insert(sessions).values(row))
        session = _new_id(done)
        self.connection.execute(insert(leaf_choices).values(session_id=session, step=0))
        return session

    def row(self, session: int) -> Row[Any]:
        """Raises SessionNotFoundError."""
        found = self.connection.execute(select(sessions).where(self._is(session))).one_or_none()
        if found is None:
            raise SessionNotFoundError(f"there is no session {session}")
        return found

    def page(self, request_id: str, limit: int, cursor: str | None) -> Sessions:
        """Those changed last first. Raises InvalidRequestError for a cursor that is none."""
        newest = (sessions.c.updated, sessions.c.id)
        query = select(sessions).where(sessions.c.owner == self.owner)
        if cursor is not None:
            query = query.where(tuple_(*newest) < _parse_cursor(cursor))
        query = query.order_by(*(column.desc() for column in newest)).limit(limit + 1)
        rows = self.connection.execute(query).all()
        more = rows[limit - 1] if len(rows) > limit else None
        return Sessions(
            id=request_id,
            sessions=[_info(row) for row in rows[:limit]],
            cursor=f"{more.updated!r}:{more.id}" if more is not None else None,
        )

    def configure(self, request: ConfigureSession) -> None:
        """Raises SessionNotFoundError, InvalidRequestError for a story's system prompt."""
        if self.row(request.session).kind == "story" and isinstance(request.system, str):
            raise InvalidRequestError("a story has no system prompt")
        new: dict[str, str | None] = {
            name: value
            for name in ("title", "model", "system")
            if (value := getattr(request, name)) is not UNSET
        }
        if request.params is not UNSET:
            new["params"] = msgspec.json.encode(request.params).decode()
        self._set(request.session, **new)

    def delete(self, session: int) -> None:
        """With all messages. Raises SessionNotFoundError."""
        self.row(session)
        self.connection.execute(delete(messages).where(messages.c.session_id == session))
        self.connection.execute(delete(sessions).where(self._is(session)))

    def state(self, request_id: str, session: int) -> SessionState:
        """The session and its selected path. Raises SessionNotFoundError."""
        row = self.row(session)
        up = _upwards(row.leaf_id)
        steps = select(func.max(leaf_choices.c.step)).where(leaf_choices.c.session_id == session)
        after_parents = messages.c.parent_id.in_(select(up.c.parent_id))
        siblings: dict[int | None, list[int]] = {}
        for condition in (after_parents, messages.c.parent_id.is_(None)):
            query = select(messages.c.id, messages.c.parent_id).where(
                and_(messages.c.session_id == session, condition)
            )
            for message, parent in self.connection.execute(query.order_by(messages.c.ordinal)):
                siblings.setdefault(parent, []).append(message)
        path = self.path(row.leaf_id)
        return SessionState(
            id=request_id,
            session=_info(row),
            messages=[_stored(message, siblings[message.parent_id]) for message in path],
            can_undo=row.step > 0,
            can_redo=row.step < self.connection.execute(steps).scalar_one(),
        )

    # --- messages ---------------------------------------------------------------------------------

    def message(self, session: int, message: int) -> Row[Any]:
        """Raises SessionNotFoundError."""
        query = select(messages).where(messages.c.id == message, messages.c.session_id == session)
        found = self.connection.execute(query).one_or_none()
        if found is None:
            raise SessionNotFoundError(f"session {session} has no message {message}")
        return found

    def path(self, leaf: int | None) -> Sequence[Row[Any]]:
        """The messages from the first one to `leaf`."""
        up = _upwards(leaf)
        query = select(messages).join(up, up.c.id == messages.c.id).order_by(messages.c.depth)
        return self.connection.execute(query).all()

    def add(self, session: int, parent: int | None, new: NewMessage) -> int:
        """Store a message after `parent`, without selecting it; its id."""
        depth = 0 if parent is None else self.message(session, parent).depth + 1
        last = select(func.coalesce(func.max(messages.c.ordinal), 0)).where(
            messages.c.session_id == session, messages.c.parent_id == parent
        )
        values = {
            "session_id": session,
            "parent_id": parent,
            "depth": depth,
            "ordinal": self.connection.execute(last).scalar_one() + 1,
            "role": new.role,
            "content": new.content,
            "prompt_tokens": new.prompt_tokens,
            "completion_tokens": new.completion_tokens,
            "timings": _json(new.timings),
            "model": new.model,
            "finish_reason": new.finish_reason,
            "partial": new.partial,
            "created": time.time() if new.created is None else new.created,
        }
        return _new_id(self.connection.execute(insert(messages).values(values)))

    def write_on(self, session: int, message: int, more: NewMessage) -> None:
        """Append to a message; what is told of it is then that of its last part."""
        row = self.message(session, message)
        self.connection.execute(
            update(messages)
            .where(messages.c.id == message)
            .values(
                content=row.content + more.content,
                completion_tokens=row.completion_tokens + more.completion_tokens,
                timings=_json(more.timings),
                model=more.model,
                finish_reason=more.finish_reason,
                partial=more.partial,
            )
        )

    def remove_last(self, session: int, message: int) -> None:
        """Delete a message that has no children and is not selected."""
        self.connection.execute(
            delete(messages).where(messages.c.id == message, messages.c.session_id == session)
        )

    # --- the selected path ------------------------------------------------------------------------

    def choose(
        self, session: int, leaf: int | None, *, as_step: bool = True
    ) -> dict[int, int | None]:
        """Select the path to `leaf`; `as_step`: undo comes back to where it was.

        Returned are the messages after which another child was selected before, with that child.
        """
        row = self.row(session)
        step = row.step + 1 if as_step else row.step
        if as_step:
            self.forget_steps(session, step)
            self.connection.execute(
                insert(leaf_choices).values(session_id=session, step=step, leaf_id=leaf)
            )
        else:
            self.connection.execute(
                update(leaf_choices)
                .where(leaf_choices.c.session_id == session, leaf_choices.c.step == step)
                .values(leaf_id=leaf)
            )
        return self._select(row, leaf, step)

    def branch(self, session: int, message: int) -> None:
        """Select a message and what was selected last after it. Raises SessionNotFoundError."""
        below = self.message(session, message)
        base = select(messages.c.id, messages.c.selected_id).where(messages.c.id == below.id)
        down = base.cte("down", recursive=True)
        children = select(messages.c.id, messages.c.selected_id)
        down = down.union_all(children.where(messages.c.id == down.c.selected_id))
        end = select(down.c.id).where(down.c.selected_id.is_(None))
        self.choose(session, self.connection.execute(end).scalar_one())

    def rollback(self, session: int, message: int | None) -> None:
        """Make a message the leaf. Raises SessionNotFoundError."""
        if message is not None:
            self.message(session, message)
        self.choose(session, message)

    def undo(self, session: int, by: int) -> None:
        """Go `by` choices of a leaf back, or forward when it is negative.

        Raises InvalidRequestError when there was none.
        """
        row = self.row(session)
        query = select(leaf_choices.c.leaf_id).where(
            leaf_choices.c.session_id == session, leaf_choices.c.step == row.step - by
        )
        found = self.connection.execute(query).one_or_none()
        if found is None:
            what = "undo" if by > 0 else "redo"
            raise InvalidRequestError(f"session {session} has nothing to {what}")
        self._select(row, found.leaf_id, row.step - by)

    def forget_steps(self, session: int, first: int) -> None:
        """Choices from number `first` on can not be come back to."""
        self.connection.execute(
            delete(leaf_choices).where(
                leaf_choices.c.session_id == session, leaf_choices.c.step >= first
            )
        )

    def select_root(self, session: int, message: int) -> None:
        """Remember which of the first messages is the selected one."""
        self._set(session, root_id=message)

    def select_child(self, parent: int, child: int | None) -> None:
        """Remember which message after `parent` is the selected one."""
        self.connection.execute(
            update(messages).where(messages.c.id == parent).values(selected_id=child)
        )

    def restore(self, before: Row[Any], title: str) -> None:
        """A session's selection as it was; its title too, if it is the one that a turn has made."""
        self.connection.execute(
            update(sessions)
            .where(self._is(before.id), sessions.c.title == title)
            .values(title=before.title)
        )
        self._set(
            before.id,
            root_id=before.root_id,
            leaf_id=before.leaf_id,
            step=before.step,
        )

    def title_from(self, session: int, text: str) -> str:
        """Give a session without a title one; what it would be."""
        line = " ".join(text.split())
        short = line if len(line) <= _TITLE_CHARACTERS else line[: _TITLE_CHARACTERS - 1] + "…"
        self.connection.execute(
            update(sessions).where(self._is(session), sessions.c.title == "").values(title=short)
        )
        return short

    def touch(self, session: int, updated: float | None = None) -> None:
        """Note when it was changed; None: now."""
        self._set(session, updated=time.time() if updated is None else updated)

    def _select(self, row: Row[Any], leaf: int | None, step: int) -> dict[int, int | None]:
        up = _upwards(leaf)
        path = {r.id: r.parent_id for r in self.connection.execute(select(up))}
        chosen = select(messages.c.id, messages.c.selected_id).where(
            messages.c.id.in_(select(up.c.parent_id))
        )
        selected = {r.id: r.selected_id for r in self.connection.execute(chosen)}
        root, changed = row.root_id, {}
        for child, parent in path.items():
            if parent is None:
                root = child
            elif selected[parent] != child:  # most are as they were
                self.select_child(parent, child)
                changed[parent] = selected[parent]
        self._set(row.id, leaf_id=leaf, root_id=root, step=step, updated=time.time())
        return changed

    def _set(self, session: int, **values: Any) -> None:
        self.connection.execute(update(sessions).where(self._is(session)).values(values))

    def _is(self, session: int) -> ColumnElement[bool]:
        return and_(sessions.c.id == session, sessions.c.owner == self.owner)


def params_of(row: Row[Any]) -> SamplingParams:
    """A session's own."""
    return msgspec.json.decode(row.params, type=SamplingParams)


def timings_of(row: Row[Any]) -> Timings | None:
    """A message's, if it was generated to its end."""
    return msgspec.json.decode(row.timings, type=Timings) if row.timings else None


def _new_id(done: CursorResult[Any]) -> int:
    assert done.inserted_primary_key is not None, "one row was inserted"
    return int(done.inserted_primary_key[0])


def _upwards(leaf: int | None) -> CTE:
    """(id, parent_id) of `leaf` and all before it."""
    base = select(messages.c.id, messages.c.parent_id).where(messages.c.id == leaf)
    up = base.cte("up", recursive=True)
    parents = select(messages.c.id, messages.c.parent_id)
    return up.union_all(parents.where(messages.c.id == up.c.parent_id))


def _parse_cursor(cursor: str) -> tuple[float, int]:
    updated, _, session = cursor.partition(":")
    try:
        return float(updated), int(session)
    except ValueError:
        raise InvalidRequestError(
            f"cursor is {cursor!r}: use the one that the page before came with"
        ) from None


def _json(timings: Timings | None) -> str | None:
    return None if timings is None else msgspec.json.encode(timings).decode()


def _info(row: Row[Any]) -> SessionInfo:
    return SessionInfo(
        id=row.id,
        kind=row.kind,
        title=row.title,
        model=row.model,
        system=row.system,
        params=params_of(row),
        created=row.created,
        updated=row.updated,
        leaf=row.leaf_id,
    )


def _stored(row: Row[Any], siblings: list[int]) -> StoredMessage:
    return StoredMessage(
        id=row.id,
        parent=row.parent_id,
        role=row.role,
        content=row.content,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        timings=timings_of(row),
        model=row.model,
        finish_reason=row.finish_reason,
        partial=row.partial,
        created=row.created,
        position=siblings.index(row.id) + 1,
        siblings=siblings,
    )
