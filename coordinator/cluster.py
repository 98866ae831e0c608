"""The workers as one machine: bring them up, load models, send plans, take results, see faults.

Bringing up is a conversation with all ranks; it is written as a generator that receives their
messages one by one, so that it reads in order while the engine's loop goes on serving clients.
"""

import logging
import os
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq

from coordinator.supervisor import Supervisor
from shared.config import Settings
from shared.errors import TpserveError, WorkerLostError
from shared.messages import BLOCK_TOKENS, KVPrecision, Precision
from shared.sharding import assign_shards
from shared.shm import create_shm_region
from shared.sockets import worker_facing
from shared.worker_messages import (
    Allocated,
    AllocateKV,
    CommReady,
    CommSetup,
    FromWorker,
    Hello,
    Loaded,
    LoadModel,
    LoadProgress,
    SetUp,
    ShutDown,
    StepPlan,
    StepResult,
    ToWorker,
    Unloaded,
    UnloadModel,
    WorkerFailed,
    WorkerTimes,
    decode_from_worker,
    encode,
)

log = logging.getLogger("coordinator.cluster")

KV_SHARE = 0.5
"""Part of the free memory that KV caches get when no size is asked for."""
DEVICE_KV_SHARE = 0.8
"""The same of a GPU's, which nothing else needs but a step's activations and captured steps."""

M = TypeVar("M", bound=FromWorker)
Conversation = Generator[None, FromWorker, None]


@dataclass
class ModelOnWorkers:
    """What the cluster is to load, and what it then has."""

    name: str
    path: Path
    dtype: Precision
    kv_dtype: KVPrecision
    max_model_len: int
    kv_blocks: int = 0
    weight_bytes: list[int] = field(default_factory=list)
    """By rank."""
    kv_block_bytes: list[int] = field(default_factory=list)
    """By rank."""

    @property
    def kv_bytes(self) -> list[int]:
        """Of the KV cache, by rank."""
        return [self.kv_blocks * block for block in self.kv_block_bytes]


@dataclass
class Load:
    """A model on its way into the workers, or out of them again."""

    model: ModelOnWorkers
    bytes_done: list[int]
    """Weights packed, by rank."""
    started_at: float = field(default_factory=time.monotonic)
    ended: bool = False
    error: TpserveError | None = None
    """Why it is not loaded; nothing of it is left once the load has ended."""


