"""Sessions, their messages, and full-text search over both."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "sessions",
        sa.Column("id", _NUMBER, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("model", sa.Text),
        sa.Column("system", sa.Text),
        sa.Column("params", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("updated", sa.Double, nullable=False),
        sa.Column("root_id", _NUMBER),
        sa.Column("leaf_id", _NUMBER),
        sa.Column("step", sa.Integer, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("sessions_newest", "sessions", ["owner", "updated", "id"])
    op.create_table(
        "messages",
        sa.Column("id", _NUMBER, primary_key=True),
        sa.Column(
            "session_id",
            _NUMBER,
            sa.ForeignKey("sessions.id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("parent_id", _NUMBER, sa.ForeignKey("messages.id")),
        sa.Column("depth", sa.Integer, nullable=False),
        sa.Column("ordinal", sa.Integer, nullable=False),
        sa.Column("selected_id", _NUMBER),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
        sa.Column("timings", sa.Text),
        sa.Column("model", sa.Text),
        sa.Column("finish_reason", sa.Text),
        sa.Column("partial", sa.Boolean, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("messages_siblings", "messages", ["session_id", "parent_id", "ordinal"])
    op.create_index("messages_children", "messages", ["parent_id"])
    op.create_table(
        "leaf_choices",
        sa.Column(
            "session_id",
            _NUMBER,
            sa.ForeignKey("sessions.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("leaf_id", _NUMBER),
    )
    if op.get_bind().dialect.name == "sqlite":
        _index_with_fts5("messages", "content")
        _index_with_fts5("sessions", "title")
    else:
        for table, column in (("messages", "content"), ("sessions", "title")):
            op.execute(
                f"CREATE INDEX {table}_words ON {table} USING gin (to_tsvector('simple', {column}))"
            )


def _index_with_fts5(table: str, column: str) -> None:
    """A full-text index that the table's own triggers keep up to date."""
    words = f"{table}_words"
    add = f"INSERT INTO {words}(rowid, {column}) VALUES (new.id, new.{column});"
    remove = (
        f"INSERT INTO {words}({words}, rowid, {column}) VALUES ('delete', old.id, old.{column});"
    )
    op.execute(
        f"CREATE VIRTUAL TABLE {words} USING fts5({column}, content='{table}', content_rowid='id', "
        "tokenize='unicode61 remove_diacritics 2')"
    )
    op.execute(f"CREATE TRIGGER {words}_insert AFTER INSERT ON {table} BEGIN {add} END")
    op.execute(f"CREATE TRIGGER {words}_delete AFTER DELETE ON {table} BEGIN {remove} END")
    op.execute(
        f"CREATE TRIGGER {words}_update AFTER UPDATE OF {column} ON {table} "
        f"BEGIN {remove} {add} END"
    )
