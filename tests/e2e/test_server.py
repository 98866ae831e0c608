"""What a user of the server relies on: one clear line for a mistake, no hang, nothing left behind."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from client.zmq_client import Client
from shared.errors import ModelNotFoundError, TpserveError
from shared.messages import (
    Cancel,
    Cancelled,
    Done,
    Failed,
    Generate,
    Progress,
    SamplingParams,
    Token,
)
from shared.protocol import decode_events, encode_request
from tests.e2e.server import Server, run_tpserve, wait_until

LONG = SamplingParams(temperature=1, max_tokens=480, ignore_eos=True)


@pytest.fixture(scope="module")
def slow_model(make_checkpoint: Callable[..., Path]) -> Path:
    """One whose answers take seconds: a story may be written before anybody can look."""
    return make_checkpoint("minueza-32m")


@pytest.fixture(scope="module")
def server(story_model: Path, slow_model: Path) -> Iterator[Server]:
    models = ("--model", f"story={story_model}", "--model", f"slow={slow_model}")
    with Server("--workers", "2", *models) as started:
        yield started


def long_job(number: int, stream: bool = True) -> bytes:
    """480 tokens of the slow model."""
    request = Generate(
        id=str(number), kind="story", prompt="The", model="slow", params=LONG, stream=stream
    )
    return encode_request(request)


@pytest.fixture(scope="module")
def address(server: Server) -> str:
    return server.wait_ready()


def test_one_coordinator_and_n_workers(server: Server, address: str) -> None:
    assert len(server.workers()) == 2
    with Client(address) as client:
        status = client.status()
    assert status.ready
    assert [w.pid for w in status.workers] == [p.pid for p in server.workers()]
    assert [v for w in status.workers for v in w.virtual_shards] == list(range(8))


def test_the_same_words_asked_twice_are_found_in_the_cache(address: str) -> None:
    prompt = "Once upon a time there was a little cat who liked to play in the garden. " * 4
    with Client(address) as client:
        first = client.story(prompt, temperature=0, max_tokens=5).result()
        second = client.story(prompt, temperature=0, max_tokens=5).result()
    assert second.token_ids == first.token_ids
    assert second.usage.cached_tokens >= second.usage.prompt_tokens - 16


def test_a_prompt_that_is_not_to_be_cached_is_neither_found_nor_left_there(address: str) -> None:
    prompt = "There once was a very small boat that sailed over the sea to a far land. " * 4
    with Client(address) as client:
        answers = [
            client.story(prompt, temperature=0, max_tokens=5, cache_prompt=wanted).result()
            for wanted in (False, True, False, True)
        ]
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
    cached = [answer.usage.cached_tokens for answer in answers]
    assert cached[:3] == [0, 0, 0]
    assert cached[3] >= answers[3].usage.prompt_tokens - 16


def test_prompt_and_answer_fill_the_context_exactly(address: str) -> None:
    with Client(address) as client:
        length = client.models()[0].max_model_len
        prompt = "a"
        used = client.story(prompt, max_tokens=1, temperature=0).result().usage.prompt_tokens
        room = length - used
        with pytest.raises(TpserveError, match=f"ask for at most {room}") as caught:
            client.story(prompt, max_tokens=room + 1).result()
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(TpserveError, match=rf"holds {length}") as caught:
            client.story("once " * 2000).result()
        assert caught.value.code == "context_length_exceeded"


def test_an_unknown_model_is_refused_with_those_that_are_loaded(address: str) -> None:
    with (
        Client(address) as client,
        pytest.raises(ModelNotFoundError, match="loaded are: slow, story"),
    ):
        client.story("x", model="gpt-5").result()


def test_chat_works_on_a_model_without_a_template(address: str) -> None:
    with Client(address) as client:
        done = client.chat([{"role": "user", "content": "hi"}], max_tokens=4).result()
    assert len(done.token_ids) <= 4


def test_cancel_ends_a_job_and_frees_its_memory(address: str) -> None:
    with Client(address) as client:
        stream = client.story("Once upon a time", model="slow", seed=3, max_tokens=400)
        events = stream.events()
        first = next(event for event in events if isinstance(event, Token))
        stream.cancel()
        *_, last = events
        assert isinstance(last, Cancelled)
        assert last.text.startswith(first.text)
        assert len(last.token_ids) < 400
        assert wait_until(lambda: client.status().kv_blocks_used == 0, 2)


def test_the_jobs_of_a_client_that_goes_away_end(address: str) -> None:
    with Client(address) as client:
        socket = raw_socket(address)
        for i in range(4):
            socket.send(long_job(i))
        assert wait_until(lambda: client.status().running == 4, 5)
        socket.close()
        assert wait_until(lambda: client.status().running == 0, 1)
        assert client.status().kv_blocks_used == 0


def test_a_job_that_does_not_stream_ends_too_when_its_client_goes_away(address: str) -> None:
    with Client(address) as client:
        socket = raw_socket(address)
        for i in range(40):
            socket.send(long_job(i, stream=False))
        assert wait_until(lambda: client.status().running == 40, 10)
        done = client.status().totals.tokens_generated
        socket.close()
        assert wait_until(lambda: client.status().running == 0, 3)
        assert client.status().totals.tokens_generated - done < 40 * 480


def test_a_waiting_job_is_told_its_position(slow_model: Path) -> None:
    with Server("--model", f"slow={slow_model}", "--max-num-seqs", "1") as server:
        socket = raw_socket(server.wait_ready())
        for i in range(20):
            socket.send(long_job(i))
        positions: list[tuple[str, int | None]] = []
        while not positions:
            assert socket.poll(10_000)
            for event in decode_events(socket.recv()):
                if isinstance(event, Progress):
                    positions.append((event.id, event.position))
        assert positions[0][1] == 0
        socket.close()


def raw_socket(address: str) -> zmq.SyncSocket:
    """A client that is not ours."""
    socket: zmq.SyncSocket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(address)
    return socket


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xc1"],
        [b"\x91" * 100_000],
        [os.urandom(1000)],
        [b"a", b"b"],
        [msgspec.msgpack.encode({"op": "generate", "id": "x", "kind": "story"})],
    ],
)
def test_nonsense_is_answered_and_harms_nobody(address: str, frames: list[bytes]) -> None:
    socket = raw_socket(address)
    socket.send_multipart(frames)
    assert socket.poll(5000)
    (answer,) = decode_events(socket.recv())
    assert isinstance(answer, Failed)
    assert answer.code == "invalid_value"
    socket.close()
    with Client(address) as client:
        assert client.health().ready


def test_a_frame_beyond_the_limit_cuts_its_sender_only(address: str) -> None:
    socket = raw_socket(address)
    socket.send(bytes(2 << 20))
    assert not socket.poll(500)
    socket.close()
    with Client(address) as client:
        assert client.health().ready


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_is_replaced_and_all_streams_go_on(
    rank: int, server: Server, address: str
) -> None:
    wish: dict[str, Any] = {"model": "slow", "max_tokens": 100, "ignore_eos": True}
    with Client(address) as client:
        expected = [client.story("The", seed=i, **wish).result().token_ids for i in range(4)]
        epoch = client.status().epoch
        streams = [client.story("The", seed=i, **wish) for i in range(4)]
        unseeded = client.story("The", **wish)
        assert wait_until(lambda: client.status().running == 5, 5)
        server.workers()[rank].kill()
        assert [stream.result().token_ids for stream in streams] == expected
        assert len(unseeded.result().token_ids) == 100
        assert client.health().ready
        assert client.status().epoch == epoch + 1


def shared_memory(processes: list[psutil.Process]) -> set[Path]:
    """The files in /dev/shm that they have mapped."""
    paths = {mapped.path for process in processes for mapped in process.memory_maps()}
    return {Path(path) for path in paths if path.startswith("/dev/shm/")}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_and_tells_waiting_clients(
    how: signal.Signals, slow_model: Path, short_path: Path
) -> None:
    with Server(
        *("--workers", "2", "--model", f"slow={slow_model}"),
        env={"XDG_RUNTIME_DIR": str(short_path)},
    ) as server:
        with Client(server.wait_ready()) as client:
            assert list(short_path.iterdir())
            workers = server.workers()
            mapped = shared_memory([psutil.Process(server.process.pid), *workers])
            stream = client.story("The", max_tokens=480, ignore_eos=True)
            assert wait_until(lambda: client.status().running == 1, 5)
            server.process.send_signal(how)
            with pytest.raises(TpserveError, match="stopping"):
                stream.result()
        assert server.wait_exit(10) == 0
    assert not any(p.is_running() for p in workers)
    assert not list(short_path.iterdir())
    assert not any(path.exists() for path in mapped)


def test_nothing_outlives_a_killed_coordinator(story_model: Path) -> None:
    with Server("--workers", "2", "--model", f"story={story_model}") as server:
        server.wait_ready()
        descendants = psutil.Process(server.process.pid).children(recursive=True)
        server.process.kill()
        gone, alive = psutil.wait_procs(descendants, timeout=5)
        assert len(gone) == 3  # with the process that forks workers
        assert not alive


def expect_failure(words: list[str], *arguments: str) -> None:
    run = run_tpserve(["serve", "--no-http", "--listen", "tcp://127.0.0.1:*", *arguments])
    assert run.returncode != 0
    assert run.stdout == ""
    errors = [line for line in run.stderr.splitlines() if line.startswith("tpserve: error:")]
    assert len(errors) == 1, run.stderr
    assert "Traceback" not in run.stderr
    for word in words:
        assert word in errors[0]


def test_too_many_workers_is_one_clear_line() -> None:
    expect_failure(["99", "8 virtual shards"], "--workers", "99")


def test_a_busy_port_is_one_clear_line(address: str, story_model: Path) -> None:
    run = run_tpserve(
        ["serve", "--no-http", "--listen", address, "--model", f"story={story_model}"]
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == (
        f"tpserve: error: cannot listen on {address!r}: already in use"
    )


def test_a_live_ipc_path_is_not_taken_over(story_model: Path, short_path: Path) -> None:
    path = f"ipc://{short_path}/s"
    with Server("--listen", path, "--model", f"story={story_model}") as first:
        first.wait_ready()
        run = run_tpserve(
            ["serve", "--no-http", "--listen", path, "--model", f"story={story_model}"]
        )
        assert run.returncode == 2
        assert "already in use" in run.stderr
        with Client(path) as client:
            assert client.health().ready


def test_an_id_may_be_used_again_after_its_job_was_cancelled(address: str) -> None:
    with Client(address) as client:
        expected = client.story("A big dog", temperature=0, max_tokens=3).result().token_ids
    socket = raw_socket(address)
    greedy = SamplingParams(temperature=0, max_tokens=3)
    socket.send(encode_request(Generate(id="a", kind="story", prompt="old " * 100, params=greedy)))
    socket.send(encode_request(Cancel(id="c", job="a")))
    socket.send(encode_request(Generate(id="a", kind="story", prompt="A big dog", params=greedy)))
    done = None
    while done is None:
        assert socket.poll(10_000)
        done = next((e for e in decode_events(socket.recv()) if isinstance(e, Done)), None)
    assert done.token_ids == expected
    socket.close()


def test_a_missing_model_folder_is_one_clear_line() -> None:
    expect_failure(["/no/such/folder", "neither a folder"], "--model", "story=/no/such/folder")


@pytest.mark.parametrize("damage", ["cut", "header", "tensor", "shape"])
def test_a_broken_checkpoint_is_one_clear_line(
    damage: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    made = make_checkpoint("tiny-mha")
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "header":
        weights.write_bytes(content[:8] + b"?" + content[9:])
    elif damage == "tensor":
        weights.write_bytes(content.replace(b"model.norm.weight", b"model.morn.weight", 1))
    else:
        config = (tmp_path / "config.json").read_text()
        config = config.replace('"intermediate_size": 160', '"intermediate_size": 128')
        (tmp_path / "config.json").write_text(config)
    word = {"cut": "model.safetensors", "header": "model.safetensors"}.get(damage, "tensor")
    expect_failure([str(tmp_path), word], "--model", f"story={tmp_path}")