class Cluster:
    """All workers of the current epoch."""

    def __init__(
        self,
        settings: Settings,
        context: zmq.Context[zmq.SyncSocket],
        run_dir: Path,
        models: Iterable[ModelOnWorkers],
        supervisor: Supervisor,
    ) -> None:
        self._settings = settings
        self._run_dir = run_dir
        self._address = f"ipc://{run_dir}/workers"
        self.models = {model.name: model for model in models}
        """What every epoch is started with."""
        self.kernels = ""
        """What the workers compute with, once they have said so."""
        self.owned = assign_shards(settings.workers, settings.virtual_shards)
        self.socket = worker_facing(context, self._address)
        self.supervisor = supervisor
        self.epoch = 0
        self.compute_s = [0.0] * settings.workers
        self.comm_s = [0.0] * settings.workers
        """What each rank has spent, as it last told."""
        self.ready = False
        """All models are loaded; no token may have been computed yet."""
        self._bringing_up: Conversation | None = None
        self._changing: dict[str, Conversation] = {}
        """Models that are loaded or unloaded while others are served."""
        self._loads: dict[str, Load] = {}
        self._holding: list[ModelOnWorkers] = []
        """Models that have KV memory in this epoch."""
        self.awaited: list[int] = []
        """Ranks that all others wait for while the workers are brought up."""
        self.heard_at = 0.0
        """When a worker of this epoch has last said something."""
        self._shm_fd: int | None = None

    def start(self) -> None:
        """Start a new epoch; `ready` becomes true when every rank has loaded every model."""
        self.epoch += 1
        self.ready = False
        world = self._settings.workers
        log.info("starting %d workers (epoch %d)", world, self.epoch)
        self._release_region()
        self._holding.clear()
        if self._settings.comm == "shm":
            self._shm_fd = create_shm_region(world)
        self.supervisor.start(world, self.epoch, self._address, self._shm_fd)
        self._bringing_up = self._bring_up()
        next(self._bringing_up)

    def load(self, model: ModelOnWorkers) -> Load:
        """Begin to load one more model; `receive` carries it on."""
        load = self._loads[model.name] = Load(model, [0] * len(self.owned))
        self._begin(model.name, self._load_beside_others(load))
        return load

    def unload(self, model: ModelOnWorkers) -> Load:
        """Begin to give a model's memory back."""
        self.models.pop(model.name, None)
        self._holding.remove(model)
        load = Load(model, list(model.weight_bytes))
        self._begin(model.name, self._unload(load))
        return load

    def give_up(self, load: Load, error: TpserveError) -> None:
        """Undo a load on all workers; its first error stays."""
        if load.error is None:
            load.error = error
            self._changing[load.model.name].close()
            self._begin(load.model.name, self._unload(load))

    def send_plan(self, plan: StepPlan) -> None:
        """Have a plan carried out after those that were sent before."""
        self._to_all(plan)

    def receive(self) -> StepResult | None:
        """Take one message; a step's result if it is one of this epoch, else None.

        Raises TpserveError when a worker reports a failure, zmq.Again when nothing is there.
        """
        _, frame = self.socket.recv_multipart(zmq.NOBLOCK)
        try:
            message = decode_from_worker(frame)
        except msgspec.DecodeError as error:
            raise WorkerLostError(
                f"a worker sent a message that is not understood: {error}"
            ) from None
        if message.epoch != self.epoch:
            return None  # from a worker that was given up
        self.heard_at = time.monotonic()
        if isinstance(message, StepResult):
            return message
        if isinstance(message, WorkerTimes):
            self.compute_s[message.rank] = message.compute_s
            self.comm_s[message.rank] = message.comm_s
            return None
        if isinstance(message, WorkerFailed):
            self._failed(message)
        elif isinstance(message, LoadProgress):
            if message.model in self._loads:
                self._loads[message.model].bytes_done[message.rank] = message.weight_bytes
        elif self._bringing_up is not None:
            try:
                self._bringing_up.send(message)
            except StopIteration:
                self._bringing_up = None
                self.ready = True
        elif isinstance(message, Loaded | Allocated | Unloaded):
            self._carry_on(message.model, message)
        return None

    def stop(self, grace_s: float) -> None:
        """End all workers of this epoch."""
        self.ready = False
        self._bringing_up = None
        self._changing.clear()
        self._loads.clear()
        if grace_s > 0:
            self._to_all(ShutDown())
        self.supervisor.stop(grace_s)

    def close(self) -> None:
        """Release the socket; `stop` comes first."""
        self.socket.close(0)
        self._release_region()

    # --- models that come and go ------------------------------------------------------------------

    def _begin(self, name: str, conversation: Conversation) -> None:
        self._changing[name] = conversation
        next(conversation)

    def _carry_on(self, name: str, message: FromWorker) -> None:
        if (conversation := self._changing.get(name)) is None:
            return
        try:
            conversation.send(message)
        except StopIteration:
            del self._changing[name]

    def _failed(self, message: WorkerFailed) -> None:
        """A worker could not load a model beside others: all give it up. Raises anything else."""
        load = self._loads.get(message.model)
        if message.fatal or load is None:
            raise WorkerReportedError(message)
        self.give_up(load, WorkerReportedError(message))

    def _load_beside_others(self, load: Load) -> Conversation:
        try:
            yield from self._load(load.model, threads=1, still_to_come=1)
        except TpserveError as error:
            load.error = error
            yield from self._unload(load)
            return
        self.models[load.model.name] = load.model
        del self._loads[load.model.name]
        load.ended = True

    def _unload(self, load: Load) -> Conversation:
        self._to_all(UnloadModel(model=load.model.name))
        yield from self._hear_all(Unloaded)
        self._loads.pop(load.model.name, None)
        load.ended = True

    def _release_region(self) -> None:
        if self._shm_fd is not None:
            os.close(self._shm_fd)
            self._shm_fd = None

    def _bring_up(self) -> Conversation:
        yield from self._hear_all(Hello)
        for rank in range(len(self.owned)):
            self._to(rank, self._set_up(rank))
        joined = yield from self._hear_all(CommReady)
        self.kernels = joined[0].kernels
        log.info("%d workers compute with %s kernels", len(joined), self.kernels)
        for number, model in enumerate(self.models.values()):
            still_to_come = len(self.models) - number
            yield from self._load(model, self._settings.threads, still_to_come)

    def _load(self, model: ModelOnWorkers, threads: int, still_to_come: int) -> Conversation:
        """`still_to_come`: models that have no KV memory yet, this one included."""
        log.info(
            "loading %s from %s as %s, KV cache as %s",
            model.name,
            model.path,
            model.dtype,
            model.kv_dtype,
        )
        self._to_all(
            LoadModel(
                model=model.name,
                path=str(model.path),
                dtype=model.dtype,
                kv_dtype=model.kv_dtype,
                max_model_len=model.max_model_len,
                threads=threads,
                shard_cache=self._settings.shard_cache,
            )
        )
        loaded = yield from self._hear_all(Loaded)
        model.weight_bytes = [answer.weight_bytes for answer in loaded]
        model.kv_block_bytes = [answer.kv_block_bytes for answer in loaded]
        if not model.kv_blocks:  # later epochs get what the first one got: jobs count on it
            model.kv_blocks = self._kv_blocks(model, loaded, still_to_come)
        self._to_all(
            AllocateKV(
                model=model.name,
                blocks=model.kv_blocks,
                slots=self._settings.max_num_seqs,
                tokens=self._settings.max_batched_tokens,
            )
        )
        yield from self._hear_all(Allocated)
        self._holding.append(model)
        log.info(
            "%s: %.1f MB of weights on the largest worker, KV cache for %d tokens",
            model.name,
            max(model.weight_bytes) / 1e6,
            model.kv_blocks * BLOCK_TOKENS,
        )

    def _hear_all(self, kind: type[M]) -> Generator[None, FromWorker, list[M]]:
        """One message of `kind` from every rank, by rank."""
        heard: dict[int, M] = {}
        while awaited := [rank for rank in range(len(self.owned)) if rank not in heard]:
            self.awaited = awaited
            message = yield
            if isinstance(message, kind):
                heard[message.rank] = message
        return [heard[rank] for rank in range(len(self.owned))]

    def _set_up(self, rank: int) -> SetUp:
        settings, world = self._settings, len(self.owned)
        ipc = f"ipc://{self._run_dir}/mesh-{self.epoch}"
        file = f"file://{self._run_dir}/{settings.comm}-{self.epoch}"
        addresses = {
            "zmq": [f"{ipc}-{r}" for r in range(world)],
            "gloo": [file],
            "nccl": [file],
            "shm": [],
        }
        return SetUp(
            epoch=self.epoch,
            comm=CommSetup(
                kind="local" if world == 1 else settings.comm,
                rank=rank,
                owned=[(shards.start, shards.stop) for shards in self.owned],
                deadline_s=settings.step_timeout,
                addresses=addresses[settings.comm],
            ),
            virtual_shards=settings.virtual_shards,
            threads=settings.threads,
            core=rank * settings.threads if settings.pin_cores else None,
            device=settings.device,
            deterministic=settings.deterministic,
        )

    def _kv_blocks(self, model: ModelOnWorkers, loaded: list[Loaded], still_to_come: int) -> int:
        """How many blocks fit on every rank, but no more than could ever be used at once."""
        settings, world = self._settings, len(self.owned)
        most_useful = settings.max_num_seqs * -(-model.max_model_len // BLOCK_TOKENS)
        # What other models have been given counts as taken, though little of it may be in use yet.
        taken = [sum(m.kv_bytes[rank] for m in self._holding) for rank in range(world)]
        fitting = []
        for rank, answer in enumerate(loaded):
            if settings.kv_memory_bytes is not None:
                budget = settings.kv_memory_bytes - taken[rank]
            elif settings.device == "cuda":  # what others were given is taken at once
                budget = int(answer.free_bytes * DEVICE_KV_SHARE)
            else:  # all workers share this machine's memory
                budget = int((answer.free_bytes - sum(taken)) * KV_SHARE / world)
            fitting.append(budget // still_to_come // max(1, answer.kv_block_bytes))
        blocks = min(most_useful, *fitting)
        if blocks < 1:
            raise TpserveError(
                f"{model.name}: the KV cache has no room for a single block of {BLOCK_TOKENS} tokens: "
                f"give more --kv-memory, or unload a model"
            )
        if blocks * BLOCK_TOKENS < model.max_model_len:
            log.warning(
                "%s: the KV cache holds %d tokens, so no sequence can be longer, though the model "
                "allows %d: more --kv-memory would help",
                model.name,
                blocks * BLOCK_TOKENS,
                model.max_model_len,
            )
        return blocks

    def _to(self, rank: int, message: ToWorker) -> None:
        try:
            self.socket.send_multipart((b"%d" % rank, encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise WorkerLostError(f"worker {rank} cannot be reached: {error.strerror}") from None

    def _to_all(self, message: ToWorker) -> None:
        frame = encode(message)
        for rank in range(len(self.owned)):
            try:
                self.socket.send_multipart((b"%d" % rank, frame), zmq.NOBLOCK)
            except zmq.ZMQError:
                # Its end is noticed through its pidfd, with a better explanation.
                log.debug("worker %d cannot be reached", rank)


class WorkerReportedError(TpserveError):
    """A worker's own account of what went wrong."""

    def __init__(self, failure: WorkerFailed) -> None:
        super().__init__(f"worker {failure.rank}: {failure.message}")
        self.code = failure.code
        self.fatal = failure.fatal
        self.rank = failure.rank
