"""Submitted jobs of a whole server: each ends once, whatever ends before it."""

import asyncio
import os
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.zmq_client import AsyncClient, Client, JobCancelledError
from shared.config import PROJECT_ROOT
from shared.errors import (
    InvalidRequestError,
    JobExistsError,
    JobNotFoundError,
    JobsOffError,
    ModelNotFoundError,
)
from shared.job_messages import GetJob, StoredJob, StoredJobs, SubmitJob
from shared.messages import Cancelled, Done, Failed, Started, Token
from tests.e2e.server import Server, run_tpserve, wait_until

PROMPT = "Once upon a time"
LONG = {"temperature": 1.0, "max_tokens": 900, "ignore_eos": True}


def start(file: Path, *arguments: str) -> Server:
    server = Server("--database", f"sqlite:///{file}", "--workers", "2", *arguments)
    server.wait_ready()
    return server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with start(tmp_path_factory.mktemp("jobs") / "tpserve.db") as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


def finished(client: Client, job: str, timeout_s: float = 60) -> StoredJob:
    assert wait_until(lambda: client.jobs.get(job).end is not None, timeout_s), job
    return client.jobs.get(job)


def answer(client: Client, job: str) -> Done:
    end = finished(client, job).end
    assert isinstance(end, Done), end
    return end


def test_a_job_gives_what_the_same_request_gives(client: Client) -> None:
    options = {"temperature": 0.8, "seed": 7, "max_tokens": 80}
    info = client.jobs.submit(PROMPT, **options)  # type: ignore[arg-type]
    assert (info.state, info.kind, info.model) == ("queued", "story", "story")
    done = answer(client, info.job)
    same = client.story(PROMPT, **options).result()  # type: ignore[arg-type]
    assert (done.text, done.token_ids, done.finish_reason) == (
        same.text,
        same.token_ids,
        same.finish_reason,
    )
    assert done.timings.ttft_s > 0
    after = client.jobs.get(info.job).job
    assert after.state == "done"
    assert after.started is not None
    assert after.ended is not None
    assert after.created <= after.started <= after.ended
    chat = client.jobs.submit([{"role": "user", "content": "Hello!"}], temperature=0)
    expected = client.chat([{"role": "user", "content": "Hello!"}], temperature=0).result()
    assert answer(client, chat.job).text == expected.text


def test_submitted_twice_it_runs_once(client: Client) -> None:
    before = client.status().totals.jobs_done
    for _ in range(3):
        assert client.jobs.submit(PROMPT, job="only-once", max_tokens=5).job == "only-once"
    first = answer(client, "only-once")
    assert client.jobs.submit(PROMPT, job="only-once", max_tokens=5).state == "done"
    assert answer(client, "only-once").choices == first.choices
    assert client.status().totals.jobs_done == before + 1
    with pytest.raises(JobExistsError):
        client.jobs.submit(PROMPT, job="only-once", max_tokens=6)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "max_tokens": 40, "logprobs": 1},
        {"temperature": 1, "max_tokens": 40, "n": 3, "echo": True},
        {"temperature": 0, "max_tokens": 60, "stop": ["park", "happy", "the big"]},
    ],
)
def test_a_job_can_be_followed_from_any_token_on(
    client: Client, options: dict[str, object]
) -> None:
    job = client.jobs.submit(PROMPT, **options).job  # type: ignore[arg-type]
    done = answer(client, job)
    for known in range(len(done.token_ids) + 2):
        texts = [""] * len(done.choices)
        tokens: list[list[int]] = [[] for _ in done.choices]
        logprobs: list[list[object]] = [[] for _ in done.choices]
        for event in client.jobs.follow(job, known).events():
            if isinstance(event, Token):
                texts[event.index] += event.text
                tokens[event.index] += event.token_ids
                logprobs[event.index] += event.logprobs
            else:
                assert isinstance(event, Done)
                assert event.choices == done.choices
        for choice, text, token_ids, details in zip(
            done.choices, texts, tokens, logprobs, strict=True
        ):
            assert token_ids == choice.token_ids[known:]
            assert choice.text.endswith(text)
            assert details == choice.logprobs[known:]
            if known == 0:
                assert text == choice.text
            if known >= len(choice.token_ids):
                assert text == ""


