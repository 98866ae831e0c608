"""A story whose text was edited as a whole: what of its path stays, and what is new."""

from coordinator.session_tree import NewMessage, Shelf
from shared.errors import InvalidRequestError
from shared.session_messages import WriteStory


def write_story(shelf: Shelf, request: WriteStory) -> None:
    """Make a story's text the given one, as one step of undo.

    Raises SessionNotFoundError, InvalidRequestError for a chat.
    """
    row = shelf.row(request.session)
    if row.kind != "story":
        raise InvalidRequestError(
            f"session {row.id} is a {row.kind}, write is for stories: edit changes one of its "
            "messages, send appends one"
        )
    leaf, kept = None, 0
    for message in shelf.path(row.leaf_id):
        if not request.text.startswith(message.content, kept):
            break
        leaf, kept = message.id, kept + len(message.content)
    if rest := request.text[kept:]:
        leaf = shelf.add(row.id, leaf, NewMessage(role="user", content=rest))
        shelf.title_from(row.id, request.text)
    if leaf != row.leaf_id:
        shelf.choose(row.id, leaf)
