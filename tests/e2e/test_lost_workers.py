"""Workers that are lost at any moment: every job goes on, token for token, and its client sees a pause."""

import itertools
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from client.zmq_client import Client
from shared.errors import JobKillsWorkersError, TpserveError, WorkerLostError
from shared.messages import Choice, Status, Token
from tests.e2e.server import Server, wait_until

PROMPT = "Once upon a time"
LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 200}
JOBS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, **LONG},
    "seeded": {"temperature": 1, "seed": 1, **LONG},
    "answers": {"temperature": 0.9, "seed": 2, "n": 3, "top_p": 0.9, **LONG},
    "logprobs": {"temperature": 1, "seed": 3, "n": 2, "logprobs": 2, **LONG},
    "penalties": {"temperature": 0.7, "seed": 4, "repetition_penalty": 1.3, **LONG},
    "counts": {"temperature": 0.7, "seed": 5, "frequency_penalty": 0.4, **LONG},
    "stop": {"temperature": 1, "seed": 6, "stop": ["happy", "the big", " mom."], "n": 2},
    "shortest": {"temperature": 1, "seed": 7, "min_tokens": 100, "max_tokens": 150},
    "long prompt": {"temperature": 0, "max_tokens": 100, "ignore_eos": True},
}
TEXTS = [PROMPT * (1 + k) for k in range(24)]
POISON_SEED = 666_666


def work(client: Client, name: str) -> list[Choice] | list[bytes]:
    """Run a job, or embed texts; what has come piece by piece must be what comes at the end."""
    if name == "texts":
        return client.embed(TEXTS).vectors
    prompt = PROMPT * 60 if name == "long prompt" else PROMPT
    stream = client.story(prompt, **JOBS[name])
    pieces: dict[int, list[Token]] = {}
    for event in stream.events():
        if isinstance(event, Token):
            pieces.setdefault(event.index, []).append(event)
    choices = stream.result().choices
    for choice in choices:
        got = pieces[choice.index]
        assert "".join(piece.text for piece in got) == choice.text
        assert [token for piece in got for token in piece.token_ids] == choice.token_ids
        assert [detail for piece in got for detail in piece.logprobs] == choice.logprobs
    return choices


class Neighbours(threading.Thread):
    """A client that asks for one job after the other until it is told to end."""

    def __init__(self, address: str, names: list[str]) -> None:
        super().__init__()
        self._address, self._names = address, names
        self._stop_asked = threading.Event()
        self.got: list[tuple[str, object]] = []

    def run(self) -> None:
        with Client(self._address) as client:
            for name in itertools.cycle(self._names):
                if self._stop_asked.is_set():
                    return
                try:
                    self.got.append((name, work(client, name)))
                except (TpserveError, AssertionError) as problem:
                    self.got.append((name, problem))

    def stop(self) -> None:
        """And wait for its last jobs."""
        self._stop_asked.set()
        self.join(120)
        assert not self.is_alive()


UnderLoad = Callable[[str], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def under_load(story_model: Path) -> UnderLoad:
    """Clients that keep a server busy; in the end each must have got what one worker gives in peace."""
    with Server("--model", f"story={story_model}") as server, Client(server.wait_ready()) as client:
        expected = {name: work(client, name) for name in (*JOBS, "texts")}

    @contextmanager
    def load(address: str) -> Iterator[None]:
        names = list(expected)
        clients = [Neighbours(address, names[at:] + names[:at]) for at in (0, 3, 6)]
        for one in clients:
            one.start()
        try:
            assert wait_until(lambda: any(one.got for one in clients), 60)
            yield
        finally:
            for one in clients:
                one.stop()
        for one in clients:
            for name, got in one.got:
                assert got == expected[name], name

    return load


def wait_again(client: Client, epoch: int, model: str = "story") -> None:
    """Until workers of a later epoch are ready, and those that were under way have run alone."""
    assert wait_until(lambda: client.health().ready and client.status().epoch > epoch, 60)
    client.story(PROMPT, model=model, max_tokens=1).result()  # comes in after them


def nothing_is_left(server: Server, client: Client, workers: int) -> Status:
    """No block and no slot that anybody still holds, no process too many."""
    status = client.status()
    assert (status.kv_blocks_used, status.running, sum(status.queued.values())) == (0, 0, 0)
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) == workers + 1, "and the fork server"
    assert not [p for p in children if p.status() == psutil.STATUS_ZOMBIE]
    return status


