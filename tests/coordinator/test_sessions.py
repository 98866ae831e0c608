"""Sessions in the database: the tree against a naive one, lists, search, files."""

import random
from collections.abc import Callable
from typing import TypeVar

import msgspec
import pytest
from sqlalchemy import Connection, text

from coordinator import turns
from coordinator.session_files import export_session, import_session
from coordinator.session_search import search
from coordinator.session_tree import NewMessage, Shelf
from coordinator.store import Database
from coordinator.stories import write_story
from shared.errors import InvalidRequestError, SessionNotFoundError
from shared.messages import FinishReason, SamplingParams, Timings
from shared.protocol import BadRequestError, decode_request
from shared.session_messages import (
    ConfigureSession,
    ContinueTurn,
    CreateSession,
    EditTurn,
    Regenerate,
    SearchSessions,
    SendTurn,
    SessionExport,
    SessionHit,
    SessionState,
    TurnRequest,
    WriteStory,
)

T = TypeVar("T")

TIMINGS = Timings(
    queue_s=0.1,
    ttft_s=0.2,
    time_per_token_s=0.3,
    prefill_s=0.4,
    decode_s=0.5,
    prefill_tokens_per_s=0.6,
    decode_tokens_per_s=0.7,
)


class Sessions:
    """Each call in a transaction of its own, as the server makes them."""

    def __init__(self, database: Database, owner: str = "local") -> None:
        self.database, self.owner = database, owner

    def call(self, work: Callable[[Shelf], T]) -> T:
        return self.database.call(lambda connection: work(Shelf(connection, self.owner)))

    def create(self, **wishes: object) -> int:
        request = CreateSession(id="c", **{"kind": "chat", **wishes})  # type: ignore[arg-type]
        return self.call(lambda shelf: shelf.create(request))

    def configure(self, session: int, **wishes: object) -> None:
        request = ConfigureSession(id="c", session=session, **wishes)  # type: ignore[arg-type]
        self.call(lambda shelf: shelf.configure(request))

    def write(self, session: int, story: str) -> None:
        request = WriteStory(id="w", session=session, text=story)
        self.call(lambda shelf: write_story(shelf, request))

    def begin(self, request: TurnRequest) -> turns.BegunTurn:
        return self.call(lambda shelf: turns.begin(shelf, request))

    def turn(
        self, request: TurnRequest, answer: str, finish_reason: FinishReason = "stop"
    ) -> turns.BegunTurn:
        begun = self.begin(request)
        new = NewMessage(
            role="assistant",
            content=answer,
            finish_reason=finish_reason,
            timings=TIMINGS,
            model="demo",
            prompt_tokens=5,
            completion_tokens=3,
        )
        self.call(lambda shelf: turns.end(shelf, begun, [new]))
        return begun

    def send(self, session: int, said: str, answer: str) -> turns.BegunTurn:
        return self.turn(SendTurn(id="t", session=session, text=said), answer)

    def state(self, session: int) -> SessionState:
        return self.call(lambda shelf: shelf.state("g", session))

    def path(self, session: int) -> list[str]:
        return [message.content for message in self.state(session).messages]

    def export(self, session: int) -> SessionExport:
        return self.call(lambda shelf: export_session(shelf, session))

    def search(self, words: str, limit: int = 50) -> list[SessionHit]:
        request = SearchSessions(id="s", text=words, limit=limit)
        return self.call(lambda shelf: search(shelf, request)).hits


@pytest.fixture
def sessions(database: Database) -> Sessions:
    return Sessions(database)


