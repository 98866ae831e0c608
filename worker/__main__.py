"""A worker process: connect to the coordinator, load shards, run plans, report.

Forked by the fork server, or started as `python -m worker`. Needs no configuration of its own: everything but
its rank and where to connect comes over the socket.
"""

import argparse
import logging
import os
import signal
import time
from collections.abc import Sequence

import torch
import zmq

from shared.errors import CommError, MemoryPlanError, TpserveError
from shared.processes import die_with
from shared.sockets import dealer
from shared.worker_messages import (
    Allocated,
    AllocateKV,
    CommReady,
    FromWorker,
    Hello,
    LoadModel,
    SetUp,
    ShutDown,
    StepPlan,
    StepResult,
    ToWorker,
    Unloaded,
    UnloadModel,
    WorkerFailed,
    WorkerTimes,
    decode_to_worker,
    encode,
)
from worker.comm.device import Accelerator, open_collectives
from worker.comm.open import open_communicator
from worker.device import describe as describe_device
from worker.device import device_of
from worker.loading import Loading
from worker.native.api import Pool, native_library
from worker.ops.choose import describe, device_kernels
from worker.runner import Runner, StartedStep, TimedCommunicator

log = logging.getLogger("worker")

_TIMES_INTERVAL_S = 1.0
_REST_MS = 20
"""Without an order for so long, a worker tells what its last steps have added to its times."""


