"""Models of any shape on native ranks, and the logits of texts that are fed to them in any way."""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file

from shared.messages import BLOCK_TOKENS, KVPrecision, Precision
from shared.worker_messages import AllocateKV, CommSetup, LoadModel, Sampling, SequenceStep
from tests.worker.rank_threads import VIRTUAL_SHARDS, run_ranks
from worker.comm.base import Communicator, Floats
from worker.comm.open import open_communicator
from worker.native.api import Pool, native_library
from worker.ops.base import Ops
from worker.ops.native import NativeOps
from worker.runner import Runner

GREEDY = Sampling(temperature=0, top_k=0, top_p=1, seed=0)
MAX_TOKENS = 512
"""Of one text, and of one step."""
BLOCKS_PER_TEXT = 8
MODEL = "m"

Kind = Literal["local", "shm", "zmq", "gloo"]


# --- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of two layers."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 100
    window: int | None = None

    def config(self) -> dict[str, Any]:
        """config.json"""
        return {
            "model_type": "llama" if self.window is None else "mistral",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": 2,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "sliding_window": self.window,
            "torch_dtype": "float32",
        }


def write_checkpoint(folder: Path, shape: Shape, dtype: torch.dtype = torch.float32) -> Path:
    """A model with random weights, large enough that attention is far from even.

    The embedding of its last token is NaN; see Texts.
    """
    generator = torch.Generator().manual_seed(5)

    def random(outputs: int, inputs: int) -> torch.Tensor:
        spread = 1.5 * inputs**-0.5
        weight: torch.Tensor = torch.randn(outputs, inputs, generator=generator) * spread
        return weight.to(dtype)

    def norm() -> torch.Tensor:
        return (1 + 0.2 * torch.randn(shape.hidden, generator=generator)).to(dtype)

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {
        "model.embed_tokens.weight": random(shape.vocab, shape.hidden) * shape.hidden**0.5,
        "model.norm.weight": norm(),
        "lm_head.weight": random(shape.vocab, shape.hidden),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": norm(),
            prefix + "self_attn.q_proj.weight": random(q, shape.hidden),
            prefix + "self_attn.k_proj.weight": random(kv, shape.hidden),
            prefix + "self_attn.v_proj.weight": random(kv, shape.hidden),
            prefix + "self_attn.o_proj.weight": random(shape.hidden, q),
            prefix + "post_attention_layernorm.weight": norm(),
            prefix + "mlp.gate_proj.weight": random(shape.intermediate, shape.hidden),
            prefix + "mlp.up_proj.weight": random(shape.intermediate, shape.hidden),
            prefix + "mlp.down_proj.weight": random(shape.hidden, shape.intermediate),
        }
    tensors["model.embed_tokens.weight"][-1] = torch.nan
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(shape.config()))
    return folder


# --- what is computed -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """In a step, tokens [start, stop) of a text; the logits of the last one are wanted.

    Each text has a block table of its own. `tables`: of whose table the first blocks are instead.
    """

    text: int
    start: int
    stop: int
    tables: tuple[int, ...] = ()


@dataclass(frozen=True)
class Copy:
    """Before the rest of the step: block `index` of table `source` to that place in `target`."""

    source: int
    target: int
    index: int


Step = Sequence[Piece | Copy]
"""What one forward pass computes; texts stand in the batch in this order."""
Logits = dict[tuple[int, int], Floats]
"""By (text, stop)."""


class Texts:
    """Token ids; text i is the same whatever other texts there are: random, unless it is known.

    `spoiler`: a token that leaves NaN in the cache, if the model has one; it is in no text.
    """

    def __init__(
        self,
        vocab: int,
        known: Mapping[int, list[int]] | None = None,
        *,
        spoiler: int | None = None,
    ) -> None:
        self._vocab, self._known, self._spoiler = vocab, dict(known or {}), spoiler

    def __getitem__(self, text: int) -> list[int]:
        if text not in self._known:
            self._known[text] = self._random(text)
        return self._known[text]

    def spoilt(self, tokens: int) -> list[int]:
        """What is to be in the cache before a text comes there."""
        return self._random(-1)[:tokens] if self._spoiler is None else [self._spoiler] * tokens

    def _random(self, seed: int) -> list[int]:
        ids = np.random.default_rng([seed + 1, 7]).integers(0, self._vocab, MAX_TOKENS)
        if self._spoiler is not None:
            ids[ids == self._spoiler] = 0
        return [int(i) for i in ids]


class Tables:
    """Block tables in scrambled memory: neither order nor neighbourhood of blocks may matter."""

    def __init__(self, tables: int) -> None:
        self.blocks = tables * BLOCKS_PER_TEXT
        scrambled = np.random.default_rng(1).permutation(self.blocks).astype("<i4")
        self._own = scrambled.reshape(tables, BLOCKS_PER_TEXT)

    def of(self, text: int, tables: Sequence[int] = ()) -> bytes:
        table = self._own[text].copy()
        for index, other in enumerate(tables):
            table[index] = self._own[other, index]
        return bytes(table)

    def copied(self, copy: Copy) -> tuple[int, int]:
        """Source and target."""
        return int(self._own[copy.source, copy.index]), int(self._own[copy.target, copy.index])


@dataclass(frozen=True)
class Setting:
    """What may differ without changing a bit."""

    world: int = 1
    threads: int = 1
    kind: Kind = "local"


@dataclass(frozen=True)
class Model:
    """What a token's logits depend on, besides the tokens so far."""

    folder: Path
    dtype: Precision = "fp32"
    kv_dtype: KVPrecision = "bf16"

    def load(self, comm: Communicator, owned: list[range], threads: int, blocks: int) -> Ops:
        """On one rank, ready for steps."""
        return self.runner(comm, owned, threads, blocks).model(MODEL).ops

    def runner(
        self, comm: Communicator, owned: list[range], threads: int, blocks: int, slots: int = 1
    ) -> Runner:
        """What runs plans for it on one rank; it is loaded as MODEL."""
        library = native_library()
        assert library is not None
        runner = Runner(
            comm, owned, VIRTUAL_SHARDS, Pool(library, threads, crowded=True, from_bytes=0)
        )
        runner.load(
            LoadModel(
                model=MODEL,
                path=str(self.folder),
                dtype=self.dtype,
                kv_dtype=self.kv_dtype,
                max_model_len=BLOCKS_PER_TEXT * BLOCK_TOKENS,
            )
        )
        runner.allocate(AllocateKV(model=MODEL, blocks=blocks, slots=slots, tokens=MAX_TOKENS))
        assert isinstance(runner.model(MODEL).ops, NativeOps), "computed by torch"
        return runner


