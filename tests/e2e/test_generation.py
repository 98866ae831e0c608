"""Parameters of a request do what they say, through the whole server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from client.requests import SamplingOptions
from client.zmq_client import Client
from shared.errors import InvalidRequestError, QueueFullError
from shared.messages import Done, Failed, Generate, SamplingParams, Token
from shared.protocol import decode_events, encode_request
from tests.e2e.server import Server
from tests.e2e.test_server import raw_socket

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def address(story_model: Path) -> Iterator[str]:
    with Server("--workers", "3", "--model", f"story={story_model}") as server:
        yield server.wait_ready()


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as opened:
        yield opened


@pytest.fixture
def greedy(client: Client) -> Done:
    """60 greedy tokens."""
    return client.story(PROMPT, temperature=0, max_tokens=60).result()


def test_a_stop_string_ends_the_text_before_it_across_token_borders(
    client: Client, greedy: Done
) -> None:
    stop = greedy.text[50:62]
    stream = client.story(PROMPT, temperature=0, max_tokens=60, stop=["not there", stop])
    pieces = "".join(stream)
    done = stream.result()
    assert pieces == done.text == greedy.text[: greedy.text.index(stop)]
    assert done.finish_reason == "stop"
    assert done.choices[0].stop_reason == stop


def test_text_held_back_for_a_stop_string_comes_in_the_end(client: Client, greedy: Done) -> None:
    never = greedy.text[-3:] + "#"
    done = client.story(PROMPT, temperature=0, max_tokens=60, stop=[never]).result()
    assert done.text == greedy.text
    assert done.finish_reason == "length"


def test_a_stop_token_ends_the_text_and_is_reported(client: Client, greedy: Done) -> None:
    token = greedy.token_ids[20]
    done = client.story(PROMPT, temperature=0, max_tokens=60, stop_token_ids=[token]).result()
    assert done.token_ids == greedy.token_ids[: greedy.token_ids.index(token) + 1]
    assert (done.finish_reason, done.choices[0].stop_reason) == ("stop", token)


def test_min_tokens_holds_the_end_off(client: Client, greedy: Done) -> None:
    token = greedy.token_ids[2]
    done = client.story(
        PROMPT, temperature=0, max_tokens=30, stop_token_ids=[token], min_tokens=10
    ).result()
    assert token not in done.token_ids[:10]


def test_ignore_eos_goes_on_to_the_length_asked_for(client: Client) -> None:
    short = client.story("Lily wanted a red ball", temperature=0, max_tokens=200).result()
    assert short.finish_reason == "stop"
    long = client.story(
        "Lily wanted a red ball", temperature=0, max_tokens=200, ignore_eos=True
    ).result()
    assert len(long.token_ids) == 200
    assert long.token_ids[: len(short.token_ids)] == short.token_ids


def test_echo_begins_with_the_prompt(client: Client, greedy: Done) -> None:
    stream = client.story(PROMPT, temperature=0, max_tokens=60, echo=True)
    assert "".join(stream) == PROMPT + greedy.text
    assert stream.result().text == PROMPT + greedy.text


def test_each_of_n_answers_is_what_its_seed_gives_alone(client: Client) -> None:
    together = client.story(PROMPT, temperature=1, seed=5, n=4, max_tokens=20).result()
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    assert together.usage.completion_tokens == sum(len(c.token_ids) for c in together.choices)
    for choice in together.choices:
        seed = 5 + choice.index
        alone = client.story(PROMPT, temperature=1, seed=seed, max_tokens=20).result()
        assert choice.token_ids == alone.token_ids
        assert choice.text == alone.text


def test_the_events_of_n_answers_tell_which_is_which(client: Client) -> None:
    texts = ["", "", ""]
    stream = client.story(PROMPT, temperature=1, seed=5, n=3, max_tokens=20)
    for event in stream.events():
        if isinstance(event, Token):
            texts[event.index] += event.text
    assert texts == [choice.text for choice in stream.result().choices]


def test_each_of_n_answers_tells_its_end_with_its_last_tokens(client: Client) -> None:
    alone = [client.story(PROMPT, temperature=1, seed=s, max_tokens=40).result() for s in (5, 6, 7)]
    first, second, _ = (done.text for done in alone)
    # What only one of the two writes ends it before the other.
    stop = next(second[i : i + 6] for i in range(len(second)) if second[i : i + 6] not in first)
    ended: dict[int, tuple[str | None, str | int | None]] = {}
    written = [0, 0, 0]
    stream = client.story(PROMPT, temperature=1, seed=5, n=3, max_tokens=40, stop=[stop])
    went_on = False
    for event in stream.events():
        if isinstance(event, Token):
            assert event.index not in ended, "nothing comes after the end"
            went_on = went_on or bool(ended)
            written[event.index] += len(event.token_ids)
            if event.finish_reason is not None:
                ended[event.index] = event.finish_reason, event.stop_reason
    choices = stream.result().choices
    assert ended == {c.index: (c.finish_reason, c.stop_reason) for c in choices}
    assert ended[1] == ("stop", stop)
    assert written == [len(choice.token_ids) for choice in choices]
    assert went_on


def test_logprobs_report_the_chosen_token_and_the_best_ones(client: Client) -> None:
    done = client.story(PROMPT, temperature=0, max_tokens=5, logprobs=3).result()
    reported = done.choices[0].logprobs
    assert [entry.token_id for entry in reported] == done.token_ids
    for entry in reported:
        assert entry.logprob <= 0
        assert entry.top[0].token_id == entry.token_id, "greedy chooses the most probable one"
        assert entry.top[0].logprob == pytest.approx(entry.logprob)
        assert len(entry.top) == 3
        assert sorted((t.logprob for t in entry.top), reverse=True) == [
            t.logprob for t in entry.top
        ]
    assert "".join(entry.text for entry in reported).split() == done.text.split()


def test_a_bias_forbids_and_forces_tokens(client: Client, greedy: Done) -> None:
    first = greedy.token_ids[0]
    without = client.story(PROMPT, temperature=0, max_tokens=10, logit_bias={first: -100}).result()
    assert first not in without.token_ids
    forced = client.story(PROMPT, temperature=0, max_tokens=5, logit_bias={77: 100}).result()
    assert forced.token_ids == [77] * 5


def test_penalties_reduce_repetition(client: Client) -> None:
    plain = client.story("The little bird", temperature=0, max_tokens=200).result()
    penalties: list[SamplingOptions] = [
        {"temperature": 0, "max_tokens": 200, "repetition_penalty": 1.3},
        {"temperature": 0, "max_tokens": 200, "frequency_penalty": 1.0},
    ]
    for penalty in penalties:
        changed = client.story("The little bird", **penalty).result()
        assert len(set(changed.token_ids)) / len(changed.token_ids) > len(
            set(plain.token_ids)
        ) / len(plain.token_ids)


def test_the_same_request_gives_the_same_tokens_whatever_runs_beside_it(client: Client) -> None:
    options: SamplingOptions = {
        "temperature": 1.1,
        "top_p": 0.95,
        "top_k": 80,
        "seed": 11,
        "max_tokens": 30,
    }
    alone = client.story(PROMPT, **options).result().token_ids
    others = [client.story("The", temperature=1, max_tokens=60) for _ in range(10)]
    assert client.story(PROMPT, **options).result().token_ids == alone
    for other in others:
        other.cancel()


def test_steps_that_share_a_plan_change_no_answer(story_model: Path) -> None:
    many: list[SamplingOptions] = [
        {"temperature": 0, "max_tokens": 37},
        {"temperature": 0.8, "seed": 4, "max_tokens": 60, "logprobs": 2},
        {"temperature": 1, "seed": 5, "frequency_penalty": 0.5, "stop": [" and"]},
        {"temperature": 1, "seed": 6, "n": 3, "max_tokens": 50, "top_k": 30},
    ]
    answers = []
    for steps in ("1", "8"):
        flags = ("--model", f"story={story_model}", "--steps-per-plan", steps)
        with Server(*flags) as server, Client(server.wait_ready()) as own:
            alone = [own.story(PROMPT, **options).result() for options in many]
            streams = [own.story(PROMPT, **options) for options in many]
            together = [stream.result() for stream in streams]
        assert [done.choices for done in alone] == [done.choices for done in together]
        answers.append([done.choices for done in alone])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"logit_bias": {4000: 1.0}}, "4000"),
        ({"stop_token_ids": [2048]}, "2048"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
        ({"n": 65}, "n"),
        ({"top_p": 2.0}, "top_p"),
    ],
)
def test_what_makes_no_sense_is_refused(
    client: Client, options: SamplingOptions, word: str
) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        client.story(PROMPT, **options).result()


def test_a_full_queue_refuses_with_a_hint_and_loses_nobody(story_model: Path) -> None:
    limits = ("--max-num-seqs", "1", "--queue-limit", "3")
    with Server("--model", f"story={story_model}", *limits) as server:
        address = server.wait_ready()
        socket = raw_socket(address)
        params = SamplingParams(temperature=0, max_tokens=100)
        for i in range(12):
            socket.send(
                encode_request(Generate(id=str(i), kind="story", prompt=PROMPT, params=params))
            )
        ends: dict[str, Done | Failed] = {}
        while len(ends) < 12:
            assert socket.poll(30_000)
            for event in decode_events(socket.recv()):
                if isinstance(event, Done | Failed):
                    ends[event.id] = event
        socket.close()
        refused = [event for event in ends.values() if isinstance(event, Failed)]
        assert refused
        assert all(event.code == "queue_full" for event in refused)
        assert all(event.retry_after_s is not None for event in refused)
        finished = [event for event in ends.values() if isinstance(event, Done)]
        assert len(finished) >= 3
        assert len({tuple(event.token_ids) for event in finished}) == 1


def test_too_many_waiting_prompt_tokens_are_refused(story_model: Path) -> None:
    with (
        Server(
            "--model", f"story={story_model}", "--queue-tokens", "1", "--max-num-seqs", "1"
        ) as s,
        Client(s.wait_ready()) as client,
    ):
        streams = [client.story("The", temperature=1, max_tokens=300) for _ in range(4)]
        last = streams.pop()
        with pytest.raises(QueueFullError, match="prompt tokens") as caught:
            last.result()
        assert caught.value.retry_after_s is not None