def test_while_it_runs_followers_get_what_they_lack_and_leave_without_harm(
    client: Client, server: Server
) -> None:
    job = client.jobs.submit(PROMPT, **LONG, seed=3).job  # type: ignore[arg-type]
    with Client(server.address) as other:
        early = other.jobs.follow(job)
        seen = ""
        for event in early.events():
            seen += event.text if isinstance(event, Token) else ""
            if len(early.token_ids) > 20:
                break
        early.close()
        known = len(early.token_ids)
        late = other.jobs.follow(job, known)
        rest = "".join(late)
        done = late.result()
    assert seen + rest == done.text == client.story(PROMPT, **LONG, seed=3).result().text  # type: ignore[arg-type]
    assert len(late.token_ids) == 900
    assert client.jobs.get(job).job.state == "done"


def test_a_job_outlives_its_client(server: Server, client: Client) -> None:
    with Client(server.address) as gone:
        job = gone.jobs.submit(PROMPT, **LONG).job  # type: ignore[arg-type]
    assert len(answer(client, job).token_ids) == 900


def test_cancel_ends_it_and_keeps_what_there_is(client: Client) -> None:
    many = [client.jobs.submit(PROMPT, **LONG).job for _ in range(200)]  # type: ignore[arg-type]
    stream = client.jobs.follow(many[0])
    next(event for event in stream.events() if isinstance(event, Token))
    stream.close()
    last = client.jobs.follow(many[-1])
    for job in reversed(many):
        client.jobs.cancel(job)
    with pytest.raises(JobCancelledError):
        last.result()
    states = {job: finished(client, job) for job in many}
    assert states[many[-1]].job.state == "cancelled"
    assert states[many[-1]].job.attempts == 0
    partial = [s for s in states.values() if isinstance(s.end, Cancelled) and s.end.partial]
    for stored in partial:
        assert isinstance(stored.end, Cancelled)
        assert stored.end.partial[0].token_ids
        text = "".join(client.jobs.follow(stored.job.job))
        assert text == stored.end.partial[0].text
    assert client.jobs.cancel(many[0]).job == states[many[0]].job
    assert client.status().running == 0


def test_jobs_of_others_are_not_found(client: Client) -> None:
    request = SubmitJob(id="s", job="hers", kind="story", prompt="x", user="ada")
    assert client.ask(request, StoredJob).job.job == "hers"
    for about in (client.jobs.get, client.jobs.cancel, client.jobs.delete):
        with pytest.raises(JobNotFoundError, match="'hers'"):
            about("hers")
    with pytest.raises(JobNotFoundError):
        client.jobs.follow("hers").result()
    assert "hers" not in {job.job for job in client.jobs.page(limit=1000).jobs}
    assert client.ask(GetJob(id="g", job="hers", user="ada"), StoredJob).job.job == "hers"


def test_what_cannot_run_is_refused_or_fails_with_its_reason(client: Client) -> None:
    with pytest.raises(ModelNotFoundError, match="'nope' is not served"):
        client.jobs.submit(PROMPT, model="nope")
    with pytest.raises(InvalidRequestError, match="temperature"):
        client.jobs.submit(PROMPT, temperature=-1)
    job = client.jobs.submit("many words " * 3000).job
    end = finished(client, job).end
    assert isinstance(end, Failed)
    assert end.code == "context_length_exceeded"
    with pytest.raises(InvalidRequestError, match="the prompt has"):
        client.jobs.follow(job).result()
    client.jobs.delete(job)
    with pytest.raises(JobNotFoundError):
        client.jobs.get(job)


def test_a_job_waits_while_its_model_is_away(client: Client) -> None:
    client.unload("chat")
    try:
        with pytest.raises(ModelNotFoundError):
            client.jobs.submit([{"role": "user", "content": "Hello!"}], model="chat")
    finally:
        client.load("chat", PROJECT_ROOT / "models" / "demo-chat")
    job = client.jobs.submit([{"role": "user", "content": "Hello!"}]).job
    assert answer(client, job).model == "chat"


def test_a_worker_that_dies_costs_the_followers_a_pause(client: Client, server: Server) -> None:
    job = client.jobs.submit(PROMPT, **LONG, seed=11).job  # type: ignore[arg-type]
    stream = client.jobs.follow(job)
    events = stream.events()
    next(event for event in events if isinstance(event, Token))
    os.kill(server.workers()[1].pid, signal.SIGKILL)
    rest = list(events)
    assert isinstance(rest[-1], Done)
    assert not [event for event in rest if isinstance(event, Started)]
    assert stream.text == rest[-1].text
    assert client.jobs.get(job).job.attempts == 1
    assert client.story(PROMPT, **LONG, seed=11).result().text == stream.text  # type: ignore[arg-type]


