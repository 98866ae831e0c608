"""Carries out a run: every configuration once in each round, kept after each turn."""

import datetime
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import machine as here
from benchmarks.scaling.grid import Configuration, Request, Test, configurations, wanted_tests
from benchmarks.scaling.measure import MEMORY_SHARE, Fleet, needed_bytes
from benchmarks.scaling.plots import plot
from benchmarks.scaling.record import Record
from benchmarks.scaling.summary import VIRTUAL_SHARDS, summarise
from benchmarks.scaling.tables import as_csv, markdown
from coordinator.machine import machine
from coordinator.machine import measure as measure_machine
from coordinator.measured import Measured, remember
from coordinator.step_model import precisions_of
from shared.errors import ConfigError
from shared.memory import free_bytes
from shared.model_config import ModelConfig, read_model_config
from shared.sharding import ModelShards, aligned_subtrees, assign_shards

WARM_UP = 0
"""The round in which everything gets warm; it does not count."""


def begin(request: Request, *, measure: bool) -> Record:
    """Describe everything. Raises TpserveError.

    measure: what the machine can do, now; else what was measured some time ago does, if it was.
    """
    folder = Path(request.model)
    config = read_model_config(folder)
    for count in request.workers:
        if count > VIRTUAL_SHARDS:
            raise ConfigError(
                f"--workers {count}: a model is cut into {VIRTUAL_SHARDS} virtual shards, and each worker"
                f" needs one: use at most {VIRTUAL_SHARDS}"
            )
    _, left_out = wanted_tests(request, config.max_positions)
    facts = {fact.name: fact.value for fact in here.describe_machine()}
    say = Console(stderr=True).print
    measured = machine(again=measure, say=say)
    table = config.hidden_size * config.vocab_size
    facts |= {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "tpserve": f"{version('tpserve')}, commit {here.commit() or 'unknown'}",
        "kernels": measured.kernels,
        "limits of the machine": (
            "measured before each round and after the last" if measure else "measured some time ago"
        ),
        "Python": f"{sys.version.split()[0]}, torch {version('torch')}, numpy {version('numpy')}",
        "model": f"{folder.name}, {config.parameters:,} parameters",
        "seed": str(request.seed),
    }
    return Record(
        facts=facts,
        commit=here.commit(),
        request=request,
        machines=[measured],
        measures=measure,
        config=config,
        weights=config.parameters - (0 if config.tie_word_embeddings else table),
        exchanged_bytes={count: exchanged_bytes(config, count) for count in request.workers},
        left_out=[
            f"Left out: {test.name}, because the model's context is {config.max_positions} tokens."
            for test in left_out
        ],
    )


def exchanged_bytes(config: ModelConfig, workers: int) -> int:
    """What all ranks together post for one token in the two all-reduces of each layer.

    A rank posts the sums of the aligned subtrees that it owns, each a row of float32.
    """
    if workers == 1:
        return 0
    owned = assign_shards(workers, ModelShards(config, VIRTUAL_SHARDS).virtual_shards)
    roots = sum(len(aligned_subtrees(shards)) for shards in owned)
    return 2 * config.num_layers * roots * 4 * config.hidden_size


def check_can_go_on(record: Record) -> None:
    """Raises ConfigError where what is still to be measured could not be compared with the rest."""
    if record.commit != here.commit():
        raise ConfigError(
            f"the run was begun with commit {record.commit or 'unknown'}, this is"
            f" {here.commit() or 'unknown'}: begin a new one"
        )
    if record.facts["CPU"] != here.cpu_name():
        raise ConfigError(
            f"the run was begun on another machine ({record.facts['CPU']}): begin a new one"
        )


def carry_on(record: Record, folder: Path) -> None:
    """All turns that are missing. Raises TpserveError; what was measured is kept."""
    request = record.request
    model = Path(request.model)
    wanted, _ = wanted_tests(request, record.config.max_positions)
    servers = configurations(request, record.machine.cores)
    for configuration in servers:
        _check_fits(model, configuration, wanted)
    turns = missing_turns(record, servers)
    with Fleet(model, wanted, request.seed) as fleet, _progress() as progress:
        task = progress.add_task("", total=len(turns) * len(wanted))

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=what)

        for at, (round_, configuration) in enumerate(turns):
            progress.update(task, description=f"{configuration.name}: ready?")
            _turn(record, fleet, round_, configuration, wanted, advance)
            ends_round = at + 1 == len(turns) or turns[at + 1][0] != round_
            if record.measures and ends_round and round_ != WARM_UP:
                progress.update(task, description="what can the machine do now?")
                record.machines.append(measure_machine(precisions_of(request.dtypes)))
            record.save(folder)


def missing_turns(record: Record, servers: list[Configuration]) -> list[tuple[int, Configuration]]:
    """What is left to do: round by round, each beginning with another server.

    A run that goes on begins with new servers, which get warm first.
    """
    turns = [
        (round_, servers[(round_ + i) % len(servers)])
        for round_ in range(1, record.request.rounds + 1)
        for i in range(len(servers))
    ]
    left = [turn for turn in turns if not record.has(*turn)]
    needed = dict.fromkeys(configuration for _, configuration in left)
    return [*((WARM_UP, configuration) for configuration in needed), *left]


def _turn(
    record: Record,
    fleet: Fleet,
    round_: int,
    configuration: Configuration,
    wanted: list[Test],
    advance: Callable[[str], None],
) -> None:
    """All tests of one server; kept together, so that a turn is there or not."""
    running = fleet.get(configuration)
    samples = []
    for test in wanted:
        samples.append(running.sample(test, round_))
        advance(f"round {round_}, {configuration.name}, {test.name}")
    if round_ != WARM_UP:
        record.samples += samples


def _check_fits(model: Path, configuration: Configuration, wanted: list[Test]) -> None:
    needed, free = needed_bytes(model, configuration, wanted), free_bytes()
    if needed > free * MEMORY_SHARE:
        raise ConfigError(
            f"{configuration.name}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB is free:"
            " leave it out with --workers or --dtype"
        )


def write_reports(record: Record, folder: Path) -> str:
    """Markdown (which is returned), CSV and pictures; and what `tpserve plan` shows. Raises ConfigError."""
    text = markdown(record)
    try:
        (folder / "bench.md").write_text(text, encoding="utf-8")
        (folder / "bench.csv").write_text(as_csv(record), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    plot(record, folder)
    remember(record.config, record.facts["date"], results(record))
    return text


def results(record: Record) -> list[Measured]:
    """The medians."""
    return [
        Measured(
            workers=row.configuration.workers,
            threads=row.configuration.threads,
            dtype=row.configuration.dtype,
            comm="local" if row.configuration.workers == 1 else row.configuration.comm,
            prefill=row.test.kind == "prefill",
            streams=row.test.streams,
            prompt=row.test.prompt,
            tokens_per_s=row.tokens_per_s.median,
        )
        for row in summarise(record)
    ]


def with_rounds(record: Record, rounds: int) -> Record:
    """The same run with more rounds to do."""
    return msgspec.structs.replace(
        record, request=msgspec.structs.replace(record.request, rounds=rounds)
    )


def _progress() -> Progress:
    """On standard error, where the report does not go."""
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
    )
