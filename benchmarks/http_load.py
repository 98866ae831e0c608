"""Many streams at once through the gateway, and the same straight over ZeroMQ.

    python -m benchmarks.http_load [--streams 1000] [--tokens 32] [--rounds 3]

Starts a server with the bundled models and prints a table in Markdown: whether all streams ended
properly, CPU time of gateway and coordinator per token, and their resident memory and open
descriptors before and after each round, which must return to where they were.
"""

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from client.zmq_client import AsyncClient
from shared.messages import Done

PROMPT = "Once upon a time"
SETTLE_S = 3.0
"""After a round: for connections to be closed on both sides."""


@dataclass(frozen=True)
class Usage:
    """Of one process."""

    cpu_s: float
    rss_mb: float
    descriptors: int


@dataclass(frozen=True)
class Round:
    """One round of all streams."""

    way: str
    ended: int
    tokens: int
    seconds: float
    gateway: tuple[Usage, Usage]
    coordinator: tuple[Usage, Usage]


def usage(process: psutil.Process) -> Usage:
    """What a process has used until now, and what it holds."""
    times = process.cpu_times()
    memory = process.memory_info().rss / 1e6
    return Usage(times.user + times.system, memory, process.num_fds())


async def http_stream(port: int, tokens: int) -> int:
    """One stream over a connection of its own; its tokens, or 0 if it did not end properly."""
    body = (
        f'{{"model":"story","prompt":"{PROMPT}","max_tokens":{tokens},"ignore_eos":true,'
        '"stream":true,"stream_options":{"include_usage":true}}'
    )
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request.encode())
        answer = (await reader.read()).decode()
    finally:
        writer.close()
        await writer.wait_closed()
    told = re.findall(r'"completion_tokens":(\d+)', answer)
    return int(told[-1]) if told and "data: [DONE]\n\n" in answer else 0


async def zmq_stream(client: AsyncClient, tokens: int) -> int:
    """The same over ZeroMQ."""
    stream = client.story(PROMPT, model="story", max_tokens=tokens, ignore_eos=True)
    async for _ in stream:
        pass
    return stream.end.usage.completion_tokens if isinstance(stream.end, Done) else 0


async def run_round(
    way: str,
    streams: int,
    one: Callable[[], Awaitable[int]],
    gateway: psutil.Process,
    coordinator: psutil.Process,
) -> Round:
    """All streams at once."""
    before = usage(gateway), usage(coordinator)
    started = time.monotonic()
    outcomes = await asyncio.gather(*(one() for _ in range(streams)), return_exceptions=True)
    seconds = time.monotonic() - started
    for problem in {repr(outcome) for outcome in outcomes if isinstance(outcome, BaseException)}:
        print(f"{way}: {problem}", file=sys.stderr)
    counts = [outcome for outcome in outcomes if isinstance(outcome, int) and outcome]
    await asyncio.sleep(SETTLE_S)
    return Round(
        way=way,
        ended=len(counts),
        tokens=sum(counts),
        seconds=seconds,
        gateway=(before[0], usage(gateway)),
        coordinator=(before[1], usage(coordinator)),
    )


async def measure(
    address: str, port: int, server: psutil.Process, arguments: argparse.Namespace
) -> list[Round]:
    """A small round of each first, then the rounds that count."""
    gateway = next(p for p in server.children() if "gateway" in p.cmdline())
    rounds = []
    async with AsyncClient(address) as client:

        async def straight() -> int:
            return await zmq_stream(client, arguments.tokens)

        async def through() -> int:
            return await http_stream(port, arguments.tokens)

        for count in (10, *[arguments.streams] * arguments.rounds):
            for way, one in (("HTTP", through), ("ZeroMQ", straight)):
                rounds.append(await run_round(way, count, one, gateway, server))
    return rounds[2:]


def table(rounds: list[Round], streams: int) -> str:
    """The rounds in Markdown."""
    lines = [
        "| | ended | tokens/s | CPU per token: gateway | coordinator | gateway: MB | descriptors "
        "| coordinator: MB | descriptors |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for done in rounds:
        tokens = max(1, done.tokens)
        cells = [done.way, f"{done.ended} of {streams}", f"{done.tokens / done.seconds:.0f}"]
        both = (done.gateway, done.coordinator)
        cells += [f"{(after.cpu_s - before.cpu_s) / tokens * 1e6:.0f} µs" for before, after in both]
        for before, after in both:
            cells.append(f"{before.rss_mb:.0f} → {after.rss_mb:.0f}")
            cells.append(f"{before.descriptors} → {after.descriptors}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Start a server, measure, print; 1 if a stream did not end properly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    command = [str(Path(sys.executable).parent / "tpserve"), "serve", "--database", "none"]
    command += ["--listen", "tcp://127.0.0.1:*", "--http", "127.0.0.1:0"]
    command += ["--queue-limit", str(2 * arguments.streams), "--queue-tokens", "1000000"]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[1]
            port = int(server.stdout.readline().rpartition(":")[2])
            work = measure(address, port, psutil.Process(server.pid), arguments)
            rounds = asyncio.run(work)
        finally:
            server.terminate()
    print(table(rounds, arguments.streams))
    return 0 if all(done.ended == arguments.streams for done in rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