@pytest.mark.parametrize(
    ("workers", "comm"), [(2, "shm"), (3, "zmq"), (1, "shm")], ids=["2-shm", "3-zmq", "1"]
)
def test_whoever_is_killed_whenever_all_jobs_go_on(
    story_model: Path, under_load: UnderLoad, workers: int, comm: str
) -> None:
    chance = random.Random(workers)
    with Server(
        *("--workers", str(workers), "--comm", comm, "--model", f"story={story_model}")
    ) as server:
        with Client(server.wait_ready()) as client:
            with under_load(server.address):
                for _ in range(4):
                    time.sleep(chance.uniform(0, 0.5))
                    epoch = client.status().epoch
                    chance.choice(server.workers()).kill()
                    wait_again(client, epoch)
            status = nothing_is_left(server, client, workers)
        assert (status.totals.restarts, status.totals.jobs_given_up) == (4, 0)
        assert status.totals.jobs_resumed > 0
        assert server.stop() == 0


def test_workers_that_are_killed_while_they_load_cost_the_jobs_a_longer_pause(
    story_model: Path, under_load: UnderLoad
) -> None:
    with Server("--workers", "2", "--model", f"story={story_model}") as server:
        with Client(server.wait_ready()) as client:
            with under_load(server.address):
                known: set[psutil.Process] = set()
                for rank in (1, 0, 1):
                    kill_a_new_one(server, rank, known)
                wait_again(client, 3)
            status = nothing_is_left(server, client, 2)
        assert (status.totals.restarts, status.totals.jobs_given_up) == (3, 0)


def kill_a_new_one(server: Server, rank: int, known: set[psutil.Process]) -> None:
    """As soon as it is there: it has yet to load its model."""

    def killed_one() -> bool:
        try:
            workers = server.workers()
        except psutil.Error:  # one has just ended
            return False
        if len(workers) <= rank or workers[rank] in known:
            return False
        known.update(workers)
        workers[rank].kill()
        return True

    assert wait_until(killed_one, 30)


def test_a_worker_that_stands_still_beyond_the_deadline_is_replaced(
    story_model: Path, under_load: UnderLoad
) -> None:
    with Server(
        *("--workers", "2", "--step-timeout", "2", "--model", f"story={story_model}")
    ) as server:
        with Client(server.wait_ready()) as client:
            with under_load(server.address):
                victim = server.workers()[-1]
                victim.suspend()
                time.sleep(0.5)
                victim.resume()
                time.sleep(0.5)
                assert client.status().epoch == 1, "a pause is not a loss"
                victim.suspend()
                wait_again(client, 1)
                assert not victim.is_running()
            status = nothing_is_left(server, client, 2)
        assert status.totals.restarts == 1


@pytest.mark.parametrize(
    ("position", "rank", "how"),
    [(0, 1, "kill"), (60, 0, "kill"), (60, 1, "raise"), (150, 0, "hang")],
)
def test_a_job_that_kills_its_workers_is_given_up_and_its_neighbours_are_as_if_alone(
    story_model: Path, under_load: UnderLoad, position: int, rank: int, how: str
) -> None:
    poison = {
        "PYTHONPATH": str(Path(__file__).parent / "poison"),
        "TPSERVE_TEST_POISON": f"{POISON_SEED},{position},{rank},{how}",
    }
    with (
        Server(
            *("--workers", "2", "--step-timeout", "2", "--model", f"story={story_model}"),
            env=poison,
        ) as server,
        Client(server.wait_ready()) as client,
    ):
        with under_load(server.address):
            stream = client.story(
                PROMPT, temperature=1, seed=POISON_SEED, request_id="poison", **LONG
            )
            with pytest.raises(JobKillsWorkersError, match=r"lost during a step of this job"):
                stream.result()
            wait_again(client, 2)
        status = nothing_is_left(server, client, 2)
        assert (status.totals.restarts, status.totals.jobs_given_up) == (2, 1)
        if position:
            assert stream.token_ids, "what it had until then was sent"
        if how == "raise":  # the worker itself could say whose step it was
            assert any(
                re.search(r"epoch 2, step \d+ of story for poison$", line) for line in server.log
            )


