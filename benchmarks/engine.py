"""What users feel of the scheduler, measured through a running server of its own.

    python benchmarks/engine.py --model DIR [-- flags of tpserve serve]

Prints a Markdown table: the first token of a second chat turn against the first turn's; the longest
gap between two tokens of running streams while a long prompt comes in; tokens per second of one
stream and of 32. The model needs a context of 2,048 tokens for the long prompt.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.zmq_client import Client
from shared.messages import Done, Message, Token

LONG_PROMPT_WORDS = 1500
TURN_WORDS = 480


@contextmanager
def server(model: Path, flags: list[str]) -> Iterator[str]:
    """The address of a server that runs while the context does."""
    command = [sys.executable, "-P", "-m", "coordinator", "--no-http", "--database", "none"]
    command += ["--listen", "tcp://127.0.0.1:*"]
    command += ["--model", f"story={model}", "--log-level", "warning", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("ready "):
            sys.exit("the server did not start")
        yield line.split()[1]
    finally:
        process.terminate()
        process.wait()


def second_turn(client: Client, repetitions: int) -> list[tuple[str, str]]:
    """Time to first token of two turns, the second one with all of the first in its prompt."""
    ratios, cached = [], ""
    for i in range(repetitions):
        turns = [Message("user", f"{i} " + "word " * TURN_WORDS)]
        first = client.chat(turns, temperature=0, max_tokens=16, ignore_eos=True).result()
        turns += [Message("assistant", first.text), Message("user", "and then?")]
        second = client.chat(turns, temperature=0, max_tokens=16, ignore_eos=True).result()
        ratios.append(second.timings.ttft_s / first.timings.ttft_s)
        cached = f"{second.usage.cached_tokens} of {second.usage.prompt_tokens}"
    return [
        ("prompt tokens of the second turn found in the cache", cached),
        ("time to first token, second turn / first turn", f"{statistics.median(ratios):.3f}"),
    ]


def longest_gap(client: Client, address: str) -> list[tuple[str, str]]:
    """Gaps between tokens of four streams, before and while a long prompt is read."""
    arrivals: list[float] = []
    stop = threading.Event()

    def listen() -> None:
        with Client(address) as own:
            streams = [
                own.story("The", temperature=0, max_tokens=1500, ignore_eos=True) for _ in range(4)
            ]
            for event in streams[0].events():
                if isinstance(event, Token):
                    arrivals.append(time.perf_counter())
                if stop.is_set():
                    return

    listener = threading.Thread(target=listen)
    listener.start()
    while len(arrivals) < 20:
        time.sleep(0.01)
    alone = len(arrivals)
    done = client.story("word " * LONG_PROMPT_WORDS, temperature=0, max_tokens=1).result()
    during = len(arrivals)
    stop.set()
    listener.join()
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    usual = statistics.median(gaps[:alone])
    worst = max(gaps[alone - 1 : during])
    mixed = statistics.median(gaps[alone - 1 : during])
    return [
        ("long prompt, tokens", str(done.usage.prompt_tokens)),
        ("gap between tokens without it, median", f"{usual * 1e3:.1f} ms"),
        ("gap while it is read, median (one mixed step)", f"{mixed * 1e3:.1f} ms"),
        ("gap while it is read, longest", f"{worst * 1e3:.1f} ms"),
        ("longest gap / mixed step", f"{worst / mixed:.2f}"),
        ("its time to first token", f"{done.timings.ttft_s:.2f} s"),
    ]


def throughput(client: Client, repetitions: int) -> list[tuple[str, str]]:
    """Tokens per second of one stream and of 32 together."""
    rows = []
    for streams in (1, 32):
        rates = []
        for _ in range(repetitions):
            began = time.perf_counter()
            running = [
                client.story("The", temperature=0, max_tokens=128, ignore_eos=True)
                for _ in range(streams)
            ]
            done: list[Done] = [stream.result() for stream in running]
            tokens = sum(answer.usage.completion_tokens for answer in done)
            rates.append(tokens / (time.perf_counter() - began))
        rows.append((f"tokens/s, {streams} stream(s)", f"{statistics.median(rates):.0f}"))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="flags of tpserve serve, after --")
    args = parser.parse_args()
    with server(args.model, args.flags) as address, Client(address, silence_s=300) as client:
        context = client.models()[0].max_model_len
        rows = [("model", args.model.name), ("flags", " ".join(args.flags) or "none")]
        rows += throughput(client, args.repetitions)
        if context >= 2 * TURN_WORDS:
            rows += second_turn(client, args.repetitions)
        if context >= LONG_PROMPT_WORDS + 32:
            rows += longest_gap(client, address)
    print("| what | measured |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