class NaiveTree:
    """What the database is to do, with dictionaries."""

    def __init__(self) -> None:
        self.parent: dict[int, int | None] = {}
        self.content: dict[int, str] = {}
        self.users: list[int] = []
        self.selected: dict[int | None, int | None] = {}
        self.leaves: list[int | None] = [None]
        self.step = 0

    @property
    def leaf(self) -> int | None:
        return self.leaves[self.step]

    def path(self) -> list[int]:
        found, at = [], self.leaf
        while at is not None:
            found.append(at)
            at = self.parent[at]
        return found[::-1]

    def add(self, message: int, parent: int | None, content: str, *, user: bool = False) -> None:
        self.parent[message], self.content[message] = parent, content
        if user:
            self.users.append(message)

    def siblings(self, message: int) -> list[int]:
        return [m for m, parent in self.parent.items() if parent == self.parent[message]]

    def mark(self) -> None:
        for message in self.path():
            self.selected[self.parent[message]] = message

    def choose(self, leaf: int | None) -> None:
        self.leaves[self.step + 1 :] = [leaf]
        self.step += 1
        self.mark()

    def replace(self, leaf: int) -> None:
        self.leaves[self.step] = leaf
        self.mark()

    def branch(self, message: int) -> None:
        while (below := self.selected.get(message)) is not None:
            message = below
        self.choose(message)


def check(sessions: Sessions, session: int, tree: NaiveTree) -> None:
    state = sessions.state(session)
    path = tree.path()
    assert [message.id for message in state.messages] == path
    assert [message.content for message in state.messages] == [tree.content[m] for m in path]
    assert [message.parent for message in state.messages] == [tree.parent[m] for m in path]
    for message in state.messages:
        assert message.siblings == tree.siblings(message.id)
        assert message.siblings[message.position - 1] == message.id
    assert state.session.leaf == tree.leaf
    assert (state.can_undo, state.can_redo) == (tree.step > 0, tree.step + 1 < len(tree.leaves))


def random_turn(sessions: Sessions, session: int, tree: NaiveTree, dice: random.Random) -> None:
    """Any turn, with any end."""
    said, answer = f"said {len(tree.parent)}", f"answer {len(tree.parent)}"
    known = list(tree.parent)
    users = tree.users
    request: TurnRequest
    match dice.choice(["send", "send", "edit", "regenerate"]):
        case "edit" if users:
            edited = dice.choice(users)
            parent = tree.parent[edited]
            request = EditTurn(id="t", session=session, message=edited, text=said)
        case "regenerate" if known:
            chosen = dice.choice(known)
            parent = chosen if chosen in users else tree.parent[chosen]
            request = Regenerate(id="t", session=session, message=chosen)
        case _:
            parent = tree.leaf
            request = SendTurn(id="t", session=session, text=said)
    before = sessions.export(session)
    begun = sessions.begin(request)
    ending = dice.choice(["answered", "answered", "answered", "refused", "cancelled"])
    if ending == "refused":
        sessions.call(lambda shelf: turns.take_back(shelf, begun))
        after = sessions.export(session)
        assert msgspec.structs.replace(after, updated=before.updated) == before
        if begun.user_message is not None:
            del tree.leaves[tree.step + 1 :]  # it was a new choice, so there is no redo any more
        return
    if begun.user_message is not None:
        tree.add(begun.user_message, parent, said, user=True)
        tree.choose(begun.user_message)
        parent = begun.user_message
    if ending == "answered":
        contents = [f"{answer}, {index}" for index in range(dice.choice([1, 1, 3]))]
        new = [NewMessage(role="assistant", content=content) for content in contents]
        ids = sessions.call(lambda shelf: turns.end(shelf, begun, new))
        for message, content in zip(ids, contents, strict=True):
            tree.add(message, parent, content)
        if begun.user_message is None:
            tree.choose(ids[0])
        else:
            tree.replace(ids[0])


