"""What a program relies on that uses the blocking client."""

import gc
import signal
import socket
import threading
from itertools import islice

import msgspec
import pytest

from client.requests import SamplingOptions
from client.zmq_client import Client, JobCancelledError, RemoteError
from shared.errors import (
    ConfigError,
    ConnectionLostError,
    ContextLengthError,
    InvalidRequestError,
    QueueFullError,
)
from shared.messages import (
    Cancel,
    Cancelled,
    Done,
    Generate,
    GetHealth,
    Message,
    Queued,
    SamplingParams,
    Started,
    Token,
)
from tests.client.conftest import MakePeer
from tests.client.peer import MODEL, endless, refusal, tell


def test_a_story_arrives_piece_by_piece(make_peer: MakePeer) -> None:
    with Client(make_peer().address) as client:
        assert list(client.story("Once")) == [" and", " so", " it", " went"]


def test_the_result_has_text_tokens_and_counts(make_peer: MakePeer) -> None:
    with Client(make_peer().address) as client:
        result = client.story("Once").result()
    assert result.text == " and so it went"
    assert result.token_ids == [0, 1, 2, 3]
    assert (result.finish_reason, result.model) == ("stop", "demo")
    assert result.usage.completion_tokens == 4


def test_the_result_may_be_asked_for_after_and_in_the_middle_of_the_text(
    make_peer: MakePeer,
) -> None:
    with Client(make_peer().address) as client:
        stream = client.story("Once")
        pieces = iter(stream)
        first = next(pieces)
        assert stream.result().text == stream.text == " and so it went"
        assert (first, list(pieces)) == (" and", [])
        assert stream.result().text == " and so it went"


def test_events_come_in_order_and_end_with_done(make_peer: MakePeer) -> None:
    with Client(make_peer().address) as client:
        stream = client.story("Once")
        events = list(stream.events())
    assert [type(event) for event in events] == [Queued, Started, *[Token] * 4, Done]
    assert {event.id for event in events} == {stream.id}


def test_without_streaming_the_text_comes_in_one_piece(make_peer: MakePeer) -> None:
    with Client(make_peer().address) as client:
        stream = client.story("Once", stream=False)
        assert list(stream) == [" and so it went"]
        assert stream.text == " and so it went"


def test_a_request_carries_every_option(make_peer: MakePeer) -> None:
    peer = make_peer()
    options = SamplingOptions(max_tokens=7, temperature=0.5, top_k=3, top_p=0.9, seed=11)
    with Client(peer.address) as client:
        client.story("Once", model="demo", **options).result()
    (request,) = peer.wait_for(Generate)
    assert (request.kind, request.prompt, request.model) == ("story", "Once", "demo")
    assert request.params == SamplingParams(**options)


def test_there_is_an_option_for_every_sampling_parameter() -> None:
    fields = {field.name for field in msgspec.structs.fields(SamplingParams)}
    assert SamplingOptions.__optional_keys__ == fields


def test_chat_takes_messages_and_plain_mappings(make_peer: MakePeer) -> None:
    with Client(make_peer().address) as client:
        stream = client.chat([Message("system", "Be brief."), {"role": "user", "content": "Hi"}])
        assert stream.result().text == "system: Be brief. | user: Hi"


def test_a_wrong_role_is_refused_before_it_is_sent(make_peer: MakePeer) -> None:
    with (
        Client(make_peer().address) as client,
        pytest.raises(InvalidRequestError, match="robot"),
    ):
        client.chat([{"role": "robot", "content": "Hi"}])


def test_two_streams_read_in_turns_do_not_mix(make_peer: MakePeer) -> None:
    with Client(make_peer().address) as client:
        first = client.story("a")
        second = client.chat([Message("user", "1 2 3 4")])
        pairs = list(zip(first, second, strict=False))
    assert pairs == [(" and", "user:"), (" so", " 1"), (" it", " 2"), (" went", " 3")]


def test_a_stream_read_late_has_lost_nothing(make_peer: MakePeer) -> None:
    with Client(make_peer().address) as client:
        first, second = client.story("a"), client.story("b")
        assert second.result().text == " and so it went"
        assert list(first) == [" and", " so", " it", " went"]


