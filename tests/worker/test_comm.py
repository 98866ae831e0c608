"""The contract of the communicators, over every transport, between real processes."""

import ctypes
import functools
import itertools
import mmap
import os
import platform
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from shared.errors import CommError, ConfigError
from shared.sharding import assign_shards
from shared.shm import buffer_offset, create_shm_region, region_bytes
from shared.worker_messages import CommSetup
from tests.worker.comm_ranks import (
    Barrier,
    Exchange,
    Kind,
    RankPool,
    Reduce,
    ReduceUntilLost,
    World,
    digest,
    leaf,
    rank_array,
)
from tests.worker.rank_threads import run_ranks
from worker.comm.base import Communicator, Floats
from worker.comm.open import open_communicator
from worker.comm.shm import ShmCommunicator
from worker.native.library import load_library

PATIENT_S = 60.0
"""Deadline of the worlds that are to work, however busy the machine is."""
IMPATIENT_S = 1.5
"""Deadline of the worlds that lose a rank."""

needs_library = pytest.mark.skipif(
    load_library() is None, reason="there is no native library (python -m worker.native.build)"
)


def case(kind: Kind, *rest: object) -> Any:
    """A parameter set, which is skipped where the library is missing that it is about."""
    return pytest.param(kind, *rest, marks=needs_library if kind == "shm" else ())


KINDS = [case("shm"), case("shm-python"), case("zmq"), case("gloo")]
WORLDS = [
    case("local", 1),
    *(case("shm", world) for world in range(1, 9)),
    *(case("shm-python", world) for world in range(1, 9)),
    *(case("zmq", world) for world in range(1, 9)),
    *(case("gloo", world) for world in (2, 3, 5)),
]

# One block; sliced among the ranks; several blocks, and slices that do not fit; a long prefill.
SIZES = [1, 3, 128, 2_049, 40_000, 150_001, 1 << 20]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    ranks = RankPool(tmp_path_factory.mktemp("comm"))
    yield ranks
    ranks.end()


@functools.cache
def expected_digest(virtual_shards: int, size: int) -> str:
    return digest(tree_sum([leaf(shard, size) for shard in range(virtual_shards)]))


def tree_sum(leaves: Sequence[Floats]) -> Floats:
    """((p0+p1)+(p2+p3))+((p4+p5)+(p6+p7)), written down once more."""
    if len(leaves) == 1:
        return leaves[0]
    middle = len(leaves) // 2
    return tree_sum(leaves[:middle]) + tree_sum(leaves[middle:])


def assert_reduces(world: World, virtual_shards: int, sizes: list[int]) -> None:
    expected = [expected_digest(virtual_shards, size) for size in sizes]
    for answer in world.run(Reduce(sizes)):
        assert answer.digests == expected, answer.error


def test_the_test_data_tells_one_order_of_additions_from_another() -> None:
    leaves = [leaf(shard, 2_049) for shard in range(8)]
    assert digest(functools.reduce(np.add, leaves)) != expected_digest(8, 2_049)


