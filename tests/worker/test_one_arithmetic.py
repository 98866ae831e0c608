"""One arithmetic: a token's logits are a function of the tokens so far, to the last bit.

Nothing else may matter: not what stands beside it in the batch, not how its text was cut into chunks,
not whether its keys and values were computed again or found in the cache, not how many workers and
threads there are or how they talk. Each case feeds the same texts in all of these ways, in different
settings; whatever logits two ways have in common must be equal.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.messages import KVPrecision, Precision
from shared.model_config import read_model_config
from tests.worker.native_ranks import (
    BLOCKS_PER_TEXT,
    Copy,
    Model,
    Piece,
    Setting,
    Shape,
    Step,
    Texts,
    beside,
    chunks,
    digest,
    logits_of,
    write_checkpoint,
)
from worker.native.api import native_library
from worker.ops.native import why_not_native

pytestmark = pytest.mark.skipif(
    native_library() is None, reason="there is no native library: no C++ compiler to build it"
)

ALONE = Setting()
TWO_THREADS = Setting(threads=2)
TWO = Setting(2, 1, "shm")
TWO_WITH_TWO_THREADS = Setting(2, 2, "shm")
THREE = Setting(3, 1, "shm")
FIVE = Setting(5, 1, "shm")
EIGHT = Setting(8, 1, "shm")
TWO_BY_ZMQ = Setting(2, 1, "zmq")
THREE_BY_ZMQ = Setting(3, 2, "zmq")
TWO_BY_GLOO = Setting(2, 1, "gloo")

STOP = 73
PROMPT = 70
OTHER = 33  # a table that no text has


def batch(
    others: int, row: int, prompt: int = PROMPT, stop: int = STOP, longest: int = 37
) -> list[Step]:
    """Text 0 among `others`, whose prompts are prefilled with it and have other lengths."""
    texts = range(1, others + 1)
    lengths = {text: 1 + text * 5 % longest for text in texts}
    steps = [beside([Piece(0, 0, prompt)], [Piece(text, 0, lengths[text]) for text in texts], row)]
    for n in range(stop - prompt):
        decoding = [Piece(text, lengths[text] + n, lengths[text] + n + 1) for text in texts]
        # The row changes from step to step, as it does when others come and go.
        rows = (row + n) % (others + 1)
        steps.append(beside([Piece(0, prompt + n, prompt + n + 1)], decoding, rows))
    return steps


def cached_prefix(shared: int) -> list[Step]:
    """Text 0 again, over the first blocks that it has left in the cache, the rest elsewhere."""
    tables = (0,) * shared + (OTHER,) * (BLOCKS_PER_TEXT - shared)
    return [
        [Piece(0, 0, PROMPT)],
        [Piece(0, 16 * shared, PROMPT, tables)],
        *([Piece(0, n, n + 1, tables)] for n in range(PROMPT, STOP)),
    ]


def copied_block() -> list[Step]:
    """The text goes on in a copy of its last, half-filled block, as after a branch."""
    last = PROMPT // 16
    tables = (0,) * last + (OTHER,)
    return [
        [Piece(0, 0, PROMPT)],
        [Copy(0, OTHER, last), Piece(0, PROMPT, PROMPT + 1, tables)],
        *([Piece(0, n, n + 1, tables)] for n in range(PROMPT + 1, STOP)),
    ]


def forgotten(window: int) -> list[Step]:
    """Blocks that are out of the window's sight belong to somebody else by now."""
    return [
        [Piece(0, 0, PROMPT)],
        *(
            [Piece(0, n, n + 1, (OTHER,) * (max(0, n - window + 1) // 16))]
            for n in range(PROMPT, STOP)
        ),
    ]


def all_ways() -> list[list[Step]]:
    """Of coming to the logits of text 0 from token PROMPT to STOP."""
    return [
        chunks(0, PROMPT, PROMPT, STOP),
        chunks(0, STOP, STOP, STOP),  # recomputed: what was generated is now part of the prompt
        chunks(0, 1, PROMPT, STOP),
        chunks(0, 7, PROMPT, STOP),
        chunks(0, 64, PROMPT, STOP),
        batch(2, row=0),
        batch(2, row=2),
        batch(31, row=0),
        batch(31, row=13),
        batch(31, row=31),
        cached_prefix(1),
        cached_prefix(4),
        copied_block(),
    ]


def some_ways() -> list[list[Step]]:
    """One of each kind."""
    return [
        chunks(0, PROMPT, PROMPT, STOP),
        chunks(0, 7, PROMPT, STOP),
        batch(2, row=1),
        batch(31, row=30),
        cached_prefix(2),
        copied_block(),
    ]


def short_ways() -> list[list[Step]]:
    """For models whose every token takes long."""
    return [
        chunks(0, 19, 19, 21),
        chunks(0, 7, 14, 15),
        batch(2, row=1, prompt=19, stop=21, longest=9),
        batch(31, row=5, prompt=5, stop=7, longest=3),
        chunks(0, 1, 7, 7),
    ]


def assert_one_arithmetic(
    model: Model,
    settings: Sequence[Setting],
    ways: Sequence[Sequence[Step]],
    folder: Path,
) -> None:
    """All logits that any two of the runs have in common are equal."""
    config = read_model_config(model.folder)
    spoiler = None if model.folder.name == "story" else config.vocab_size - 1
    texts = Texts(config.vocab_size, spoiler=spoiler)
    seen: dict[tuple[int, int], tuple[str, str]] = {}
    compared = 0
    for setting in settings:
        for way, logits in enumerate(logits_of(model, texts, ways, setting, folder)):
            here = f"{setting}, way {way}"
            for key, row in logits.items():
                assert row.shape == (config.vocab_size,)
                assert np.isfinite(row).all()
                bits = digest(row)
                first, where = seen.setdefault(key, (bits, here))
                compared += where != here
                assert bits == first, f"text, tokens {key}: {here} differs from {where}"
    assert compared >= len(settings) * len(ways) - 1
    assert len({bits for bits, _ in seen.values()}) > 1, "all logits are alike: this tests nothing"


# --- the story model: every precision, every way, every kind of worker ----------------------------


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "settings"),
    [
        ("fp32", "fp32", [ALONE, TWO_THREADS, THREE, TWO_BY_GLOO, EIGHT]),
        ("fp32", "bf16", [ALONE, TWO, FIVE, THREE_BY_ZMQ]),
        ("bf16", "bf16", [ALONE, TWO_WITH_TWO_THREADS, THREE, EIGHT, TWO_BY_ZMQ]),
        ("fp16", "bf16", [ALONE, TWO_THREADS, FIVE, TWO_BY_GLOO]),
        ("bf16", "fp16", [ALONE, TWO, EIGHT]),
        ("int8", "bf16", [ALONE, TWO_THREADS, TWO, THREE, FIVE, EIGHT, THREE_BY_ZMQ, TWO_BY_GLOO]),
        ("int8", "int8", [ALONE, TWO_WITH_TWO_THREADS, FIVE, TWO_BY_ZMQ]),
        ("int4", "bf16", [ALONE, TWO_THREADS, THREE, FIVE, TWO_BY_GLOO, EIGHT]),
        ("int4", "int8", [ALONE, TWO, THREE_BY_ZMQ]),
    ],
)
def test_the_story_model_gives_a_token_the_same_logits_in_every_way(
    dtype: Precision,
    kv_dtype: KVPrecision,
    settings: list[Setting],
    story_model: Path,
    tmp_path: Path,
) -> None:
    model = Model(story_model, dtype, kv_dtype)
    assert_one_arithmetic(model, settings[:2], all_ways(), tmp_path)
    assert_one_arithmetic(model, settings, some_ways(), tmp_path)


# --- real layers ----------------------------------------------------------------------------------

MINUEZA = Shape(hidden=312, intermediate=1092, heads=12, kv_heads=4, head_dim=26, window=1024)
TINYLLAMA = Shape(hidden=2048, intermediate=5632, heads=32, kv_heads=4, head_dim=64, vocab=320)


@pytest.fixture(scope="module")
def tinyllama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tinyllama"), TINYLLAMA, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "settings"),
    [
        ("fp32", "bf16", [ALONE, TWO]),
        ("bf16", "bf16", [ALONE, THREE]),
        ("int8", "bf16", [ALONE, TWO_THREADS, EIGHT]),
        ("int4", "int8", [ALONE, FIVE]),
    ],
)
def test_layers_of_tinyllama_give_a_token_the_same_logits_in_every_way(
    dtype: Precision,
    kv_dtype: KVPrecision,
    settings: list[Setting],
    tinyllama: Path,
    tmp_path: Path,
) -> None:
    assert_one_arithmetic(Model(tinyllama, dtype, kv_dtype), settings, short_ways(), tmp_path)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "settings"),
    [
        ("fp32", "fp32", [ALONE, TWO, EIGHT]),
        ("bf16", "bf16", [ALONE, TWO_THREADS, FIVE]),
        ("int8", "bf16", [ALONE, THREE, TWO_BY_ZMQ]),
        ("int4", "fp16", [ALONE, FIVE]),
    ],
)
def test_layers_of_minueza_give_a_token_the_same_logits_in_every_way(
    dtype: Precision, kv_dtype: KVPrecision, settings: list[Setting], tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "model", MINUEZA)
    assert why_not_native(read_model_config(folder)) is None
    assert_one_arithmetic(Model(folder, dtype, kv_dtype), settings, some_ways(), tmp_path)