def random_write(sessions: Sessions, session: int, tree: NaiveTree, dice: random.Random) -> None:
    """The text as it is, cut anywhere or not at all, and then something new or nothing."""
    path = tree.path()
    whole = "".join(tree.content[m] for m in path)
    text = whole[: dice.choice([len(whole), dice.randint(0, len(whole))])]
    text += dice.choice(["", f" written {len(tree.parent)}"])
    sessions.write(session, text)
    assert "".join(sessions.path(session)) == text
    ends = {len("".join(tree.content[m] for m in path[:n])): n for n in range(len(path) + 1)}
    kept = max(end for end in ends if text[:end] == whole[:end] and end <= len(text))
    leaf = path[ends[kept] - 1] if kept else None
    if kept < len(text):
        added = sessions.state(session).messages[-1].id
        assert added not in tree.parent
        tree.add(added, leaf, text[kept:], user=True)
        leaf = added
    if leaf != tree.leaf:
        tree.choose(leaf)


@pytest.mark.parametrize("kind", ["chat", "story"])
@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_turns_and_moves_gives_the_right_path(
    sessions: Sessions, seed: int, kind: str
) -> None:
    dice, tree, session = random.Random(seed), NaiveTree(), sessions.create(kind=kind)
    moves = ["turn", "turn", "turn", "rollback", "branch", "undo", "redo", "configure", "write"]
    others = sessions.create(title="another")
    sessions.send(others, "not of this tree", "nor this")
    for _ in range(60):
        known = list(tree.parent)
        match dice.choice(moves):
            case "write" if kind == "story":
                random_write(sessions, session, tree, dice)
            case "configure":
                sessions.configure(session, title=f"title {len(known)}")
            case "rollback" if known:
                target = dice.choice([None, *known])
                sessions.call(lambda shelf, t=target: shelf.rollback(session, t))  # type: ignore[misc]
                tree.choose(target)
            case "branch" if known:
                at = dice.choice(known)
                sessions.call(lambda shelf, m=at: shelf.branch(session, m))  # type: ignore[misc]
                tree.branch(at)
            case "undo" if tree.step:
                sessions.call(lambda shelf: shelf.undo(session, 1))
                tree.step -= 1
                tree.mark()
            case "redo" if tree.step + 1 < len(tree.leaves):
                sessions.call(lambda shelf: shelf.undo(session, -1))
                tree.step += 1
                tree.mark()
            case _:
                random_turn(sessions, session, tree, dice)
        check(sessions, session, tree)
    assert len(tree.parent) > 20
    exported = sessions.export(session)
    copy = sessions.call(lambda shelf: import_session(shelf, exported))
    assert sessions.export(copy) == exported
    assert sessions.path(others) == ["not of this tree", "nor this"]


def test_regenerate_edit_and_branch(sessions: Sessions) -> None:
    session = sessions.create()
    sessions.send(session, "hello", "hi")
    sessions.send(session, "how are you", "fine")
    sessions.turn(Regenerate(id="t", session=session), "well")
    assert sessions.path(session) == ["hello", "hi", "how are you", "well"]
    last = sessions.state(session).messages[-1]
    assert (last.position, len(last.siblings)) == (2, 2)
    first = sessions.state(session).messages[0].id
    sessions.turn(EditTurn(id="t", session=session, message=first, text="good day"), "good day!")
    assert sessions.path(session) == ["good day", "good day!"]
    sessions.call(lambda shelf: shelf.branch(session, first))
    assert sessions.path(session) == ["hello", "hi", "how are you", "well"]
    sessions.call(lambda shelf: shelf.branch(session, last.siblings[0]))
    assert sessions.path(session)[-1] == "fine"


def test_the_job_of_a_turn_is_the_path_with_the_system_prompt(sessions: Sessions) -> None:
    params = SamplingParams(max_tokens=7, temperature=0)
    session = sessions.create(system="Be brief.", model="demo", params=params)
    sessions.send(session, "hello", "hi")
    job = sessions.begin(SendTurn(id="t7", session=session, text="who?", stream=False)).job
    assert [(m.role, m.content) for m in job.messages or []] == [
        ("system", "Be brief."),
        ("user", "hello"),
        ("assistant", "hi"),
        ("user", "who?"),
    ]
    assert (job.id, job.kind, job.model, job.params) == ("t7", "chat", "demo", params)
    assert (job.stream, job.continue_last) == (False, False)