@pytest.mark.parametrize(("kind", "size"), WORLDS)
def test_every_world_size_gives_every_rank_the_bits_of_the_one_tree(
    pool: RankPool, kind: Kind, size: int
) -> None:
    with pool.world(kind, assign_shards(size, 8), PATIENT_S) as world:
        world.open()
        assert_reduces(world, 8, SIZES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", [(0, 1, 8), (0, 5, 6, 8), (0, 3, 7, 14, 15, 16)], ids=str)
def test_any_division_of_the_shards_gives_the_same_bits(
    pool: RankPool, kind: Kind, bounds: tuple[int, ...]
) -> None:
    owned = [range(a, b) for a, b in itertools.pairwise(bounds)]
    with pool.world(kind, owned, PATIENT_S) as world:
        world.open()
        assert_reduces(world, bounds[-1], [1, 128, 2_049, 150_001])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounds", [(0, 4, 8), (0, 3, 6, 8), (0, 1, 8)], ids=str)
def test_a_rank_that_adds_up_its_own_subtrees_itself_gets_the_same_bits(
    pool: RankPool, kind: Kind, bounds: tuple[int, ...]
) -> None:
    owned = [range(a, b) for a, b in itertools.pairwise(bounds)]
    sizes = [1, 2_049, 150_001]
    with pool.world(kind, owned, PATIENT_S) as world:
        world.open()
        for answer in world.run(Reduce(sizes, from_roots=True)):
            assert answer.digests == [expected_digest(8, size) for size in sizes], answer.error


@pytest.mark.parametrize(
    ("kind", "size", "rounds"),
    [
        case("shm", 3, 600),
        case("shm", 5, 300),
        case("shm-python", 3, 600),
        case("zmq", 3, 300),
        case("gloo", 3, 200),
    ],
)
def test_many_rounds_with_ranks_that_lag_at_random_do_not_mix_data_up(
    pool: RankPool, kind: Kind, size: int, rounds: int
) -> None:
    sizes = [1 + 37 * i % 64 for i in range(rounds)]
    with pool.world(kind, assign_shards(size, 8), PATIENT_S) as world:
        world.open()
        expected = [expected_digest(8, size) for size in sizes]
        for answer in world.run(Reduce(sizes, jitter_s=0.001)):
            assert answer.digests == expected, answer.error


@pytest.mark.parametrize(
    ("kind", "size"),
    [case("local", 1), case("shm", 3), case("shm-python", 3), case("zmq", 3), case("gloo", 3)],
)
def test_an_exchange_gathers_arrays_of_any_dtype_and_shape_by_rank(
    pool: RankPool, kind: Kind, size: int
) -> None:
    cases: list[tuple[str, tuple[int, ...]]] = [
        ("float32", (4,)),
        ("int64", ()),
        ("float16", (3, 5)),
        ("bool", (7,)),
        ("uint8", (1,)),
        ("int32", (0, 4)),
        ("float64", (300, 500)),
    ]
    with pool.world(kind, assign_shards(size, 8), PATIENT_S) as world:
        world.open()
        expected = [digest(np.stack([rank_array(r, *case) for r in range(size)])) for case in cases]
        for answer in world.run(Exchange(cases)):
            assert answer.digests == expected, answer.error


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_leaves_a_barrier_before_all_have_come(pool: RankPool, kind: Kind) -> None:
    with pool.world(kind, assign_shards(3, 8), PATIENT_S) as world:
        world.open()
        for late in range(3):
            for rank, process in enumerate(world.ranks):
                process.tell(Barrier(delay_s=0.2 if rank == late else 0))
            answers = [process.answer() for process in world.ranks]
            last_came = max(float(answer.digests[0]) for answer in answers)
            assert min(answer.ended for answer in answers) >= last_came


@pytest.mark.parametrize("missing", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_never_comes_is_named_within_the_deadline(
    pool: RankPool, kind: Kind, missing: int
) -> None:
    with pool.world(kind, assign_shards(3, 8), IMPATIENT_S) as world:
        present = [rank for rank in range(3) if rank != missing]
        answers = world.open(only=present)
        if kind != "gloo":  # which finds out while opening
            answers = world.run(Barrier(), only=present)
        for answer in answers:
            assert answer.lost_rank == missing
            assert "did not answer within 1.5 s" in answer.error
            assert answer.ended - answer.began < IMPATIENT_S + 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_stops_between_collectives_is_named_within_the_deadline(
    pool: RankPool, kind: Kind, number: signal.Signals
) -> None:
    with pool.world(kind, assign_shards(3, 8), IMPATIENT_S) as world:
        world.open()
        assert_reduces(world, 8, [128, 2_049])
        world.signal(1, number)
        for attempt in range(2):  # a communicator that has failed stays so
            for answer in world.run(Reduce([200_000]), only=[0, 2]):
                assert answer.lost_rank == 1, (attempt, answer.error)
                assert answer.ended - answer.began < IMPATIENT_S + 1
        world.signal(1, signal.SIGCONT)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_stops_anywhere_in_a_collective_leaves_nobody_waiting(
    pool: RankPool, kind: Kind, number: signal.Signals
) -> None:
    with pool.world(kind, assign_shards(2, 8), IMPATIENT_S) as world:
        world.open()
        for process in world.ranks:
            process.tell(ReduceUntilLost(40_000))
        time.sleep(0.3)
        world.signal(1, number)
        stopped = time.monotonic()
        answer = world.ranks[0].answer()
        assert answer.lost_rank == 1
        assert "all-reduce" in answer.error
        assert answer.ended - stopped < IMPATIENT_S + 1
        if number == signal.SIGSTOP:
            world.signal(1, signal.SIGCONT)
            assert world.ranks[1].answer().lost_rank == 0


@needs_library
@pytest.mark.parametrize("size", [2, 3])
def test_programs_of_the_library_and_python_take_turns_in_one_count_of_rounds(size: int) -> None:
    """A program writes into the next buffer, exchanges, and reads what all have posted."""
    library = load_library()
    assert library is not None
    next_buffer = library.tps_collective_next_buffer
    posted_buffer = library.tps_collective_posted_buffer
    next_buffer.argtypes, next_buffer.restype = [ctypes.c_void_p], ctypes.c_void_p
    posted_buffer.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    posted_buffer.restype = ctypes.c_void_p

    def job(comm: Communicator, owned: list[range]) -> None:
        assert comm.native is not None
        assert comm.buffer_bytes >= 32 << 20
        words = comm.buffer_bytes // 8
        for turn in range(60):
            for _ in range(turn % 4):
                mine = (ctypes.c_uint64 * words).from_address(next_buffer(comm.native))
                mine[0] = mine[words - 1] = 1_000 * turn + comm.rank
                assert library.tps_collective_exchange(comm.native) == -1
                for rank in range(comm.world):
                    theirs = (ctypes.c_uint64 * words).from_address(
                        posted_buffer(comm.native, rank)
                    )
                    assert theirs[0] == theirs[words - 1] == 1_000 * turn + rank
            partials = np.stack([leaf(shard, 128) for shard in owned[comm.rank]])
            assert digest(comm.all_reduce_tree(partials)) == expected_digest(8, 128)

    run_ranks(size, job)


def test_a_peer_that_a_program_has_missed_is_named_by_every_later_call() -> None:
    comm = open_communicator(setup("local", 1, []), None)
    missed = comm.lost(1, "a step")
    assert str(missed) == "rank 1: did not answer within 0.2 s in a step"
    with pytest.raises(CommError) as raised:
        comm.barrier()
    assert raised.value is missed


def test_the_shared_region_has_no_name_and_takes_no_memory_before_it_is_used() -> None:
    region = create_shm_region(8)
    try:
        status = os.fstat(region)
        assert (status.st_size, status.st_blocks, status.st_nlink) == (region_bytes(8), 0, 0)
        assert not os.get_inheritable(region)
    finally:
        os.close(region)


def test_the_shared_region_takes_memory_for_what_is_used_of_its_buffers() -> None:
    region = create_shm_region(8)
    try:
        with mmap.mmap(region, region_bytes(8)) as mapping:
            for rank, parity in itertools.product(range(8), range(2)):
                mapping[buffer_offset(8, rank, parity)] = 1
        # Pages have 4 KiB, or 2 MiB where the system gives huge ones to everyone.
        assert os.fstat(region).st_blocks * 512 <= 16 * (2 << 20) < region_bytes(8) / 16
    finally:
        os.close(region)


def setup(
    kind: Literal["local", "shm", "zmq", "gloo"], world: int, addresses: list[str]
) -> CommSetup:
    owned = [(run.start, run.stop) for run in assign_shards(world, 8)]
    return CommSetup(kind=kind, rank=0, owned=owned, deadline_s=0.2, addresses=addresses)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (setup("local", 2, []), "local is for one worker, not for 2"),
        (setup("shm", 2, []), "needs the file descriptor"),
        (setup("zmq", 2, ["ipc:///tmp/a"]), "needs an address for each of 2 ranks, got 1"),
        (setup("zmq", 2, ["tcp://127.0.0.1:1", "tcp://127.0.0.1:2"]), "needs ipc:// addresses"),
        (setup("zmq", 2, ["ipc:///no/such/folder/a", "ipc:///no/such/folder/b"]), "cannot reach"),
        (setup("gloo", 2, []), "needs one file:// address"),
        (setup("gloo", 2, ["file:///no/such/folder/a"]), "cannot use /no/such/folder/a"),
    ],
)
def test_a_setup_that_cannot_work_is_refused(wrong: CommSetup, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_communicator(wrong, None)


def test_a_region_for_another_number_of_ranks_is_refused() -> None:
    region = create_shm_region(3)
    try:
        with pytest.raises(ConfigError, match="2 ranks need"):
            open_communicator(setup("shm", 2, []), region)
    finally:
        os.close(region)


def test_without_the_library_a_machine_with_another_memory_order_is_told_what_to_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    region = create_shm_region(2)
    try:
        with pytest.raises(ConfigError, match=r"aarch64 machine: make it .* or use --comm zmq"):
            ShmCommunicator(setup("shm", 2, []), region, None, crowded=False)
    finally:
        os.close(region)


def test_sockets_leave_no_files_behind(tmp_path: Path) -> None:
    comm = open_communicator(
        setup("zmq", 3, [f"ipc://{tmp_path}/{rank}" for rank in range(3)]), None
    )
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(CommError, match=r"^rank 1: did not answer within .* s in barrier$"):
        comm.barrier()
    comm.close()
    comm.close()
    assert list(tmp_path.iterdir()) == []