def test_jobs_that_kill_workers_do_not_bring_the_server_down(
    story_model: Path, tmp_path: Path
) -> None:
    poison = {
        "PYTHONPATH": str(Path(__file__).parent / "poison"),
        "TPSERVE_TEST_POISON": f"{POISON_SEED},0,0,kill",
    }
    with (
        Server(
            *("--model", f"story={story_model}", "--database", f"sqlite:///{tmp_path / 'db'}"),
            env=poison,
        ) as server,
        Client(server.wait_ready()) as client,
    ):
        for _ in range(3):
            with pytest.raises(JobKillsWorkersError, match="worker 0"):
                client.story(PROMPT, temperature=1, seed=POISON_SEED).result()
        job = client.jobs.submit(PROMPT, temperature=1, seed=POISON_SEED).job
        with pytest.raises(JobKillsWorkersError, match="worker 0"):
            client.jobs.follow(job).result()
        assert client.jobs.get(job).job.attempts == 1
        assert client.status().totals.restarts == 8
        assert client.story(PROMPT, temperature=0, max_tokens=3).result().token_ids


def test_workers_that_are_lost_again_and_again_end_the_server_and_clients_hear_why(
    story_model: Path,
) -> None:
    with (
        Server("--workers", "2", "--model", f"story={story_model}") as server,
        Client(server.wait_ready()) as client,
    ):
        stop = threading.Event()

        def kill_all() -> None:
            while not stop.is_set() and server.process.poll() is None:
                try:
                    server.workers()[1].kill()
                except (psutil.Error, IndexError):  # not there yet, or not any more
                    time.sleep(0.01)

        killer = threading.Thread(target=kill_all)
        stream = client.story(PROMPT, **LONG)
        killer.start()
        try:
            with pytest.raises(
                WorkerLostError, match=r"worker 1 \(pid \d+\) was killed by SIGKILL"
            ):
                stream.result()
            assert server.wait_exit(30) == 1
        finally:
            stop.set()
            killer.join()
    errors = [line for line in server.log if line.startswith("tpserve: error:")]
    assert len(errors) == 1
    assert "worker 1" in errors[0]


def test_who_comes_while_the_workers_are_away_waits_for_them(story_model: Path) -> None:
    with (
        Server("--workers", "2", "--model", f"story={story_model}") as server,
        Client(server.wait_ready()) as client,
    ):
        expected = client.story(PROMPT, temperature=0, max_tokens=20).result().token_ids
        children = psutil.Process(server.process.pid).children()
        (fork_server,) = (p for p in children if "worker.fork_server" in p.cmdline())
        fork_server.suspend()
        server.workers()[0].kill()
        assert wait_until(lambda: not client.health().ready, 10)
        assert "worker 0" in client.health().reason
        stream = client.story(PROMPT, temperature=0, max_tokens=20)
        assert wait_until(lambda: client.status().queued["story"] == 1, 10)
        fork_server.resume()
        assert stream.result().token_ids == expected


def test_models_that_were_loaded_later_come_back_and_those_that_leave_finish_their_jobs(
    story_model: Path, make_checkpoint: Callable[..., Path]
) -> None:
    with (
        Server("--workers", "2", "--model", f"story={story_model}") as server,
        Client(server.wait_ready()) as client,
        Client(server.address) as other,
    ):
        client.load("slow", make_checkpoint("minueza-32m"))
        wish: dict[str, Any] = {"model": "slow", "temperature": 0, **LONG}
        expected = client.story(PROMPT, **wish).result().token_ids
        capacity = {m.name: m.kv_capacity_tokens for m in client.models()}
        streams = [client.story(PROMPT, **wish) for _ in range(2)]
        assert wait_until(lambda: client.status().running == 2, 30)
        server.workers()[1].kill()
        wait_again(client, 1, "slow")
        assert {m.name: m.kv_capacity_tokens for m in client.models()} == capacity
        unloading = threading.Thread(target=other.unload, args=["slow"])
        unloading.start()
        assert wait_until(lambda: states(client)["slow"] == "unloading", 30)
        server.workers()[0].kill()
        assert [stream.result().token_ids for stream in streams] == [expected] * 2
        unloading.join(60)
        assert states(client) == {"story": "ready"}
        assert client.story(PROMPT, temperature=0, max_tokens=3).result().token_ids


def states(client: Client) -> dict[str, str]:
    return {model.name: model.state for model in client.models()}