# --- odd shapes -----------------------------------------------------------------------------------

SHAPES = {
    "6 heads and 4 groups of tokens for 8 shards": Shape(96, 200, 6, 2, 16),
    "3 groups of rows, head_dim 48": Shape(64, 96, 12, 4, 48),
    "9 heads, head_dim 64": Shape(160, 224, 9, 3, 64),
    "5 heads of one KV head, head_dim 80": Shape(96, 300, 5, 1, 80),
    "most shards are empty": Shape(64, 33, 2, 2, 96, vocab=33),
    "20 KV heads, head_dim 128": Shape(128, 512, 20, 20, 128),
    "20 heads of one KV head": Shape(64, 128, 20, 1, 16, vocab=1000),
    "head_dim 256": Shape(96, 160, 3, 1, 256),
}


@pytest.mark.parametrize(
    ("shape", "dtype", "kv_dtype", "settings"),
    [
        ("6 heads and 4 groups of tokens for 8 shards", "fp32", "bf16", [ALONE, TWO, EIGHT]),
        ("6 heads and 4 groups of tokens for 8 shards", "int8", "int8", [ALONE, THREE, FIVE]),
        ("3 groups of rows, head_dim 48", "int4", "bf16", [ALONE, TWO_BY_ZMQ, FIVE]),
        ("3 groups of rows, head_dim 48", "fp16", "fp32", [ALONE, EIGHT]),
        ("9 heads, head_dim 64", "int8", "bf16", [ALONE, TWO_WITH_TWO_THREADS, EIGHT]),
        ("5 heads of one KV head, head_dim 80", "bf16", "fp16", [ALONE, THREE, FIVE]),
        ("5 heads of one KV head, head_dim 80", "int8", "int8", [TWO_THREADS, EIGHT]),
        ("most shards are empty", "int8", "bf16", [ALONE, TWO, THREE_BY_ZMQ, EIGHT]),
        ("most shards are empty", "int4", "int8", [TWO_THREADS, TWO_BY_GLOO, FIVE]),
        ("most shards are empty", "fp32", "fp32", [ALONE, EIGHT]),
        ("20 KV heads, head_dim 128", "int4", "bf16", [ALONE, TWO_THREADS, THREE]),
        ("20 heads of one KV head", "bf16", "bf16", [ALONE, TWO_THREADS, FIVE]),
        ("head_dim 256", "fp16", "bf16", [ALONE, TWO, EIGHT]),
    ],
)
def test_any_shape_gives_a_token_the_same_logits_in_every_way(
    shape: str,
    dtype: Precision,
    kv_dtype: KVPrecision,
    settings: list[Setting],
    tmp_path: Path,
) -> None:
    folder = write_checkpoint(tmp_path / "model", SHAPES[shape])
    assert_one_arithmetic(Model(folder, dtype, kv_dtype), settings, some_ways(), tmp_path)


# With 52 some of the queries that share a pass see one block more than others, and two spans.
@pytest.mark.parametrize("window", [1, 20, 52])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "settings"),
    [
        ("fp32", "bf16", [ALONE, TWO_THREADS, THREE]),
        ("int8", "int8", [ALONE, TWO, EIGHT]),
    ],
)
def test_a_sliding_window_gives_a_token_the_same_logits_in_every_way(
    dtype: Precision,
    kv_dtype: KVPrecision,
    window: int,
    settings: list[Setting],
    tmp_path: Path,
) -> None:
    folder = write_checkpoint(tmp_path / "model", Shape(96, 200, 6, 2, 32, window=window))
    ways = [*some_ways(), forgotten(window), chunks(0, 1, PROMPT, STOP)]
    assert_one_arithmetic(Model(folder, dtype, kv_dtype), settings, ways, tmp_path)
