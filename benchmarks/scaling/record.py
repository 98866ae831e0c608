"""Everything that a run of `tpserve bench` has measured, in a file from which it can go on."""

from pathlib import Path

import msgspec
from msgspec import Struct

from benchmarks.scaling.grid import Configuration, Request, Test
from coordinator.machine import Machine, mean_of
from shared.errors import ConfigError
from shared.model_config import ModelConfig

FORMAT = 2
FILE_NAME = "bench.json"


class Sample(Struct, frozen=True, kw_only=True):
    """One measurement of one configuration: some requests, one after the other or at once."""

    round: int
    configuration: Configuration
    test: Test
    tokens: int
    seconds: float
    """That `tokens` took, seen by the client."""
    ttft_s: list[float] = []
    """Prefill: the time to first token of each request."""
    gaps_s: list[float] = []
    """Decode: between the tokens of a stream."""
    busy_s: float
    """From the first request to the end of the last."""
    steps: int
    """Forward passes in that time."""
    compute_s: list[float]
    """By worker, in that time."""
    comm_s: list[float]
    """In collectives, waiting for slower workers included; by worker."""
    coordinator_s: float
    """In which the coordinator was not waiting."""
    memory_bytes: list[int]
    """Resident, shared with nobody; by worker."""
    weight_bytes: list[int]
    kv_token_bytes: int
    """Of a token's keys and values, over all workers."""
    load: float
    """Of the machine in the last minute."""
    other_cores: float
    """Cores that other programs kept busy meanwhile."""

    @property
    def tokens_per_s(self) -> float:
        """Read, or written by all streams together."""
        return self.tokens / self.seconds


class Record(Struct, kw_only=True):
    """A run, finished or not."""

    format: int = FORMAT
    facts: dict[str, str]
    """About machine, model and program; by name."""
    commit: str
    request: Request
    machines: list[Machine]
    """What the machine can do: as measured some time ago, or in the run, before each round and at its end."""
    measures: bool
    """Whether it is measured in the run."""
    config: ModelConfig
    weights: int
    """That every token is multiplied with: parameters without the table of embeddings."""
    exchanged_bytes: dict[int, int]
    """By workers: what all ranks together post for one token."""
    left_out: list[str] = []
    """What was asked for and cannot be, and why."""
    samples: list[Sample] = []

    @property
    def machine(self) -> Machine:
        """The mean: where memory is shared with strangers its speed drifts, within a run as well."""
        return mean_of(self.machines)

    def has(self, round_: int, configuration: Configuration) -> bool:
        """Whether a configuration had its turn."""
        return any(s.round == round_ and s.configuration == configuration for s in self.samples)

    def save(self, folder: Path) -> None:
        """Write it, all or nothing. Raises ConfigError."""
        target = folder / FILE_NAME
        unfinished = target.with_suffix(".unfinished")
        try:
            unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
            unfinished.replace(target)
        except OSError as error:
            raise ConfigError(f"{target} cannot be written: {error.strerror}") from None


def load(folder: Path) -> Record:
    """What `save` wrote. Raises ConfigError."""
    path = folder / FILE_NAME
    try:
        record = msgspec.json.decode(path.read_bytes(), type=Record)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not a result of tpserve bench: {error}") from None
    if record.format != FORMAT:
        raise ConfigError(f"{path} has format {record.format}; this tpserve reads {FORMAT}")
    return record