def test_breaking_out_of_the_loop_cancels_the_job(make_peer: MakePeer) -> None:
    peer = make_peer(endless)
    with Client(peer.address) as client:
        stream = client.story("Once")
        for _ in stream:
            break
        assert peer.wait_for(Cancel)[0].job == stream.id


def test_an_exception_in_the_loop_cancels_the_job(make_peer: MakePeer) -> None:
    peer = make_peer(endless)
    with Client(peer.address) as client:

        def read() -> None:
            for piece in client.story("Once"):
                raise ValueError(piece)

        with pytest.raises(ValueError, match="0"):
            read()
        peer.wait_for(Cancel)


def test_a_stream_that_nobody_holds_cancels_its_job(make_peer: MakePeer) -> None:
    peer = make_peer(endless)
    with Client(peer.address) as client:
        job = client.story("Once").id
        gc.collect()
        assert peer.wait_for(Cancel)[0].job == job


def test_closing_the_client_cancels_what_runs(make_peer: MakePeer) -> None:
    peer = make_peer(endless)
    with Client(peer.address) as client:
        streams = [client.story("a"), client.story("b", stream=False)]
        peer.wait_for(Generate, 2)
        client.health()
    assert {request.job for request in peer.wait_for(Cancel, 2)} == {s.id for s in streams}
    with pytest.raises(ConnectionLostError, match="closed"):
        streams[0].result()
    with pytest.raises(ConnectionLostError, match="closed"):
        client.health()


def test_a_finished_job_is_not_cancelled(make_peer: MakePeer) -> None:
    peer = make_peer()
    with Client(peer.address) as client:
        stream = client.story("Once")
        stream.result()
        stream.cancel()
        stream.close()
        client.health()
    assert not [request for request in peer.requests if isinstance(request, Cancel)]


def test_a_cancelled_stream_ends_and_keeps_the_partial_text(make_peer: MakePeer) -> None:
    with Client(make_peer(endless).address) as client:
        stream = client.story("Once")
        pieces = []
        for piece in stream:
            pieces.append(piece)
            if len(pieces) == 3:
                stream.cancel()
        assert isinstance(stream.end, Cancelled)
        assert stream.text == "".join(pieces)
        assert stream.text.startswith(" 0 1 2")
        with pytest.raises(JobCancelledError) as caught:
            stream.result()
        assert caught.value.text == stream.text
        assert caught.value.token_ids == list(range(len(pieces)))


def test_a_job_without_streaming_tells_its_partial_text_when_cancelled(
    make_peer: MakePeer,
) -> None:
    peer = make_peer(endless)
    with Client(peer.address) as client:
        watched, blind = client.story("a"), client.story("b", stream=False)
        list(islice(watched, 5))
        blind.cancel()
        assert "".join(blind).startswith(" 0 1")


def test_a_stream_can_be_cancelled_from_a_signal_handler(make_peer: MakePeer) -> None:
    with Client(make_peer(endless).address) as client:
        stream = client.story("Once")
        previous = signal.signal(signal.SIGUSR1, lambda *_: stream.cancel())
        try:
            main = threading.main_thread().ident
            assert main is not None
            timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGUSR1))
            timer.start()
            text = "".join(stream)
            timer.join()
        finally:
            signal.signal(signal.SIGUSR1, previous)
    assert text.startswith(" 0 1")


def test_a_refused_job_raises_the_error_of_its_code(make_peer: MakePeer) -> None:
    for code, error_class in [
        ("queue_full", QueueFullError),
        ("context_length_exceeded", ContextLengthError),
        ("invalid_value", InvalidRequestError),
    ]:
        with Client(make_peer(refusal(code, "because")).address) as client:
            stream = client.story("Once")
            with pytest.raises(error_class, match="because") as caught:
                list(stream)
            assert type(caught.value) is error_class
            with pytest.raises(error_class, match="because"):
                stream.result()


def test_an_unknown_error_code_is_kept(make_peer: MakePeer) -> None:
    with (
        Client(make_peer(refusal("out_of_tea", "pot is empty")).address) as client,
        pytest.raises(RemoteError, match="pot is empty") as caught,
    ):
        client.story("Once").result()
    assert caught.value.code == "out_of_tea"


