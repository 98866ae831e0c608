"""Sessions as they leave a database and come back: with all messages, but without its ids."""

from sqlalchemy import select

from coordinator.session_tree import NewMessage, Shelf, params_of, timings_of
from coordinator.tables import messages
from shared.session_messages import ExportedMessage, SessionExport


def export_session(shelf: Shelf, session: int) -> SessionExport:
    """All of a session. Raises SessionNotFoundError."""
    row = shelf.row(session)
    query = select(messages).where(messages.c.session_id == session)
    # Ids go up: parents come before their children, and siblings in order.
    rows = shelf.connection.execute(query.order_by(messages.c.id)).all()
    place: dict[int | None, int] = {message.id: at for at, message in enumerate(rows)}
    return SessionExport(
        format="tpserve session 1",
        kind=row.kind,
        title=row.title,
        model=row.model,
        system=row.system,
        params=params_of(row),
        created=row.created,
        updated=row.updated,
        root=place.get(row.root_id),
        leaf=place.get(row.leaf_id),
        messages=[
            ExportedMessage(
                parent=place.get(message.parent_id),
                role=message.role,
                content=message.content,
                created=message.created,
                selected=place.get(message.selected_id),
                prompt_tokens=message.prompt_tokens,
                completion_tokens=message.completion_tokens,
                timings=timings_of(message),
                model=message.model,
                finish_reason=message.finish_reason,
                partial=message.partial,
            )
            for message in rows
        ],
    )


def import_session(shelf: Shelf, data: SessionExport) -> int:
    """Make a session of an exported one; its id."""
    session = shelf.insert_session(
        kind=data.kind,
        title=data.title,
        model=data.model,
        system=data.system,
        params=data.params,
        created=data.created,
        updated=data.updated,
    )
    ids: list[int] = []
    for message in data.messages:
        new = NewMessage(
            role=message.role,
            content=message.content,
            prompt_tokens=message.prompt_tokens,
            completion_tokens=message.completion_tokens,
            timings=message.timings,
            model=message.model,
            finish_reason=message.finish_reason,
            partial=message.partial,
            created=message.created,
        )
        ids.append(shelf.add(session, None if message.parent is None else ids[message.parent], new))
    for parent, message in zip(ids, data.messages, strict=True):
        if message.selected is not None:
            shelf.select_child(parent, ids[message.selected])
    leaf = None if data.leaf is None else ids[data.leaf]
    shelf.choose(session, leaf, as_step=False)
    if data.root is not None:
        shelf.select_root(session, ids[data.root])
    shelf.touch(session, data.updated)
    return session
