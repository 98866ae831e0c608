"""What several subcommands do alike."""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import FrameType

import msgspec

from client.render import note, write
from client.requests import SamplingOptions
from client.zmq_client import Client, Stream
from shared.errors import InvalidRequestError
from shared.messages import Done, Started, Token


def connect(args: argparse.Namespace) -> Client:
    """A client for the server that the flags name."""
    return Client(args.server, timeout_s=args.timeout)


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """The sampling flags; the server checks their limits."""
    return SamplingOptions(
        max_tokens=args.max_tokens,
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        stop=args.stop,
        min_tokens=args.min_tokens,
        ignore_eos=args.ignore_eos,
    )


def decode_input(data: bytes) -> str:
    """Text from standard input. Raises InvalidRequestError when it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"standard input is not UTF-8: {error}") from None


def read_prompt() -> str:
    """All of standard input. `echo` and editors end it with a line break that nobody means."""
    if sys.stdin.isatty():
        note("type the prompt, then Ctrl-D")
    text = decode_input(sys.stdin.buffer.read())
    return text.removesuffix("\n").removesuffix("\r")


def when(seconds: float) -> str:
    """A time as people of this place write it; `seconds` since 1970."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def write_json(value: object) -> None:
    """One JSON value on a line; indented for a terminal."""
    encoded = msgspec.json.encode(value)
    if sys.stdout.isatty():
        encoded = msgspec.json.format(encoded)
    write(encoded.decode() + "\n")


def speed(done: Done) -> str:
    """How much was generated, and how fast."""
    rate = done.timings.decode_tokens_per_s
    return f"{done.usage.completion_tokens} tokens, {rate:.1f} tokens/s"


def show(stream: Stream, prompt: str = "") -> None:
    """Print `prompt` and the first answer as it comes, and end the line; Ctrl-C ends the job.

    Prints nothing before the job has started: an error message should stand alone.
    """
    last = "\n"
    with interrupt_cancels(stream):
        try:
            for event in stream.events():
                if isinstance(event, Started):
                    last = prompt
                    write(prompt)
                elif isinstance(event, Token) and event.text and not event.index:
                    last = event.text
                    write(event.text)
        finally:
            if not last.endswith("\n"):
                write("\n")


@contextmanager
def interrupt_cancels(stream: Stream) -> Iterator[None]:
    """Within it, Ctrl-C ends the job and not the program; pressed again, it does what it did."""
    previous = signal.getsignal(signal.SIGINT)

    def cancel(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        stream.cancel()

    signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
