"""Loads one model in a thread of its own, so that the worker goes on with the steps of others."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue

import torch

from shared.errors import MemoryPlanError, TpserveError
from shared.worker_messages import FromWorker, Loaded, LoadModel, LoadProgress, WorkerFailed
from worker.runner import Runner

log = logging.getLogger("worker")

_REPORT_INTERVAL_S = 0.2


class LoadCancelledError(Exception):
    """The model is not wanted any more."""


class Loading:
    """A load that is under way. Its thread talks to the worker's loop through `reports`."""

    def __init__(self, runner: Runner, order: LoadModel, rank: int, epoch: int) -> None:
        self.model = order.model
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Becomes readable when there are reports, or the thread has ended."""
        self._runner, self._order, self._rank, self._epoch = runner, order, rank, epoch
        self._reports: SimpleQueue[FromWorker] = SimpleQueue()
        self._cancelled = self._ended = False
        self._told_at = 0.0
        self._thread = threading.Thread(target=self._run, name="loading", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether it has made its last report."""
        return self._ended

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants the model any more."""
        return self._cancelled

    def cancel(self) -> None:
        """Have it end soon, without a report."""
        self._cancelled = True

    def reports(self) -> Iterator[FromWorker]:
        """What it has to tell since the last call."""
        os.eventfd_read(self.wake_fd)
        while True:
            try:
                yield self._reports.get_nowait()
            except Empty:
                return

    def close(self) -> None:
        """Once it has ended."""
        self._thread.join()
        os.close(self.wake_fd)

    def _run(self) -> None:
        rank, epoch, model = self._rank, self._epoch, self.model
        report: FromWorker | None = None
        try:
            weights, block = self._runner.load(self._order, self._progress)
            report = Loaded(
                rank=rank,
                epoch=epoch,
                model=model,
                weight_bytes=weights,
                kv_block_bytes=block,
                free_bytes=self._runner.free_bytes(),
            )
        except LoadCancelledError:
            log.info("rank %d: loading %s was given up", rank, model)
        except TpserveError as error:
            report = self._failed(error.code, error.message)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
            report = self._failed(
                MemoryPlanError.code,
                f"{model} does not fit into the device's memory ({reason}): use a smaller --dtype, more"
                " workers, or unload a model",
            )
        except (RuntimeError, MemoryError, OSError) as error:
            # What torch and the library raise when memory runs out.
            log.exception("rank %d: loading %s", rank, model)
            report = self._failed(TpserveError.code, f"{type(error).__name__}: {error}")
        if report is not None:
            self._reports.put(report)
        self._ended = True
        os.eventfd_write(self.wake_fd, 1)

    def _failed(self, code: str, message: str) -> WorkerFailed:
        log.error("rank %d: %s", self._rank, message)
        return WorkerFailed(
            rank=self._rank,
            epoch=self._epoch,
            code=code,
            message=message,
            fatal=False,
            model=self.model,
        )

    def _progress(self, weight_bytes: int) -> None:
        if self._cancelled:
            raise LoadCancelledError
        now = time.monotonic()
        if now < self._told_at + _REPORT_INTERVAL_S:
            return
        self._told_at = now
        self._reports.put(
            LoadProgress(
                rank=self._rank, epoch=self._epoch, model=self.model, weight_bytes=weight_bytes
            )
        )
        os.eventfd_write(self.wake_fd, 1)