def logits_of(
    model: Model,
    texts: Texts,
    schedules: Sequence[Sequence[Step]],
    setting: Setting,
    folder: Path,
) -> list[Logits]:
    """The logits that each schedule gives, one schedule after the other in the same KV memory.

    folder: for the addresses of communicators.
    """
    place = new_place(folder, setting)
    tables = Tables(1 + max(itertools.chain(*(_tables_of(steps) for steps in schedules))))
    of_rank: dict[int, list[Logits]] = {}

    def job(comm: Communicator, owned: list[range]) -> None:
        with opened(setting.kind, comm, owned, place) as comm:
            ops = model.load(comm, owned, setting.threads, tables.blocks)
            of_rank[comm.rank] = [run_schedule(ops, texts, tables, steps) for steps in schedules]

    run_ranks(setting.world, job)
    ranks = [of_rank[rank] for rank in range(setting.world)]
    return [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*ranks, strict=True)
    ]


def run_schedule(ops: Ops, texts: Texts, tables: Tables, steps: Sequence[Step]) -> Logits:
    """On one rank: logits of its own tokens. What was in the cache before is lost."""
    pieces = [p for step in steps for p in step if isinstance(p, Piece)]
    length = -(-max(p.stop for p in pieces) // BLOCK_TOKENS) * BLOCK_TOKENS
    for table in _tables_of(steps) - {p.text for p in pieces if p.text}:  # not all the crowd's
        spoilt = SequenceStep(0, 0, texts.spoilt(length), tables.of(table), None)
        ops.run([spoilt], np.zeros(1, np.int64))
    found: Logits = {}
    for step in steps:
        for copy in step:
            if isinstance(copy, Copy):
                ops.copy_block(*tables.copied(copy))
        pieces = [p for p in step if isinstance(p, Piece)]
        sequences = [
            SequenceStep(
                slot=0,
                start=p.start,
                tokens=texts[p.text][p.start : p.stop],
                blocks=tables.of(p.text, p.tables),
                sampling=GREEDY,
            )
            for p in pieces
        ]
        logits = ops.run(sequences, np.zeros(1, np.int64)).logits
        for piece, row in zip(pieces, logits, strict=True):
            found[piece.text, piece.stop] = row.copy()
    return found


def _tables_of(steps: Sequence[Step]) -> set[int]:
    """Whose tables are used."""
    used: set[int] = set()
    for item in itertools.chain(*steps):
        used |= {item.text, *item.tables} if isinstance(item, Piece) else {item.source, item.target}
    return used


@contextlib.contextmanager
def opened(
    kind: Kind, comm: Communicator, owned: list[range], place: Path
) -> Iterator[Communicator]:
    """`comm` if it is of this kind, else another one in its place."""
    if kind in ("local", "shm"):
        yield comm
        return
    addresses = {
        "zmq": [f"ipc://{place}.{rank}" for rank in range(comm.world)],
        "gloo": [f"file://{place}"],
    }
    setup = CommSetup(
        kind=kind,
        rank=comm.rank,
        owned=[(own.start, own.stop) for own in owned],
        deadline_s=60,
        addresses=addresses[kind],
    )
    with contextlib.closing(open_communicator(setup, None)) as other:
        yield other
        comm.barrier()  # who closes a socket takes back what it has not sent yet


_places = itertools.count()


def new_place(folder: Path, setting: Setting) -> Path:
    """For the addresses of one group of ranks."""
    return folder / f"{setting.kind}-{next(_places)}"


def digest(logits: Floats) -> str:
    """Of every bit."""
    return hashlib.sha256(logits.tobytes()).hexdigest()


def chunks(text: int, size: int, prompt: int, stop: int) -> list[Step]:
    """`prompt` tokens in chunks of `size`, then one by one until `stop`."""
    bounds = [*range(0, prompt, size), *range(prompt, stop + 1)]
    return [[Piece(text, a, b)] for a, b in itertools.pairwise(bounds)]


def beside(step: Step, others: Iterable[Piece], row: int) -> Step:
    """`step` from row `row` of a batch on, among `others`."""
    all_others = list(others)
    return [*all_others[:row], *step, *all_others[row:]]