def test_a_story_is_its_pieces_one_after_the_other(sessions: Sessions) -> None:
    session = sessions.create(kind="story")
    assert sessions.begin(SendTurn(id="t", session=session)).job.prompt == ""
    sessions.send(session, "Once", " upon")
    sessions.turn(SendTurn(id="t", session=session), " a time")
    job = sessions.begin(SendTurn(id="t", session=session, text=" there was")).job
    assert (job.prompt, job.messages) == ("Once upon a time there was", None)


def test_writing_a_story_keeps_the_pieces_that_agree(sessions: Sessions) -> None:
    session = sessions.create(kind="story")
    sessions.write(session, "Once")
    assert sessions.state(session).session.title == "Once"
    sessions.turn(SendTurn(id="t", session=session), " upon a time")
    kept = [message.id for message in sessions.state(session).messages]
    sessions.write(session, "Once upon a time there")
    assert sessions.path(session) == ["Once", " upon a time", " there"]
    assert [message.id for message in sessions.state(session).messages][:2] == kept
    sessions.write(session, "Once upon")
    assert sessions.path(session) == ["Once", " upon"]
    sessions.write(session, "Once")
    assert [message.id for message in sessions.state(session).messages] == kept[:1]
    for before in ("Once upon", "Once upon a time there", "Once upon a time", "Once", ""):
        sessions.call(lambda shelf: shelf.undo(session, 1))
        assert "".join(sessions.path(session)) == before
    sessions.write(session, "")
    assert not sessions.state(session).can_undo
    assert sessions.state(session).can_redo


def test_a_chat_is_not_written(sessions: Sessions) -> None:
    session = sessions.create()
    with pytest.raises(InvalidRequestError, match="write is for stories: edit changes"):
        sessions.write(session, "Hello")
    assert sessions.path(session) == []


def test_several_answers_are_siblings_and_the_first_is_selected(sessions: Sessions) -> None:
    session = sessions.create(params=SamplingParams(n=3))
    begun = sessions.begin(SendTurn(id="t", session=session, text="hello"))
    assert begun.job.params.n == 3
    new = [
        NewMessage(role="assistant", content="a", finish_reason="length"),
        NewMessage(role="assistant", content="b", finish_reason="stop"),
    ]
    ids = sessions.call(lambda shelf: turns.end(shelf, begun, new))
    assert sessions.path(session) == ["hello", "a"]
    assert sessions.state(session).messages[-1].siblings == ids
    job = sessions.begin(ContinueTurn(id="t", session=session)).job
    assert (job.params.n, job.continue_last) == (1, True)
    sessions.call(lambda shelf: shelf.branch(session, ids[1]))
    assert sessions.path(session) == ["hello", "b"]
    for _ in range(2):
        sessions.call(lambda shelf: shelf.undo(session, 1))
    assert sessions.path(session) == []


def test_an_answer_that_was_cut_is_written_on(sessions: Sessions) -> None:
    session = sessions.create()
    sessions.turn(SendTurn(id="t", session=session, text="go"), "one two", "length")
    begun = sessions.turn(ContinueTurn(id="t", session=session), " three", "stop")
    assert begun.job.continue_last
    assert begun.job.messages is not None
    assert begun.job.messages[-1].content == "one two"
    assert sessions.path(session) == ["go", "one two three"]
    assert sessions.state(session).messages[-1].completion_tokens == 6
    with pytest.raises(InvalidRequestError, match="ended by itself"):
        sessions.begin(ContinueTurn(id="t", session=session))


