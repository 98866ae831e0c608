"""The mean of a text's last hidden states: what transformers has, and one arithmetic to the last bit."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.messages import KVPrecision, Precision
from shared.worker_messages import SequenceStep, StepPlan
from tests.worker.forward import GREEDY, TOLERANCE, loaded, relative
from tests.worker.native_ranks import (
    MODEL,
    Model,
    Setting,
    Shape,
    Tables,
    Texts,
    new_place,
    opened,
    write_checkpoint,
)
from tests.worker.rank_threads import run_ranks
from worker.comm.base import Communicator, Floats
from worker.native.api import native_library
from worker.runner import Runner

LENGTH = 75
"""Of text 0, whose mean is wanted."""
SLOTS = 12
VOCABULARY = 100

Way = Sequence[Sequence[SequenceStep]]
"""The sequences of one step after the other."""

needs_native = pytest.mark.skipif(
    native_library() is None, reason="there is no native library: no C++ compiler to build it"
)


class Writer:
    """Writes steps of texts, each of which has a slot and a block table of its own."""

    def __init__(self, vocabulary: int) -> None:
        self._texts = Texts(vocabulary, spoiler=vocabulary - 1)
        self._tables = Tables(SLOTS)
        self.blocks = self._tables.blocks

    def part(self, text: int, start: int, stop: int, *, of: int = 0) -> SequenceStep:
        """Tokens [start, stop) of a text; `of` its length if its mean is wanted."""
        tokens = self._texts[text][start:stop]
        return SequenceStep(text, start, tokens, self._tables.of(text), None, pooled=of)

    def written(self, text: int, start: int, stop: int) -> SequenceStep:
        """The same, after which a token is sampled."""
        tokens = self._texts[text][start:stop]
        return SequenceStep(text, start, tokens, self._tables.of(text), GREEDY)

    def chunks(self, sizes: Sequence[int]) -> Way:
        """Text 0 alone, in chunks; the last one may be short."""
        bounds = [0, *np.minimum(np.cumsum(sizes), LENGTH).tolist()]
        return [[self.part(0, a, b, of=LENGTH)] for a, b in itertools.pairwise(bounds)]


def ways(write: Writer) -> list[Way]:
    """Of coming to the mean of text 0."""
    among = [
        [
            *(write.written(text, 0, 3 * text) for text in range(1, 5)),
            write.part(0, 0, 40, of=LENGTH),
            write.part(5, 0, 20, of=31),
        ],
        [
            write.part(5, 20, 31, of=31),
            write.part(0, 40, 41, of=LENGTH),
            *(write.written(text, 3 * text, 3 * text + 1) for text in range(1, 5)),
        ],
        [
            write.part(0, 41, LENGTH, of=LENGTH),
            *(write.part(text, 0, 7, of=7) for text in range(6, 12)),
        ],
    ]
    interrupted = [
        [write.part(0, 0, 33, of=LENGTH)],
        [write.written(1, 0, 5)],
        [write.part(0, 0, 64, of=LENGTH), write.written(1, 5, 6)],
        [write.part(0, 64, LENGTH, of=LENGTH)],
    ]
    return [
        write.chunks([LENGTH]),
        write.chunks([1] * LENGTH),
        write.chunks([7] * 11),
        write.chunks([64, 64]),
        among,
        interrupted,
    ]


def means_of(runner: Runner, way: Way) -> list[Floats]:
    """The means that come, in their order."""
    found: list[Floats] = []
    for step, sequences in enumerate(way):
        plan = StepPlan(epoch=1, step=step, model=MODEL, sequences=list(sequences))
        outcome = runner.step(plan)
        assert len(outcome.sampled.tokens) == sum(s.sampling is not None for s in sequences)
        found += outcome.means
    return found


def all_means(model: Model, setting: Setting, folder: Path, write: Writer) -> list[list[Floats]]:
    """The means of each way, on every rank."""
    place, of_rank = new_place(folder, setting), dict[int, list[list[Floats]]]()

    def job(comm: Communicator, owned: list[range]) -> None:
        with opened(setting.kind, comm, owned, place) as comm:
            runner = model.runner(comm, owned, setting.threads, write.blocks, slots=SLOTS)
            of_rank[comm.rank] = [means_of(runner, way) for way in ways(write)]

    run_ranks(setting.world, job)
    return [found for rank in range(setting.world) for found in of_rank[rank]]


@needs_native
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [("fp32", "fp32"), ("bf16", "bf16"), ("int8", "int8"), ("int4", "bf16")]
)
def test_a_mean_has_the_same_bits_in_every_way(
    dtype: Precision, kv_dtype: KVPrecision, tmp_path: Path
) -> None:
    shape = Shape(96, 200, 6, 2, 16, vocab=VOCABULARY)
    model = Model(write_checkpoint(tmp_path / "model", shape), dtype, kv_dtype)
    write = Writer(VOCABULARY)
    seen = set[bytes]()
    for setting in (
        *(Setting(), Setting(threads=2), Setting(2, 1, "shm"), Setting(3, 2, "shm")),
        *(Setting(3, 1, "zmq"), Setting(2, 2, "gloo")),
    ):
        for means in all_means(model, setting, tmp_path, write):
            # Beside the others the mean of text 0 comes with its last chunk, behind that of text 5.
            mean = means[1] if len(means) > 1 else means[0]
            assert mean.shape == (96,)
            assert np.isfinite(mean).all()
            seen.add(mean.tobytes())
            assert len(seen) == 1, setting


@needs_native
def test_every_text_of_a_step_has_its_own_mean(tmp_path: Path) -> None:
    model = Model(write_checkpoint(tmp_path / "model", Shape(64, 96, 4, 2, 16, vocab=VOCABULARY)))
    write = Writer(VOCABULARY)

    def job(comm: Communicator, owned: list[range]) -> None:
        runner = model.runner(comm, owned, 1, write.blocks, slots=SLOTS)
        lengths = {text: 1 + 11 * text for text in range(8)}
        together = means_of(
            runner, [[write.part(text, 0, count, of=count) for text, count in lengths.items()]]
        )
        alone = [
            means_of(runner, [[write.part(text, 0, count, of=count)]])[0]
            for text, count in lengths.items()
        ]
        assert len({mean.tobytes() for mean in alone}) == len(alone)
        np.testing.assert_array_equal(together, alone)

    run_ranks(1, job)


@pytest.mark.parametrize("preset", ["story", "tiny-mha"])
def test_the_mean_is_that_of_transformers_hidden_states(
    preset: str, kernels: str, story_model: Path, make_checkpoint: Callable[..., Path]
) -> None:
    folder = story_model if preset == "story" else make_checkpoint(preset)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(3, 2000, (100,), generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        states = reference(ids[None], output_hidden_states=True).hidden_states
    theirs = states[-1][0].mean(0).numpy()  # the last ones are those behind the final norm
    for world, sizes in itertools.product((1, 3), ([100], [60, 39, 1])):
        ours = mean_of(folder, world, ids.tolist(), sizes, kernels)
        assert relative(ours, theirs) < TOLERANCE, (world, sizes)


def mean_of(folder: Path, world: int, ids: list[int], sizes: list[int], kernels: str) -> Floats:
    """Of one text in chunks of these sizes."""
    of_rank: dict[int, Floats] = {}

    def job(comm: Communicator, owned: list[range]) -> None:
        model = loaded(folder, comm, owned, kernels)
        table = np.random.default_rng(0).permutation(40).astype("<i4").tobytes()
        sums = {0: np.zeros(model.hidden_size)}
        start = 0
        for size in sizes:
            step = SequenceStep(0, start, ids[start : start + size], table, None, pooled=len(ids))
            model.ops.run([step], model.last_tokens, sums=sums)
            start += size
        of_rank[comm.rank] = (sums[0] / len(ids)).astype(np.float32)

    run_ranks(world, job)
    return of_rank[world - 1]