class Worker:
    """One rank of one epoch."""

    def __init__(self, rank: int, epoch: int, shm_fd: int | None, socket: zmq.SyncSocket) -> None:
        self._rank, self._epoch, self._shm_fd = rank, epoch, shm_fd
        self._socket = socket
        self._library = native_library()
        self._comm: TimedCommunicator | None = None
        self._runner: Runner | None = None
        self._loading: Loading | None = None
        self._begun: StartedStep | None = None
        """A plan that a device carries out, and that is to be reported."""
        self._requests: dict[tuple[str, int], str] = {}
        """Ids of the requests in the slots of each model."""
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._compute_s = self._comm_s = self._told_at = 0.0
        self._resting = True
        """All times are told, and nothing has been computed since."""

    def run(self) -> None:
        """Serve the coordinator until it says shut down."""
        self._send(
            Hello(
                rank=self._rank,
                epoch=self._epoch,
                pid=os.getpid(),
            )
        )
        while True:
            order: ToWorker | None = None
            try:
                if self._begun is not None and not self._socket.poll(0):
                    self._finish_step()  # there is no plan to begin meanwhile
                order = self._next_order()
                if isinstance(order, ShutDown):
                    return
                self._send(self._obey(order))
            except TpserveError as error:
                fatal = isinstance(error, CommError)
                log.error("%s: %s", self._name(order), error)
                # A KV cache that cannot be had is a model that cannot be loaded.
                model = order.model if isinstance(order, AllocateKV) else ""
                self._fail(error.code, error.message, fatal, model)
                if fatal:
                    return
            except (RuntimeError, MemoryError) as error:
                # What torch raises when memory runs out; the coordinator tells the user.
                log.exception("%s", self._name(order))
                on_device = isinstance(error, torch.OutOfMemoryError)
                code = MemoryPlanError.code if on_device else TpserveError.code
                self._fail(code, f"{type(error).__name__}: {error}", fatal=True)
                return

    def _next_order(self) -> ToWorker:
        """Wait for it; meanwhile pass on what a load has to tell."""
        while self._loading is not None:
            readable = dict(self._poller.poll())
            if self._loading.wake_fd in readable:
                self._hear_of_loading(self._loading)
            if self._socket in readable:
                break
        try:
            return decode_to_worker(self._socket.recv())
        except zmq.Again:
            self._rest()
            return decode_to_worker(self._socket.recv())

    def _rest(self) -> None:
        self._tell_times()
        self._resting = True
        self._socket.rcvtimeo = -1

    def _hear_of_loading(self, loading: Loading) -> None:
        for report in loading.reports():
            if not loading.cancelled:
                self._send(report)
        if loading.ended:
            self._poller.unregister(loading.wake_fd)
            loading.close()
            self._loading = None
            if loading.cancelled:
                self._send(self._unload(loading.model))

    def _load(self, order: LoadModel) -> None:
        assert self._loading is None, "the coordinator loads one model after the other"
        self._loading = Loading(self._ready_runner, order, self._rank, self._epoch)
        self._poller.register(self._loading.wake_fd, zmq.POLLIN)

    def _unload(self, model: str) -> Unloaded:
        self._ready_runner.unload(model)
        return Unloaded(rank=self._rank, epoch=self._epoch, model=model)

    def close(self) -> None:
        """Leave the collectives."""
        if self._comm is not None:
            self._comm.close()

    def _obey(self, order: ToWorker) -> FromWorker | None:
        if not isinstance(order, StepPlan):
            self._finish_step()
        match order:
            case StepPlan():
                self._step(order)
                return None
            case LoadModel():
                self._load(order)
                return None
            case UnloadModel():
                if self._loading is not None and self._loading.model == order.model:
                    self._loading.cancel()  # the answer comes when it has ended
                    return None
                return self._unload(order.model)
            case AllocateKV():
                self._ready_runner.allocate(order)
                return Allocated(rank=self._rank, epoch=self._epoch, model=order.model)
            case SetUp():
                kernels = self._set_up(order)
                return CommReady(rank=self._rank, epoch=self._epoch, kernels=kernels)
            case ShutDown():
                return None

    def _step(self, plan: StepPlan) -> None:
        """Begin a plan, then report the one before, whose tokens the device has had time for."""
        for sequence in plan.sequences:
            if sequence.request:
                self._requests[plan.model, sequence.slot] = sequence.request
        before, runner = self._begun, self._ready_runner
        if before is not None and not runner.can_follow(plan, before):
            self._finish_step()
            before = None
        began, in_comm = time.perf_counter(), self._in_comm_s()
        try:
            started = runner.begin(plan, before)
        except MemoryPlanError as error:
            self._finish_step()
            log.error("%s: %s", self._name(plan), error)
            self._send(
                StepResult(
                    rank=self._rank,
                    epoch=plan.epoch,
                    step=plan.step,
                    tokens=[],
                    out_of_memory=error.message,
                )
            )
            return
        self._account(time.perf_counter() - began, self._in_comm_s() - in_comm)
        self._finish_step()
        self._begun = started
        if started.under_way is None:
            self._finish_step()

    def _finish_step(self) -> None:
        """Wait for the plan that was begun, if there is one, and report it."""
        if self._begun is None:
            return
        plan = self._begun.plan
        began, in_comm = time.perf_counter(), self._in_comm_s()
        made = self._begun.finish()
        self._begun = None
        self._account(time.perf_counter() - began, self._in_comm_s() - in_comm)
        if self._rank != 0:
            return  # every rank has the same tokens; one report is enough
        self._send(
            StepResult(
                rank=self._rank,
                epoch=plan.epoch,
                step=plan.step,
                tokens=made.sampled.tokens,
                logprobs=made.sampled.logprobs,
                means=[mean.astype("<f4").tobytes() for mean in made.means],
            )
        )

    def _in_comm_s(self) -> float:
        assert self._comm is not None, "set-up comes before steps"
        return self._comm.seconds + self._ready_runner.comm_seconds

    def _account(self, elapsed_s: float, in_comm_s: float) -> None:
        """Add up where the time goes, and tell it once a second and before a rest."""
        self._comm_s += in_comm_s
        self._compute_s += elapsed_s - in_comm_s
        if self._resting:
            self._resting = False
            self._socket.rcvtimeo = _REST_MS
        if time.monotonic() > self._told_at + _TIMES_INTERVAL_S:
            self._tell_times()

    def _tell_times(self) -> None:
        self._told_at = time.monotonic()
        self._send(
            WorkerTimes(
                rank=self._rank,
                epoch=self._epoch,
                compute_s=self._compute_s,
                comm_s=self._comm_s,
            )
        )

    def _set_up(self, order: SetUp) -> str:
        """Join the other ranks. Returns what this one computes with."""
        torch.set_num_threads(order.threads)
        owned = [range(start, stop) for start, stop in order.comm.owned]
        crowded = order.threads * len(owned) > len(os.sched_getaffinity(0))
        if order.core is not None:
            cores = sorted(os.sched_getaffinity(0))
            mine = {cores[(order.core + i) % len(cores)] for i in range(order.threads)}
            os.sched_setaffinity(0, mine)
        self._comm = TimedCommunicator(open_communicator(order.comm, self._shm_fd, crowded))
        pool, accelerator = None, None
        if order.device == "cuda":
            device = device_of(order.comm.rank, len(owned))
            collectives = open_collectives(order.comm, self._comm, device)
            accelerator = Accelerator(device, collectives, order.deterministic)
            name = device_kernels(device, order.deterministic).name
            kernels = f"{name} on {describe_device(device)}"
        else:
            kernels = describe(self._library)
            if self._library is not None:
                pool = Pool(self._library, order.threads, crowded=crowded)
        self._runner = Runner(self._comm, owned, order.virtual_shards, pool, accelerator)
        self._comm.barrier()
        return kernels

    @property
    def _ready_runner(self) -> Runner:
        assert self._runner is not None, "set-up comes first"
        return self._runner

    def _send(self, message: FromWorker | None) -> None:
        if message is not None:
            self._socket.send(encode(message))

    def _name(self, order: ToWorker | None) -> str:
        """For the log: a step as the coordinator's log calls it, and whose it is."""
        if order is None:
            return "the step before"
        if isinstance(order, StepPlan):
            requests = dict.fromkeys(self._requests[order.model, s.slot] for s in order.sequences)
            return (
                f"epoch {order.epoch}, step {order.step} of {order.model} for {', '.join(requests)}"
            )
        return type(order).__name__

    def _fail(self, code: str, message: str, fatal: bool, model: str = "") -> None:
        self._send(
            WorkerFailed(
                rank=self._rank,
                epoch=self._epoch,
                code=code,
                message=message,
                fatal=fatal,
                model=model,
            )
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the worker process. `arguments`: None: those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m worker")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--epoch", type=int, required=True)
    parser.add_argument("--connect", required=True, help="the coordinator's address for workers")
    parser.add_argument("--shm-fd", type=int, help="inherited descriptor of the shared memory")
    parser.add_argument("--parent", type=int, required=True, help="the coordinator's process id")
    parser.add_argument("--log-level", default="info")
    args = parser.parse_args(arguments)
    die_with(args.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's to handle
    logging.basicConfig(
        level=args.log_level.upper(),
        format=f"%(asctime)s %(levelname)s worker {args.rank}: %(message)s",
    )
    context = zmq.Context()
    socket = dealer(context, args.connect, identity=b"%d" % args.rank)
    worker = Worker(args.rank, args.epoch, args.shm_fd, socket)
    try:
        worker.run()
    finally:
        worker.close()
        # What was sent last (a failure's reason) must still go out.
        context.destroy(linger=1000)


if __name__ == "__main__":
    main()
