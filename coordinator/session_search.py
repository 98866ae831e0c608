"""Full-text search over an owner's sessions: FTS5 in SQLite, tsvector in PostgreSQL."""

import re

from sqlalchemy import text

from coordinator.session_tree import Shelf
from coordinator.tables import AnyText
from shared.session_messages import SearchSessions, SessionHit, SessionHits

_TEXT_CHARACTERS = 160

_SQLITE = """
    SELECT * FROM (
        SELECT s.id AS session, s.title AS title, m.id AS message,
               snippet(messages_words, 0, '', '', '…', 20) AS found, m.created AS at
        FROM messages_words JOIN messages m ON m.id = messages_words.rowid
             JOIN sessions s ON s.id = m.session_id
        WHERE messages_words MATCH :words AND s.owner = :owner
        ORDER BY messages_words.rowid DESC LIMIT :most
    )
    UNION ALL SELECT * FROM (
        SELECT s.id, s.title, NULL, s.title, s.updated
        FROM sessions_words JOIN sessions s ON s.id = sessions_words.rowid
        WHERE sessions_words MATCH :words AND s.owner = :owner
        ORDER BY sessions_words.rowid DESC LIMIT :most
    )
    ORDER BY at DESC LIMIT :most
"""
_POSTGRESQL = """
    SELECT * FROM (
        SELECT s.id AS session, s.title AS title, m.id AS message,
               ts_headline('simple', m.content, to_tsquery('simple', :words),
                           'StartSel="", StopSel="", MaxWords=20, MinWords=10') AS found,
               m.created AS at
        FROM messages m JOIN sessions s ON s.id = m.session_id
        WHERE to_tsvector('simple', m.content) @@ to_tsquery('simple', :words)
              AND s.owner = :owner
        ORDER BY m.id DESC LIMIT :most
    ) AS in_messages
    UNION ALL SELECT * FROM (
        SELECT s.id, s.title, NULL::bigint, s.title, s.updated
        FROM sessions s
        WHERE to_tsvector('simple', s.title) @@ to_tsquery('simple', :words)
              AND s.owner = :owner
        ORDER BY s.id DESC LIMIT :most
    ) AS in_titles
    ORDER BY at DESC LIMIT :most
"""


def search(shelf: Shelf, request: SearchSessions) -> SessionHits:
    """Titles and messages that have all words of the text, as a whole or as beginnings."""
    words = re.findall(r"\w+", request.text)
    sqlite = shelf.connection.dialect.name == "sqlite"
    if sqlite:
        query, match = _SQLITE, " ".join(f'"{word}"*' for word in words)
    else:
        query, match = _POSTGRESQL, " & ".join(f"'{word}':*" for word in words)
    parameters = {"words": match, "owner": shelf.owner, "most": request.limit}
    typed = text(query).columns(title=AnyText(), found=AnyText())
    rows = shelf.connection.execute(typed, parameters).all() if words else []
    hits = [
        SessionHit(
            session=row.session,
            title=row.title,
            message=row.message,
            text=row.found[:_TEXT_CHARACTERS],
        )
        for row in rows
    ]
    return SessionHits(id=request.id, hits=hits)
