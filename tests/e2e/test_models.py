"""Models that are loaded and unloaded while the server runs."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from client.zmq_client import Client
from shared.errors import TpserveError
from shared.messages import Loading, ModelInfo
from tests.e2e.server import TPSERVE, Server

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def server(story_model: Path) -> Iterator[Server]:
    with Server("--workers", "2", "--model", f"story={story_model}") as server:
        server.wait_ready()
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address) as opened:
        yield opened
        for model in opened.models():
            if model.name != "story":
                opened.unload(model.name, force=True)


@pytest.fixture(scope="module")
def larger(make_checkpoint: Callable[..., Path]) -> Path:
    """A model of 130 MB."""
    return make_checkpoint("minueza-32m")


def greedy(client: Client, model: str, tokens: int = 40) -> list[int]:
    done = client.story(PROMPT, model=model, temperature=0, max_tokens=tokens, ignore_eos=True)
    return done.result().token_ids


def states(client: Client) -> dict[str, str]:
    return {model.name: model.state for model in client.models()}


def private_bytes(server: Server) -> int:
    """Of all workers."""
    return sum(worker.memory_full_info().uss for worker in server.workers())


def refused(call: Callable[[], object]) -> TpserveError:
    with pytest.raises(TpserveError) as caught:
        call()
    return caught.value


def test_a_model_comes_and_goes_while_another_one_is_served(
    server: Server, client: Client, larger: Path
) -> None:
    alone = greedy(client, "story", 400)
    before = private_bytes(server)
    answers: list[list[int]] = []
    stop = threading.Event()

    def write_stories() -> None:
        with Client(server.address) as own:
            while not stop.is_set():
                answers.append(greedy(own, "story", 400))

    writer = threading.Thread(target=write_stories)
    writer.start()
    progress: list[Loading] = []
    model = client.load("other", larger, dtype="bf16", on_progress=progress.append)
    stop.set()
    writer.join()
    assert answers
    assert all(answer == alone for answer in answers)
    assert (model.name, model.state, model.dtype) == ("other", "ready", "bf16")
    assert {event.phase for event in progress} >= {"opening", "reading"}
    reading = [event.ranks for event in progress if event.ranks]
    for rank in range(2):
        done = [ranks[rank].bytes_done for ranks in reading]
        assert done == sorted(done)
        assert all(ranks[rank].bytes_total >= ranks[rank].bytes_done for ranks in reading)
    assert private_bytes(server) > before + 0.9 * sum(model.weight_bytes)
    assert states(client) == {"story": "ready", "other": "ready"}
    first = greedy(client, "other")
    assert client.unload("other") == sum(model.weight_bytes) + sum(model.kv_bytes)
    assert states(client) == {"story": "ready"}
    assert private_bytes(server) < before + 0.2 * sum(model.weight_bytes)
    assert refused(lambda: greedy(client, "other")).code == "model_not_found"
    client.load("other", larger, dtype="bf16")
    assert greedy(client, "other") == first
    assert greedy(client, "story", 400) == alone


def test_a_load_that_fails_leaves_nothing_behind(
    server: Server, client: Client, larger: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(larger, broken)
    weights = broken / "model.safetensors"
    head, tail = weights.read_bytes(), b"model.norm.weight"
    weights.write_bytes(head.replace(tail, b"model.gone.weight", 1))
    before = private_bytes(server)
    error = refused(lambda: client.load("other", broken))
    assert "model.norm.weight" in error.message
    assert states(client) == {"story": "ready"}
    assert private_bytes(server) < before + 20e6
    assert client.load("other", larger).state == "ready"


def test_what_cannot_be_loaded_is_refused_before_anything_is_read(
    client: Client, story_model: Path, larger: Path, tmp_path: Path
) -> None:
    assert "loaded already" in refused(lambda: client.load("story", story_model)).message
    assert "neither a folder nor" in refused(lambda: client.load("x", tmp_path / "nothing")).message
    huge = tmp_path / "huge"
    huge.mkdir()
    for file in larger.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, huge)
    config = json.loads((huge / "config.json").read_text())
    config |= {"num_hidden_layers": 1000, "intermediate_size": 1 << 20}
    (huge / "config.json").write_text(json.dumps(config))
    error = refused(lambda: client.load("x", huge))
    assert error.code == "out_of_memory"
    assert "needs 2 x" in error.message
    assert "not loaded" in refused(lambda: client.unload("x")).message
    assert states(client) == {"story": "ready"}


def test_unloading_waits_for_jobs_or_ends_them(client: Client, larger: Path) -> None:
    client.load("other", larger)
    stream = client.story(PROMPT, model="other", temperature=0, max_tokens=300, ignore_eos=True)
    pieces = iter(stream)
    next(pieces)
    client.unload("other")
    assert len(stream.result().token_ids) == 300

    client.load("other", larger)
    stream = client.story(PROMPT, model="other", temperature=0, ignore_eos=True)
    pieces = iter(stream)
    next(pieces)
    client.unload("other", force=True)
    assert refused(lambda: stream.result()).code == "model_unloaded"


def test_a_load_can_be_given_up(server: Server, client: Client, larger: Path) -> None:
    outcome: list[ModelInfo | TpserveError] = []
    started = threading.Event()

    def load() -> None:
        with Client(server.address) as own:
            try:
                outcome.append(own.load("other", larger, on_progress=lambda _: started.set()))
            except TpserveError as error:
                outcome.append(error)

    loader = threading.Thread(target=load)
    loader.start()
    assert started.wait(30)
    client.unload("other")
    loader.join()
    assert isinstance(outcome[0], TpserveError)
    assert outcome[0].code == "model_unloaded"
    assert states(client) == {"story": "ready"}
    assert client.load("other", larger).state == "ready"


def test_a_worker_that_dies_while_it_loads_ends_the_load(
    story_model: Path, make_checkpoint: Callable[..., Path]
) -> None:
    large = make_checkpoint("minueza-32m")
    with Server("--workers", "2", "--model", f"story={story_model}") as server:
        server.wait_ready()
        with Client(server.address) as client:
            before = greedy(client, "story")

            victim = server.workers()[1]
            victim.suspend()  # or it might be done before it is killed

            def kill(event: Loading) -> None:
                if event.phase == "reading":
                    victim.kill()

            error = refused(lambda: client.load("other", large, on_progress=kill))
            assert error.code == "worker_lost"
            deadline = time.monotonic() + 60
            while not client.health().ready and time.monotonic() < deadline:
                time.sleep(0.1)
            assert states(client) == {"story": "ready"}
            assert greedy(client, "story") == before


def test_the_commands(server: Server, client: Client, larger: Path) -> None:
    def tpserve(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TPSERVE, *arguments], capture_output=True, text=True, timeout=60, check=False
        )

    to = ("--server", server.address)
    ran = tpserve("load", f"other={larger}", "--dtype", "bf16", *to)
    assert ran.returncode == 0, ran.stderr
    assert "other: mistral as bf16" in ran.stdout
    assert "other" in tpserve("models", *to).stdout
    ran = tpserve("unload", "other", *to)
    assert "other is unloaded" in ran.stdout
    assert states(client) == {"story": "ready"}
    for wrong in (["load", "other", *to], ["load", "o=x", "--dtype", "fp8", *to]):
        ran = tpserve(*wrong)
        assert ran.returncode == 1
        assert "Traceback" not in ran.stderr
    assert tpserve("plan", str(larger), "--workers", "3", "--no-speed").stdout.endswith("fits\n")
    assert tpserve("plan", "/nothing").returncode == 2


def test_one_worker_without_memory_undoes_the_load_on_all(
    story_model: Path, make_checkpoint: Callable[..., Path]
) -> None:
    large = make_checkpoint("minueza-32m")
    with Server("--workers", "2", "--model", f"story={story_model}") as server:
        server.wait_ready()
        poor = server.workers()[1]
        before = private_bytes(server)
        with Client(server.address) as client:
            answer = greedy(client, "story")
            # Room for a thread and for reading, not for the weights.
            limit = poor.memory_info().vms + (48 << 20)
            unlimited = poor.rlimit(psutil.RLIMIT_AS)
            poor.rlimit(psutil.RLIMIT_AS, (limit, unlimited[1]))
            error = refused(lambda: client.load("other", large))
            assert "worker 1" in error.message
            assert "memory" in error.message.lower()
            assert states(client) == {"story": "ready"}
            assert greedy(client, "story") == answer
            assert private_bytes(server) < before + 20e6
            assert client.status().epoch == 1, "nobody was started again"
            poor.rlimit(psutil.RLIMIT_AS, unlimited)
            assert client.load("other", large).state == "ready"


def test_everyone_who_asks_for_an_unload_is_answered(
    server: Server, client: Client, larger: Path
) -> None:
    model = client.load("other", larger)
    stream = client.story(PROMPT, model="other", temperature=0, ignore_eos=True)
    texts = iter(stream)  # kept, for the job ends with it
    next(texts)
    freed: list[int] = []

    def unload(force: bool) -> None:
        with Client(server.address) as own:
            freed.append(own.unload("other", force=force))

    patient = threading.Thread(target=unload, args=[False])
    patient.start()
    deadline = time.monotonic() + 30
    while states(client)["other"] != "unloading" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert refused(lambda: greedy(client, "other")).code == "not_ready"
    unload(force=True)
    patient.join(30)
    assert freed == [sum(model.weight_bytes) + sum(model.kv_bytes)] * 2


def test_workers_are_replaced_when_no_model_is_loaded(story_model: Path) -> None:
    with Server("--workers", "2", "--model", f"story={story_model}") as server:
        server.wait_ready()
        with Client(server.address) as client:
            before = greedy(client, "story")
            client.unload("story")
            assert states(client) == {}
            assert refused(lambda: greedy(client, "story")).code == "model_not_found"
            server.workers()[0].kill()
            deadline = time.monotonic() + 60
            while client.status().epoch == 1 or not client.health().ready:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            client.load("story", story_model)
            assert greedy(client, "story") == before
