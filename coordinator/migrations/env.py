"""Alembic's entry: runs the migrations on the connection that coordinator/store.py hands over."""

from alembic import context

from coordinator.tables import metadata


def run() -> None:
    """Within the transaction that the connection is in."""
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, target_metadata=metadata)
    with context.begin_transaction():
        context.run_migrations()


if __name__ == "env_py":  # the name under which Alembic loads it
    run()
