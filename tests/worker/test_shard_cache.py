"""Packed weights on disk: the same bits, faster; whatever is wrong with a file, the model loads."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.messages import BLOCK_TOKENS, Precision
from shared.worker_messages import AllocateKV, LoadModel, SequenceStep
from tests.worker.forward import GREEDY
from tests.worker.rank_threads import run_ranks
from worker.comm.base import Communicator, Floats
from worker.native.api import Matrix, Pool, native_library
from worker.runner import Runner

PROMPT = list(range(5, 5 + BLOCK_TOKENS))


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Weights that were packed, not read from the cache; by their bytes."""
    made: list[int] = []
    pack = Matrix.pack

    def counted(self: Matrix, *arguments: object) -> None:
        made.append(self.bytes)
        pack(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Matrix, "pack", counted)
    return made


def logits(folder: Path, cache: Path, dtype: Precision = "int8", world: int = 2) -> list[Floats]:
    """By rank, after loading with the cache."""
    library = native_library()
    if library is None:
        pytest.skip("int8 needs the native library")
    found: dict[int, Floats] = {}

    def job(comm: Communicator, owned: list[range]) -> None:
        runner = Runner(comm, owned, 8, Pool(library, 1, crowded=True))
        runner.load(
            LoadModel(
                model="m",
                path=str(folder),
                dtype=dtype,
                kv_dtype="bf16",
                max_model_len=64,
                shard_cache=str(cache),
            )
        )
        runner.allocate(AllocateKV(model="m", blocks=2, slots=1, tokens=64))
        model = runner._models["m"]
        step = SequenceStep(0, 0, PROMPT, np.arange(2, dtype="<i4").tobytes(), GREEDY)
        found[comm.rank] = model.ops.run([step], model.last_tokens).logits.copy()

    run_ranks(world, job)
    return [found[rank] for rank in range(world)]


def same(one: list[Floats], other: list[Floats]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_second_load_packs_nothing_and_computes_the_same(
    dtype: Precision, packed: list[int], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint("tiny-gqa")
    first = logits(folder, tmp_path, dtype)
    assert packed
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2, "one for each rank"
    assert sum(file.stat().st_size for file in files) > sum(packed)
    packed.clear()
    assert same(logits(folder, tmp_path, dtype), first)
    assert not packed
    assert sorted(tmp_path.iterdir()) == files


def test_other_precisions_workers_and_checkpoints_have_files_of_their_own(
    packed: list[int], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint("tiny-gqa")
    logits(folder, tmp_path)
    logits(folder, tmp_path, "int4")
    logits(folder, tmp_path, world=1)
    assert len(list(tmp_path.iterdir())) == 5
    packed.clear()
    status = (folder / "model.safetensors").stat()
    os.utime(folder / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    logits(folder, tmp_path)
    assert packed, "the checkpoint may be another one"


@pytest.mark.parametrize("damage", ["a bit", "the end", "all", "the length"])
def test_a_damaged_file_is_noticed_and_made_again(
    damage: str, packed: list[int], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint("tiny-gqa")
    first = logits(folder, tmp_path, world=1)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 4
    elif damage == "the length":
        content[0] ^= 255
    kept = {"the end": len(content) - 9, "all": 0}.get(damage, len(content))
    file.write_bytes(content[:kept])
    packed.clear()
    assert same(logits(folder, tmp_path, world=1), first)
    assert packed
    logits(folder, tmp_path, world=1)
    packed.clear()
    assert same(logits(folder, tmp_path, world=1), first)
    assert not packed


def test_a_folder_that_cannot_be_written_does_no_harm(
    packed: list[int], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    logits(make_checkpoint("tiny-gqa"), blocked / "cache")
    assert packed