def test_over_a_kill_of_the_whole_server_every_job_runs_to_one_end(tmp_path: Path) -> None:
    file = tmp_path / "tpserve.db"
    with start(file, "--max-num-seqs", "4") as server, Client(server.address) as client:
        names = [f"job-{index}" for index in range(40)]
        for index, name in enumerate(names):
            client.jobs.submit(PROMPT, job=name, seed=index, **LONG)  # type: ignore[arg-type]
        assert wait_until(lambda: client.status().running > 0, 20)
        server.process.kill()
        server.wait_exit(20)
    with sqlite3.connect(file) as found:
        assert found.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        states = dict(found.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
        assert sum(states.values()) == 40
        assert states.get("running", 0) > 0
    with start(file) as server, Client(server.address) as client:
        for index in (0, 7, 39):
            done = client.jobs.follow(names[index]).result()
            same = client.story(PROMPT, seed=index, **LONG).result()  # type: ignore[arg-type]
            assert done.token_ids == same.token_ids
        stored = [finished(client, name) for name in names]
        assert {job.job.state for job in stored} == {"done"}
        assert {job.job.attempts for job in stored} <= {1, 2}
        assert len(client.jobs.page(limit=1000).jobs) == 40


def test_a_stopped_server_goes_on_later_and_counts_no_attempt(tmp_path: Path) -> None:
    file = tmp_path / "tpserve.db"
    with start(file, "--max-num-seqs", "1") as server, Client(server.address) as client:
        for index in range(30):
            client.jobs.submit(PROMPT, job=f"j{index}", **LONG)  # type: ignore[arg-type]
        assert server.stop() == 0
    with start(file) as server, Client(server.address) as client:
        assert {finished(client, f"j{index}").job.attempts for index in range(30)} == {1}


def test_without_a_database_there_are_no_jobs() -> None:
    with Server() as server:
        server.wait_ready()
        with Client(server.address) as client:
            with pytest.raises(JobsOffError, match="--database none"):
                client.jobs.submit(PROMPT)
            assert client.story(PROMPT, max_tokens=3).result().token_ids


def test_an_event_loop_has_the_same_jobs(server: Server) -> None:
    async def work() -> tuple[StoredJobs, str, str]:
        async with AsyncClient(server.address) as client:
            job = (await client.jobs.submit(PROMPT, temperature=0, max_tokens=20)).job
            text = "".join([piece async for piece in client.jobs.follow(job)])
            stored = await client.jobs.get(job)
            page = await client.jobs.page(limit=1)
            await client.jobs.cancel(job)
            await client.jobs.delete(job)
            assert isinstance(stored.end, Done)
            return page, text, stored.end.text

    page, text, stored = asyncio.run(work())
    assert text == stored != ""
    assert len(page.jobs) == 1


def test_the_command_line_submits_lists_shows_follows_cancels_and_forgets(server: Server) -> None:
    at = ["--server", server.address]
    submitted = run_tpserve(
        ["submit", *at, "--greedy", "--max-tokens", "30", "--id", "by-hand", PROMPT]
    )
    assert (submitted.stdout, submitted.returncode) == ("by-hand\n", 0)
    followed = run_tpserve(["jobs", "follow", *at, "by-hand"])
    shown = run_tpserve(["jobs", "show", *at, "by-hand"])
    assert followed.stdout == shown.stdout != ""
    story = run_tpserve(["story", *at, "--greedy", "--max-tokens", "30", PROMPT])
    assert story.stdout == PROMPT + shown.stdout
    rest = run_tpserve(["jobs", "follow", *at, "by-hand", "--from-token", "10"])
    assert followed.stdout.endswith(rest.stdout)
    assert "by-hand" in run_tpserve(["jobs", "list", *at, "--state", "done"]).stdout
    assert run_tpserve(["jobs", "cancel", *at, "by-hand"]).stdout == "job by-hand: done\n"
    assert run_tpserve(["jobs", "rm", *at, "by-hand"]).stdout == "job by-hand deleted\n"
    gone = run_tpserve(["jobs", "show", *at, "by-hand"])
    assert (gone.stderr, gone.returncode) == ("tpserve: error: there is no job 'by-hand'\n", 1)
    chat = run_tpserve(["submit", *at, "--chat", "--greedy", "--json", "-"], stdin="Hello!\n")
    assert '"kind":"chat"' in chat.stdout
