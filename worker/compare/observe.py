"""What one precision makes of a text: a model on one rank, given the text token by token.

Residual streams and logits are kept of the first positions only, as many as fit into KEPT_BYTES;
of the others what perplexity and the most probable token take.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.config import Settings
from shared.messages import BLOCK_TOKENS, KVPrecision, Precision
from shared.model_config import ModelConfig, read_model_config
from shared.worker_messages import AllocateKV, CommSetup, LoadModel, Sampling, SequenceStep
from worker.comm.base import Floats
from worker.comm.device import Accelerator
from worker.comm.local import LocalCommunicator
from worker.compare.text import Text
from worker.native.api import Pool
from worker.runner import Runner
from worker.sampling.vocabulary import Doubles, Ints

KEPT_BYTES = 512 << 20
"""For residual streams and logits of one precision; two are held at a time."""

_STEP_TOKENS = 128  # their logits are all in memory: 64 MB for a vocabulary of 128,000
_VIRTUAL_SHARDS = Settings().virtual_shards
_GREEDY = Sampling(temperature=0, top_k=0, top_p=1, seed=0)
_NAME = "model"


@dataclass(frozen=True)
class Observed:
    """P kept positions of the text's T, in order over all windows; every token follows the true ones."""

    layers: Floats
    """[layers, P, hidden]: the residual stream that each layer hands on."""
    logits: Floats
    """[P, vocabulary]"""
    best: Ints
    """[T]: the most probable next token."""
    log_probabilities: Doubles
    """[T - windows]: of the token that does come next, but behind the end of a window."""
    continuations: Ints
    """[prompts, new tokens]: greedy, end-of-text tokens passed over."""


class LocalModel:
    """A model whose shards are all on this rank, observed."""

    def __init__(
        self,
        folder: Path,
        dtype: Precision,
        kv_dtype: KVPrecision,
        pool: Pool | None,
        text: Text,
        accelerator: Accelerator | None = None,
    ) -> None:
        """KV memory is for a window of the text at a time, or for all continuations.

        Raises ModelError, ConfigError, MemoryError.
        """
        self.config = read_model_config(folder)
        self._taken: list[Floats] = []
        shards = range(_VIRTUAL_SHARDS)
        setup = CommSetup(kind="local", rank=0, owned=[(shards.start, shards.stop)], deadline_s=1.0)
        runner = Runner(LocalCommunicator(setup), [shards], _VIRTUAL_SHARDS, pool, accelerator)
        runner.load(
            LoadModel(
                model=_NAME,
                path=str(folder),
                dtype=dtype,
                kv_dtype=kv_dtype,
                max_model_len=self.config.max_positions,
            )
        )
        model = runner.model(_NAME)
        model.ops.observe(self._taken.append)
        sequences = len(text.prompts)
        self._blocks = max(
            _blocks(max(map(len, text.windows))),
            sequences * _blocks(max(map(len, text.prompts)) + text.new_tokens),
        )
        runner.allocate(
            AllocateKV(model=_NAME, blocks=self._blocks, slots=sequences, tokens=_STEP_TOKENS)
        )
        self._ops, self._last_tokens = model.ops, model.last_tokens

    def forward(self, ids: Sequence[int], start: int) -> tuple[list[Floats], Floats, Ints]:
        """Go on with the one sequence, whose first `start` tokens came before.

        Returns the residual stream [T, hidden] after each layer, logits [T, vocabulary] that are
        valid until the next call, and the most probable next tokens [T].
        """
        step = SequenceStep(0, start, list(ids), _table(range(self._blocks)), None)
        self._taken.clear()
        result = self._ops.run([step], self._last_tokens, every_token=True)
        return [*self._taken], result.logits, result.best[:, 1].astype(np.int64)

    def continued(self, prompts: Sequence[Sequence[int]], count: int) -> Ints:
        """`count` most probable tokens after each prompt, end-of-text tokens among them."""
        each = self._blocks // len(prompts)
        tables = [_table(range(i * each, (i + 1) * each)) for i in range(len(prompts))]
        tokens = [list(prompt) for prompt in prompts]
        starts = [0] * len(prompts)
        chosen = np.empty((len(prompts), count), dtype=np.int64)
        for i in range(count):
            steps = [
                SequenceStep(slot, starts[slot], tokens[slot], tables[slot], _GREEDY)
                for slot in range(len(prompts))
            ]
            chosen[:, i] = self._ops.run(steps, self._last_tokens).best[:, 1]
            self._taken.clear()
            starts = [start + len(new) for start, new in zip(starts, tokens, strict=True)]
            tokens = [[int(token)] for token in chosen[:, i]]
        return chosen


def observe(
    folder: Path,
    dtype: Precision,
    kv_dtype: KVPrecision,
    text: Text,
    pool: Pool | None,
    accelerator: Accelerator | None = None,
) -> Observed:
    """Load the model, give it the text, and let it go. Raises as LocalModel."""
    model = LocalModel(folder, dtype, kv_dtype, pool, text, accelerator)
    config, kept = model.config, kept_positions(model.config, text.positions)
    layers = np.empty((config.num_layers, kept, config.hidden_size), dtype=np.float32)
    logits = np.empty((kept, config.vocab_size), dtype=np.float32)
    best = np.empty(text.positions, dtype=np.int64)
    log_probabilities = []
    at = 0
    for window in text.windows:
        for start in range(0, len(window), _STEP_TOKENS):
            ids = window[start : start + _STEP_TOKENS]
            following = window[start + 1 : start + 1 + len(ids)]
            streams, rows, best[at : at + len(ids)] = model.forward(ids, start)
            keep = max(0, min(len(ids), kept - at))
            for layer, stream in enumerate(streams):
                layers[layer, at : at + keep] = stream[:keep]
            logits[at : at + keep] = rows[:keep]
            log_probabilities.append(log_probability(rows[: len(following)], following))
            at += len(ids)
    continuations = model.continued(text.prompts, text.new_tokens)
    return Observed(layers, logits, best, np.concatenate(log_probabilities), continuations)


def kept_positions(config: ModelConfig, positions: int) -> int:
    """Of so many positions of a text those whose residual streams and logits are kept."""
    floats = config.num_layers * config.hidden_size + config.vocab_size
    return min(positions, max(1, KEPT_BYTES // (4 * floats)))


def log_probability(logits: Floats, tokens: Sequence[int]) -> Doubles:
    """Of tokens [T] under softmax(logits [T, vocabulary]); natural logarithm, [T]."""
    exact = logits.astype(np.float64)
    highest = exact.max(axis=1, initial=-np.inf, keepdims=True)
    sums = np.log(np.exp(exact - highest).sum(axis=1))
    chosen: Doubles = exact[np.arange(len(tokens)), list(tokens)] - highest[:, 0] - sums
    return chosen


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _table(blocks: range) -> bytes:
    return np.array(blocks, dtype="<i4").tobytes()
