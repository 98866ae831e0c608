"""A worker that computes nothing: each step takes --step-ms, and its tokens are made up.

Shows what the coordinator costs: with it, no server can do more than 1000 / step-ms steps a second.
"""

import argparse
import itertools
import os
import sys
import time
from contextlib import closing

import zmq

from coordinator.server import serve
from coordinator.supervisor import Supervisor
from shared.config import argument_parser, load_settings
from shared.sockets import dealer
from shared.worker_messages import (
    Allocated,
    AllocateKV,
    CommReady,
    Hello,
    Loaded,
    LoadModel,
    SetUp,
    ShutDown,
    StepPlan,
    StepResult,
    decode_to_worker,
    encode,
)


def work(rank: int, epoch: int, address: str, step_s: float) -> None:
    """Answer the coordinator as a worker does."""
    socket = dealer(zmq.Context(), address, identity=b"%d" % rank)
    socket.send(encode(Hello(rank=rank, epoch=epoch, pid=os.getpid())))
    tokens = itertools.cycle(range(100, 200))
    while True:
        match decode_to_worker(socket.recv()):
            case SetUp():
                socket.send(encode(CommReady(rank=rank, epoch=epoch, kernels="none")))
            case LoadModel(model=model):
                loaded = Loaded(
                    rank=rank,
                    epoch=epoch,
                    model=model,
                    weight_bytes=0,
                    kv_block_bytes=1024,
                    free_bytes=1 << 34,
                )
                socket.send(encode(loaded))
            case AllocateKV(model=model):
                socket.send(encode(Allocated(rank=rank, epoch=epoch, model=model)))
            case StepPlan() as plan:
                until = time.perf_counter() + step_s * plan.passes
                sampled = plan.passes * sum(s.sampling is not None for s in plan.sequences)
                result = StepResult(
                    rank=rank,
                    epoch=epoch,
                    step=plan.step,
                    tokens=list(itertools.islice(tokens, sampled)),
                )
                frame = encode(result)
                while time.perf_counter() < until:
                    pass
                if rank == 0:
                    socket.send(frame)
            case ShutDown():
                return


def main() -> None:
    """`serve STEP_MS FLAGS...`: a server of stub workers. `work STEP_MS ...`: one of them."""
    role, step_ms, *rest = sys.argv[1:]
    if role == "serve":
        settings = load_settings(
            argument_parser().parse_args(["--database", "none", *rest]), os.environ
        ).settings
        command = (sys.executable, __file__, "work", step_ms)
        with closing(Supervisor(settings.log_level, command, fork_server_command=None)) as workers:
            serve(settings, workers, listener=None)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int)
    parser.add_argument("--epoch", type=int)
    parser.add_argument("--connect")
    args, _ = parser.parse_known_args(rest)
    work(args.rank, args.epoch, args.connect, float(step_ms) / 1000)


if __name__ == "__main__":
    main()
