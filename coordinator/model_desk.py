"""Models that come and go while the server runs: `load` and `unload` from request to answer.

One model is loaded at a time, the others wait their turn. Its files are opened in a thread, its
weights read by threads of the workers, and a token is computed before it takes jobs; models that are
served go on meanwhile. A load that fails leaves nothing behind.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from coordinator.cluster import Cluster, ModelOnWorkers
from coordinator.cluster import Load as LoadOnWorkers
from coordinator.desk import Desk
from coordinator.frontend import failed
from coordinator.planner import check_fits, plan_memory
from coordinator.served_model import ServedModel, fetch_weights, open_model
from shared.config import Settings
from shared.errors import InvalidRequestError, ModelNotFoundError, TpserveError, UnloadedError
from shared.messages import Load, Loading, LoadPhase, ModelGone, ModelReady, RankProgress, Unload

log = logging.getLogger("coordinator.models")

_REPORT_INTERVAL_S = 0.25


@dataclass(eq=False)
class _Arrival:
    """A model that is being loaded."""

    client: bytes
    request: Load
    began: float = field(default_factory=time.monotonic)
    opened: ServedModel | TpserveError | None = None
    """What its thread has made of its files."""
    planned_bytes: list[int] = field(default_factory=list)
    on_workers: LoadOnWorkers | None = None
    tested: bool = False
    """Its test job is under way."""
    unloads: list[tuple[bytes, Unload]] = field(default_factory=list)
    """Who has asked meanwhile that it be given up."""


@dataclass(eq=False)
class _Departure:
    """A model that is being unloaded."""

    model: ServedModel
    unloads: list[tuple[bytes, Unload]]
    """Who has asked for it."""
    on_workers: LoadOnWorkers | None = None


class ModelDesk:
    """See the module. Belongs to the engine's thread."""

    def __init__(
        self,
        settings: Settings,
        models: dict[str, ServedModel],
        cluster: Cluster,
        desk: Desk,
        start: Callable[[ServedModel], None],
        stop: Callable[[ServedModel], None],
    ) -> None:
        """models: those that are served; changed here. start, stop: steps of a model."""
        self._settings, self._models = settings, models
        self._cluster, self._desk = cluster, desk
        self._start, self._stop = start, stop
        self._arrivals: deque[_Arrival] = deque()
        self._departures: dict[str, _Departure] = {}
        self._next_report = 0.0
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Becomes readable when `advance` has something to do."""

    def load(self, client: bytes, request: Load) -> None:
        """Take a request. Raises InvalidRequestError when the name is taken."""
        name = request.name
        if self._arrival(name) is not None:
            raise InvalidRequestError(f"a model named {name!r} is being loaded already")
        if name in self._models:
            state = "being unloaded" if name in self._departures else "loaded already"
            raise InvalidRequestError(
                f"a model named {name!r} is {state}: unload it first, or choose another name"
            )
        arrival = _Arrival(client, request)
        self._arrivals.append(arrival)
        if len(self._arrivals) == 1:
            self._open(arrival)
        self._tell(arrival)

    def unload(self, client: bytes, request: Unload) -> None:
        """Take a request; a load that is under way is given up.

        Raises ModelNotFoundError.
        """
        if (arrival := self._arrival(request.name)) is not None:
            arrival.unloads.append((client, request))
            self.advance()
            return
        model = self._models.get(request.name)
        if model is None:
            loaded = ", ".join(sorted(self._models)) or "none"
            raise ModelNotFoundError(f"model {request.name!r} is not loaded; loaded are: {loaded}")
        if request.name not in self._departures:
            self._departures[request.name] = _Departure(model, [])
            model.state = "unloading"
        self._departures[request.name].unloads.append((client, request))
        if request.force:
            reason = f"model {request.name!r} was unloaded"
            self._desk.fail_jobs_of(model.name, UnloadedError(reason))
        self.advance()

    def advance(self) -> None:
        """Carry on what can be carried on."""
        if self._arrivals:
            for arrival in [a for a in self._arrivals if a.unloads]:
                self._cancel(arrival)
        if self._arrivals:
            try:
                self._advance_arrival(self._arrivals[0])
            except TpserveError as error:
                self._give_up(self._arrivals[0], error)
        if self._cluster.ready:
            for departure in list(self._departures.values()):
                self._advance_departure(departure)

    def report_progress(self) -> None:
        """Tell the clients that wait, a few times a second."""
        if self._arrivals and time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + _REPORT_INTERVAL_S
            for arrival in self._arrivals:
                self._tell(arrival)

    @property
    def busy(self) -> bool:
        """Whether progress has to be told."""
        return bool(self._arrivals)

    def workers_lost(self, error: TpserveError) -> None:
        """The workers are started again, with the models that were served.

        Those that finish their jobs before they are unloaded come back for that.
        """
        for arrival in self._arrivals:
            self._cluster.models.pop(arrival.request.name, None)
            self._answer_failed(arrival, error)
        self._arrivals.clear()
        for departure in [d for d in self._departures.values() if d.on_workers is not None]:
            self._gone(departure)

    # --- coming -----------------------------------------------------------------------------------

    def _arrival(self, name: str) -> _Arrival | None:
        return next((a for a in self._arrivals if a.request.name == name), None)

    def _cancel(self, arrival: _Arrival) -> None:
        """As far as it can be given up now; a test takes only a moment and is waited for."""
        error = UnloadedError(f"loading {arrival.request.name!r} was given up")
        if arrival is not self._arrivals[0]:
            self._arrivals.remove(arrival)
            self._answer_failed(arrival, error)
        elif arrival.opened is not None and arrival.on_workers is None:
            self._give_up(arrival, error)
        elif arrival.on_workers is not None and not arrival.on_workers.ended:
            self._cluster.give_up(arrival.on_workers, error)

    def _open(self, arrival: _Arrival) -> None:
        def run() -> None:
            try:
                arrival.opened, arrival.planned_bytes = self._opened(arrival.request)
            except TpserveError as error:
                arrival.opened = error
            except Exception as error:
                log.exception("opening %s", arrival.request.path)
                arrival.opened = TpserveError(f"{arrival.request.path} cannot be opened: {error}")
            os.eventfd_write(self.wake_fd, 1)

        threading.Thread(target=run, name="opening", daemon=True).start()

    def _opened(self, request: Load) -> tuple[ServedModel, list[int]]:
        """In a thread: everything but the weights."""
        wishes = {
            name: value
            for name in ("dtype", "kv_dtype", "max_model_len")
            if (value := getattr(request, name)) is not None
        }
        settings = msgspec.structs.replace(self._settings, **wishes)
        model = open_model(request.name, request.path, settings)
        plan = plan_memory(model.config, model.on_workers, settings)
        check_fits([plan])
        fetch_weights(model, settings)
        return model, plan.weight_bytes

    def _advance_arrival(self, arrival: _Arrival) -> None:
        if arrival.opened is None:
            return
        if isinstance(arrival.opened, TpserveError):
            raise arrival.opened
        model = arrival.opened
        if arrival.on_workers is None:
            self._models[model.name] = model
            arrival.on_workers = self._cluster.load(model.on_workers)
        elif not arrival.on_workers.ended:
            return
        elif arrival.on_workers.error is not None:
            raise arrival.on_workers.error
        elif not arrival.tested:
            arrival.tested = True
            self._start(model)
            self._desk.start_test_job(model)
        elif not self._desk.test_pending(model.name):
            if (problem := self._desk.test_problems.pop(model.name, None)) is not None:
                self._remove(model)
                raise problem
            model.state = "ready"
            seconds = time.monotonic() - arrival.began
            self._desk.publish(
                arrival.client,
                ModelReady(id=arrival.request.id, model=model.info(), seconds=seconds),
            )
            log.info("model %s is ready after %.1f s", model.name, seconds)
            self._next_arrival()
            for client, request in arrival.unloads:
                self.unload(client, request)

    def _give_up(self, arrival: _Arrival, error: TpserveError) -> None:
        self._answer_failed(arrival, error)
        self._next_arrival()

    def _answer_failed(self, arrival: _Arrival, error: TpserveError) -> None:
        name = arrival.request.name
        log.error("model %s was not loaded: %s", name, error.message)
        self._models.pop(name, None)
        self._desk.publish(arrival.client, failed(arrival.request.id, error))
        for client, request in arrival.unloads:
            self._desk.publish(client, ModelGone(id=request.id, model=name, freed_bytes=0))

    def _next_arrival(self) -> None:
        self._arrivals.popleft()
        if self._arrivals:
            self._open(self._arrivals[0])

    def _tell(self, arrival: _Arrival) -> None:
        load, ranks = arrival.on_workers, []
        if load is not None:
            spent = time.monotonic() - load.started_at
            for rank, done in enumerate(load.bytes_done):
                total = max(done, arrival.planned_bytes[rank])
                left = spent * (total - done) / done if done else None
                ranks.append(RankProgress(rank, done, total, left))
        phase: LoadPhase = "testing" if arrival.tested else "reading"
        if load is None:
            phase = "opening" if arrival is self._arrivals[0] else "waiting"
        event = Loading(id=arrival.request.id, model=arrival.request.name, phase=phase, ranks=ranks)
        self._desk.publish(arrival.client, event)

    # --- going ------------------------------------------------------------------------------------

    def _advance_departure(self, departure: _Departure) -> None:
        model = departure.model
        if departure.on_workers is None and not self._desk.has_jobs(model.name):
            departure.on_workers = self._remove(model)
        if departure.on_workers is not None and departure.on_workers.ended:
            self._gone(departure)

    def _remove(self, model: ServedModel) -> LoadOnWorkers:
        """Take a model that has no jobs out of the engine and the workers."""
        self._stop(model)
        return self._cluster.unload(model.on_workers)

    def _gone(self, departure: _Departure) -> None:
        model = departure.model
        self._models.pop(model.name, None)
        del self._departures[model.name]
        freed = _held(model.on_workers)
        log.info("model %s was unloaded: %.1f MB given back", model.name, freed / 1e6)
        for client, request in departure.unloads:
            gone = ModelGone(id=request.id, model=model.name, freed_bytes=freed)
            self._desk.publish(client, gone)


def _held(model: ModelOnWorkers) -> int:
    """Bytes of weights and KV memory, over all workers."""
    return sum(model.weight_bytes) + sum(model.kv_bytes)