def test_the_server_s_word_on_a_bad_value_arrives(make_peer: MakePeer) -> None:
    with (
        Client(make_peer().address) as client,
        pytest.raises(InvalidRequestError, match="top_p"),
    ):
        client.story("Once", top_p=7).result()


def test_what_no_frame_can_carry_is_refused_and_the_client_stays_usable(
    make_peer: MakePeer,
) -> None:
    with Client(make_peer().address) as client:
        with pytest.raises(InvalidRequestError, match="1048576"):
            client.story("x" * (1 << 20))
        with pytest.raises(InvalidRequestError, match="Unicode"):
            client.story("\udcff")
        with pytest.raises(InvalidRequestError, match="out of range"):
            client.story("x", seed=1 << 70)
        assert client.story("Once").result().text == " and so it went"


def test_models_status_and_health_are_answered(make_peer: MakePeer) -> None:
    with Client(make_peer().address) as client:
        assert client.models() == [MODEL]
        assert [worker.rank for worker in client.status().workers] == [0, 1]
        assert client.health().ready
    with Client(make_peer(ready=False).address) as client:
        assert client.health().reason == "a worker is being replaced"


def test_a_request_may_be_made_while_a_stream_is_open(make_peer: MakePeer) -> None:
    with Client(make_peer(endless).address) as client, client.story("Once") as stream:
        pieces = iter(stream)
        assert next(pieces) == " 0"
        assert client.health().ready
        assert next(pieces) == " 1"


def test_an_address_without_a_server_says_how_to_start_one() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        with Client(address, timeout_s=0.3) as client:
            for ask in (client.health, client.story("Once").result):
                with pytest.raises(ConnectionLostError) as caught:
                    ask()
                assert address in caught.value.message
                assert "is the server running? ./launch.sh" in caught.value.message


def test_something_else_listening_there_is_not_taken_for_a_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with (
            Client(address, timeout_s=0.3) as client,
            pytest.raises(ConnectionLostError, match="is the server running"),
        ):
            client.health()


def test_a_malformed_address_is_an_error_of_configuration() -> None:
    with Client("tcp://127.0.0.1") as client, pytest.raises(ConfigError, match="127"):
        client.health()


def test_a_server_that_goes_away_in_mid_stream_is_noticed(make_peer: MakePeer) -> None:
    peer = make_peer(endless)
    with Client(peer.address) as client:
        reader, waiting = client.story("a"), client.story("b")
        pieces = iter(reader)
        next(pieces)
        peer.close()
        with pytest.raises(ConnectionLostError, match="closed the connection") as caught:
            list(pieces)
        assert peer.address in caught.value.message
        with pytest.raises(ConnectionLostError):
            waiting.result()
        with pytest.raises(ConnectionLostError):
            reader.result()


def test_what_a_server_said_before_it_went_away_is_still_read(make_peer: MakePeer) -> None:
    peer = make_peer()
    with Client(peer.address) as client, Client(peer.address) as other:
        early = client.story("a")
        peer.wait_for(Generate)
        other.story("b").result()
        peer.close()
        assert early.result().text == " and so it went"


def test_a_server_that_hangs_in_mid_stream_is_noticed(make_peer: MakePeer) -> None:
    peer = make_peer(endless)
    with Client(peer.address, silence_s=1.0) as client:
        pieces = iter(client.story("Once"))
        next(pieces)
        peer.mute()
        with pytest.raises(ConnectionLostError, match="silent for 1 s"):
            list(pieces)


def test_a_slow_job_is_not_an_error_as_long_as_the_server_answers(make_peer: MakePeer) -> None:
    peer = make_peer(lambda request: tell(request, " word" * 700))
    with Client(peer.address, silence_s=2.0) as client:
        assert client.story("Once", stream=False).result().text == " word" * 700
    # One question on connecting, more because nothing else came for seconds.
    peer.wait_for(GetHealth, 3)


def test_a_client_works_again_after_a_restart_of_the_server(make_peer: MakePeer) -> None:
    peer = make_peer()
    with Client(peer.address) as client:
        assert client.health().ready
        peer.close()
        make_peer(address=peer.address)
        assert client.story("Once").result().text == " and so it went"
