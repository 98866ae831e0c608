"""Times of a full session database: list, open, search, and the two transactions of a turn.

    python benchmarks/sessions.py --sessions 10000 --messages 20 [--database URL]

Without --database the database is a temporary SQLite file. Times are of the calls that the server's
database thread makes; nothing else runs.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection, insert

from coordinator import turns
from coordinator.session_search import search
from coordinator.session_tree import NewMessage, Shelf
from coordinator.store import Database
from coordinator.tables import leaf_choices, messages, sessions
from shared.session_messages import SearchSessions, SendTurn

WORDS = [f"word{number}" for number in range(2000)]
OWNER = "local"
BATCH = 500


def fill(connection: Connection, first: int, count: int, length: int, dice: random.Random) -> None:
    """Sessions number `first` and on, each a path of `length` messages."""
    session_rows, message_rows, choices = [], [], []
    for session in range(first, first + count):
        base = (session - 1) * length
        session_rows.append(
            {
                "id": session,
                "owner": OWNER,
                "kind": "chat",
                "title": " ".join(dice.sample(WORDS, 5)),
                "params": "{}",
                "created": float(session),
                "updated": float(session),
                "root_id": base + 1,
                "leaf_id": base + length,
                "step": 0,
            }
        )
        choices.append({"session_id": session, "step": 0, "leaf_id": base + length})
        for depth in range(length):
            message_rows.append(
                {
                    "id": base + depth + 1,
                    "session_id": session,
                    "parent_id": base + depth if depth else None,
                    "depth": depth,
                    "ordinal": 1,
                    "selected_id": base + depth + 2 if depth + 1 < length else None,
                    "role": "assistant" if depth % 2 else "user",
                    "content": " ".join(dice.choices(WORDS, k=40)),
                    "prompt_tokens": 0,
                    "completion_tokens": 0,
                    "partial": False,
                    "created": float(session),
                }
            )
    connection.execute(insert(sessions), session_rows)
    connection.execute(insert(messages), message_rows)
    connection.execute(insert(leaf_choices), choices)


def measure(database: Database, name: str, work: Callable[[Shelf], object], reads: bool) -> None:
    """Print median and worst of 200 calls."""
    times = []
    for _ in range(200):
        began = time.perf_counter()
        database.call(lambda connection: work(Shelf(connection, OWNER)), reads=reads)
        times.append(1000 * (time.perf_counter() - began))
    print(f"{name:32} median {statistics.median(times):7.2f} ms   worst {max(times):7.2f} ms")


def main() -> None:
    """Fill, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--messages", type=int, default=20, help="of each session")
    parser.add_argument("--database", help="an empty one; default: a temporary SQLite file")
    options = parser.parse_args()
    dice = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        database = Database(options.database or f"sqlite:///{Path(folder) / 'tpserve.db'}")
        began = time.perf_counter()
        for first in range(1, options.sessions + 1, BATCH):
            count = min(BATCH, options.sessions + 1 - first)
            database.call(lambda c, f=first, n=count: fill(c, f, n, options.messages, dice))  # type: ignore[misc]
        total = options.sessions * options.messages
        print(f"filled with {total} messages in {time.perf_counter() - began:.1f} s")

        def any_session() -> int:
            return dice.randint(1, options.sessions)

        def two_words() -> SearchSessions:
            return SearchSessions(id="s", text=" ".join(dice.sample(WORDS, 2)), limit=50)

        def one_word() -> SearchSessions:
            return SearchSessions(id="s", text=dice.choice(WORDS[1000:]), limit=50)

        def begin(shelf: Shelf) -> None:
            turns.begin(shelf, SendTurn(id="t", session=any_session(), text="hello"))

        def turn(shelf: Shelf) -> None:
            begun = turns.begin(shelf, SendTurn(id="t", session=any_session(), text="hello"))
            turns.end(shelf, begun, [NewMessage(role="assistant", content="hello yourself")])

        middle = f"{options.sessions / 2!r}:0"
        measure(database, "list the 50 newest", lambda s: s.page("p", 50, None), True)
        measure(database, "list 50 from the middle", lambda s: s.page("p", 50, middle), True)
        measure(database, "open a session", lambda s: s.state("g", any_session()), True)
        measure(database, "search two words", lambda s: search(s, two_words()), True)
        measure(database, "search one word, many hits", lambda s: search(s, one_word()), True)
        measure(database, "begin a turn", begin, False)
        measure(database, "begin and end a turn", turn, False)
        database.close()


if __name__ == "__main__":
    main()
