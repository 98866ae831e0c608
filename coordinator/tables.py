"""The tables of sessions, their messages, and jobs, as the queries see them.

Migrations (coordinator/migrations) make them; a test compares the two.
"""

import re

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

_ESCAPE = "\x1a"
_ESCAPED = {"\0": "\x1b", _ESCAPE: _ESCAPE}  # no letters: a word beside it is still found
_UNESCAPED = {after: character for character, after in _ESCAPED.items()}


class AnyText(TypeDecorator[str]):
    """Text of any characters. PostgreSQL's own cannot have NUL, which users and models may write."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """As it is stored."""
        if value is None or dialect.name != "postgresql":
            return value
        return re.sub(f"[\0{_ESCAPE}]", lambda found: _ESCAPE + _ESCAPED[found[0]], value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        """As it was given."""
        if value is None or dialect.name != "postgresql":
            return value
        return re.sub(f"{_ESCAPE}([\x1b{_ESCAPE}])", lambda found: _UNESCAPED[found[1]], value)


metadata = MetaData()

_NUMBER = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up INTEGER keys only

sessions = Table(
    "sessions",
    metadata,
    Column("id", _NUMBER, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("title", AnyText, nullable=False),
    Column("model", AnyText),
    Column("system", AnyText),
    Column("params", Text, nullable=False),  # SamplingParams as JSON
    Column("created", Double, nullable=False),  # seconds since 1970, as all times
    Column("updated", Double, nullable=False),
    # Of this session's messages; no foreign keys, which would go round in a circle.
    Column("root_id", _NUMBER),  # the selected one of those without a parent
    Column("leaf_id", _NUMBER),  # the selected path ends here; null: it is empty
    Column("step", Integer, nullable=False),  # where undo and redo stand in leaf_choices
    Index("sessions_newest", "owner", "updated", "id"),
    sqlite_autoincrement=True,
)

messages = Table(
    "messages",
    metadata,
    Column("id", _NUMBER, primary_key=True),
    Column("session_id", _NUMBER, ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False),
    # No cascade from parent to child: SQLite does not go deeper than 1000 with it.
    Column("parent_id", _NUMBER, ForeignKey("messages.id")),
    Column("depth", Integer, nullable=False),  # messages before it on its path
    Column("ordinal", Integer, nullable=False),  # among its siblings, from 1
    Column("selected_id", _NUMBER),  # which of its children was selected last
    Column("role", Text, nullable=False),
    Column("content", AnyText, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("timings", Text),  # Timings as JSON
    Column("model", AnyText),
    Column("finish_reason", Text),
    Column("partial", Boolean, nullable=False),
    Column("created", Double, nullable=False),
    Index("messages_siblings", "session_id", "parent_id", "ordinal"),
    Index("messages_children", "parent_id"),
    sqlite_autoincrement=True,
)

leaf_choices = Table(
    "leaf_choices",
    metadata,
    Column("session_id", _NUMBER, ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("leaf_id", _NUMBER),
)

jobs = Table(
    "jobs",
    metadata,
    Column("number", _NUMBER, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("request", Text, nullable=False),  # what was asked for, as JSON
    Column("seed", BigInteger, nullable=False),  # so that a second attempt gives the same
    Column("created", Double, nullable=False),
    Column("started", Double),
    Column("ended", Double),
    Column("expires", Double),
    Column("attempts", Integer, nullable=False),
    Column("holder", Text),  # the server that runs it
    Column("lease", Double),  # until when others leave it alone
    Column("result", Text),  # the last event and where tokens end, as JSON
    UniqueConstraint("owner", "name", name="jobs_name"),
    Index("jobs_newest", "owner", "number"),
    Index("jobs_next", "state", "priority", "number"),
    Index("jobs_expired", "expires"),
    sqlite_autoincrement=True,
)