def test_what_makes_no_sense_is_refused(sessions: Sessions) -> None:
    empty, session, other = sessions.create(), sessions.create(), sessions.create()
    sessions.send(session, "a", "b")
    foreign = sessions.send(other, "x", "y").user_message or 0
    answer = sessions.state(session).messages[-1].id
    mistakes: list[tuple[TurnRequest, str]] = [
        (Regenerate(id="t", session=empty), "has no message"),
        (ContinueTurn(id="t", session=empty), "no answer to write on"),
        (SendTurn(id="t", session=empty), "text is empty"),
        (EditTurn(id="t", session=session, message=answer, text="c"), "takes one of the user's"),
        (EditTurn(id="t", session=session, message=foreign, text="c"), "has no message"),
        (SendTurn(id="t", session=99, text="a"), "there is no session 99"),
    ]
    for request, said in mistakes:
        with pytest.raises((InvalidRequestError, SessionNotFoundError), match=said):
            sessions.begin(request)
    for move in (
        lambda shelf: shelf.rollback(session, foreign),
        lambda shelf: shelf.branch(session, foreign),
    ):
        with pytest.raises(SessionNotFoundError, match="has no message"):
            sessions.call(move)
    with pytest.raises(InvalidRequestError, match="nothing to undo"):
        sessions.call(lambda shelf: shelf.undo(empty, 1))
    with pytest.raises(InvalidRequestError, match="nothing to redo"):
        sessions.call(lambda shelf: shelf.undo(session, -1))
    assert sessions.path(session) == ["a", "b"]


def test_a_refused_turn_leaves_nothing(sessions: Sessions) -> None:
    session = sessions.create()
    before = sessions.export(session)
    begun = sessions.begin(SendTurn(id="t", session=session, text="too long"))
    assert sessions.state(session).session.title == "too long"
    sessions.call(lambda shelf: turns.take_back(shelf, begun))
    after = sessions.export(session)
    assert msgspec.structs.replace(after, updated=before.updated) == before
    assert not sessions.state(session).can_undo
    assert sessions.search("long") == []


def test_a_refused_turn_leaves_the_title_that_was_given_meanwhile(sessions: Sessions) -> None:
    session = sessions.create()
    begun = sessions.begin(SendTurn(id="t", session=session, text="too long"))
    sessions.configure(session, title="Mine")
    sessions.call(lambda shelf: turns.take_back(shelf, begun))
    assert sessions.state(session).session.title == "Mine"


def test_configuring_changes_what_is_given_and_nothing_else(sessions: Sessions) -> None:
    params = SamplingParams(temperature=0)
    session = sessions.create(title="a", model="demo", system="Be brief.", params=params)

    def configured(**wishes: object) -> tuple[str, str | None, str | None, SamplingParams]:
        sessions.configure(session, **wishes)
        info = sessions.state(session).session
        return info.title, info.model, info.system, info.params

    assert configured(title="b") == ("b", "demo", "Be brief.", params)
    assert configured(model=None) == ("b", None, "Be brief.", params)
    assert configured(system="Sing.", model="other") == ("b", "other", "Sing.", params)
    assert configured(params=SamplingParams(seed=3)) == (
        "b",
        "other",
        "Sing.",
        SamplingParams(seed=3),
    )
    assert configured(system=None) == ("b", "other", None, SamplingParams(seed=3))
    job = sessions.begin(SendTurn(id="t", session=session, text="hi")).job
    assert (job.model, job.params.seed, len(job.messages or [])) == ("other", 3, 1)


def test_a_story_takes_no_system_prompt_later_either(sessions: Sessions) -> None:
    session = sessions.create(kind="story", title="a")
    with pytest.raises(InvalidRequestError, match="a story has no system prompt"):
        sessions.configure(session, title="b", system="Be brief.")
    assert sessions.state(session).session.title == "a"
    sessions.configure(session, system=None)
    with pytest.raises(BadRequestError, match="nothing to change"):
        decode_request(msgspec.msgpack.encode({"op": "configure_session", "id": "c", "session": 1}))


def test_the_title_is_the_first_thing_said_unless_one_is_given(sessions: Sessions) -> None:
    named, unnamed = sessions.create(title="Mine"), sessions.create()
    for session in (named, unnamed):
        sessions.send(session, "What is\n the   weather " + "today " * 20, "sunny")
        sessions.send(session, "and tomorrow?", "rain")
    assert sessions.state(named).session.title == "Mine"
    title = sessions.state(unnamed).session.title
    assert title.startswith("What is the weather today")
    assert title.endswith("…")
    assert len(title) == 60


def test_a_deleted_session_is_gone_with_all_it_had(sessions: Sessions, database: Database) -> None:
    kept, session = sessions.create(title="kept"), sessions.create(title="gone")
    sessions.send(kept, "stay here", "yes")

    def grow(shelf: Shelf) -> None:
        parent = None  # deeper than SQLite lets deletions cascade
        for number in range(1500):
            parent = shelf.add(session, parent, NewMessage(role="user", content=f"leave {number}"))
        shelf.choose(session, parent)

    sessions.call(grow)
    assert len(sessions.path(session)) == 1500
    sessions.call(lambda shelf: shelf.delete(session))
    with pytest.raises(SessionNotFoundError, match=f"no session {session}"):
        sessions.state(session)
    assert sessions.search("leave") == sessions.search("gone") == []
    assert len(sessions.search("stay")) == 1

    def left(connection: Connection) -> list[int]:
        tables = ("sessions", "messages", "leaf_choices")
        return [
            connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()
            for table in tables
        ]

    assert database.call(left) == [1, 2, 2]


def test_pages_list_every_session_once_the_last_changed_first(sessions: Sessions) -> None:
    made = [sessions.create(title=str(number)) for number in range(25)]
    sessions.send(made[3], "new", "here")
    expected = [made[3], *(s for s in reversed(made) if s != made[3])]
    found, cursor = [], None
    for size in (10, 10, 5):
        page = sessions.call(lambda shelf, c=cursor: shelf.page("p", 10, c))  # type: ignore[misc]
        assert len(page.sessions) == size
        found += [session.id for session in page.sessions]
        cursor = page.cursor
    assert (found, cursor) == (expected, None)
    with pytest.raises(InvalidRequestError, match="cursor is 'x'"):
        sessions.call(lambda shelf: shelf.page("p", 10, "x"))


def test_search_finds_words_in_messages_and_titles(sessions: Sessions) -> None:
    one, two = sessions.create(title="Gardening"), sessions.create(title="Other things")
    sessions.send(one, "how do I plant roses?", "With a spade, in your GARDEN.")
    begun = sessions.send(two, 'I\'d like (some) "tea" -- please* NOT milk', "here")
    assert {(hit.session, hit.message is None) for hit in sessions.search("garden")} == {
        (one, True),
        (one, False),
    }
    (hit,) = sessions.search("roses PLANT")
    assert (hit.session, hit.title) == (one, "Gardening")
    assert "plant roses" in hit.text
    (hit,) = sessions.search('(some) "tea" & ! \' -- not:*')
    assert hit.message == begun.user_message
    for nothing in ("roses tea", "!!!", "absent", " "):
        assert sessions.search(nothing) == []
    assert len(sessions.search("garden", limit=1)) == 1
    sessions.configure(one, title="Cooking")
    assert [hit.session for hit in sessions.search("cooking")] == [one]
    assert sessions.search("gardening") == []


def test_what_was_written_on_is_found(sessions: Sessions) -> None:
    session = sessions.create()
    sessions.turn(SendTurn(id="t", session=session, text="go"), "one rhino", "length")
    sessions.turn(ContinueTurn(id="t", session=session), "ceros", "stop")
    assert len(sessions.search("rhinoceros")) == 1


def test_any_character_is_kept(sessions: Sessions) -> None:
    strange = "a\0b \x1a \x1a\x1b \0\x1b\x1a\0 \ufffd \U0010ffff rhinoceros\0"
    session = sessions.create(title=strange, system=strange, model=strange)
    sessions.send(session, strange, strange)
    state = sessions.state(session)
    assert [message.content for message in state.messages] == [strange, strange]
    kept = state.session
    assert (kept.title, kept.system, kept.model) == (strange, strange, strange)
    hits = sessions.search("rhinoceros")
    assert {hit.title for hit in hits} == {strange}
    assert len(hits) == 3


def test_an_owner_sees_only_his_own(sessions: Sessions, database: Database) -> None:
    session = sessions.create()
    sessions.send(session, "a secret", "kept")
    stranger = Sessions(database, "stranger")
    assert stranger.search("secret") == []
    assert stranger.call(lambda shelf: shelf.page("p", 10, None)).sessions == []
    tries: list[Callable[[Shelf], object]] = [
        lambda shelf: shelf.state("g", session),
        lambda shelf: shelf.configure(ConfigureSession(id="c", session=session, title="mine")),
        lambda shelf: shelf.delete(session),
        lambda shelf: shelf.rollback(session, None),
        lambda shelf: shelf.branch(session, 1),
        lambda shelf: shelf.undo(session, 1),
        lambda shelf: export_session(shelf, session),
        lambda shelf: turns.begin(shelf, SendTurn(id="t", session=session, text="x")),
    ]
    for attempt in tries:
        with pytest.raises(SessionNotFoundError):
            stranger.call(attempt)
    assert sessions.path(session) == ["a secret", "kept"]


def test_what_is_exported_comes_back_the_same(sessions: Sessions) -> None:
    session = sessions.create(system="Be brief.", params=SamplingParams(seed=3, stop=["x"]))
    sessions.send(session, "hällo 🙂", "hi")
    sessions.turn(Regenerate(id="t", session=session), "hey", "length")
    sessions.call(lambda shelf: shelf.rollback(session, None))
    exported = sessions.export(session)
    through_a_file = msgspec.json.decode(msgspec.json.encode(exported), type=SessionExport)
    copy = sessions.call(lambda shelf: import_session(shelf, through_a_file))
    assert copy != session
    assert sessions.export(copy) == exported
    sessions.call(lambda shelf: shelf.branch(copy, sessions_first(shelf, copy)))
    assert sessions.path(copy) == ["hällo 🙂", "hey"]


def sessions_first(shelf: Shelf, session: int) -> int:
    root = shelf.row(session).root_id
    assert isinstance(root, int)
    return root


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"leaf": 2}, "leaf is 2, but there are 2 messages"),
        ({"root": 1}, "root is 1, which has a parent"),
        ({"params": {"echo": True}}, "echo is false"),
        ({"format": "something else"}, "something else"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_broken_export_is_refused(
    sessions: Sessions, change: dict[str, object], said: str
) -> None:
    session = sessions.create()
    sessions.send(session, "a", "b")
    good = msgspec.to_builtins(sessions.export(session))
    assert msgspec.convert(good, SessionExport)
    with pytest.raises(msgspec.ValidationError, match=said):
        msgspec.convert({**good, **change}, SessionExport)


@pytest.mark.parametrize(
    ("request_map", "said"),
    [
        ({"op": "create_session", "kind": "story", "system": "x"}, "a story has no system prompt"),
        ({"op": "continue", "session": 1, "params": {"n": 2}}, "n is 2, but continue"),
        ({"op": "send", "session": 1, "text": "x", "params": {"echo": True}}, "echo is false"),
        ({"op": "edit", "session": 1, "message": 1, "text": ""}, "text"),
        ({"op": "rollback", "session": 1}, "message"),
        ({"op": "search", "text": "x", "limit": 0}, "limit"),
        (
            {
                "op": "generate",
                "kind": "chat",
                "messages": [{"role": "user", "content": "x"}],
                "continue_last": True,
            },
            "the last of them the assistant's",
        ),
        ({"op": "generate", "kind": "story", "prompt": "x", "continue_last": True}, "messages"),
    ],
)
def test_requests_that_make_no_sense_are_refused(request_map: dict[str, object], said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        decode_request(msgspec.msgpack.encode({"id": "x", **request_map}))
