"""The server: wire the parts, run until a signal, clean up."""

import logging
import signal
import socket
from contextlib import ExitStack

import zmq

from coordinator.cluster import Cluster
from coordinator.engine import Engine
from coordinator.frontend import Frontend
from coordinator.gateway_process import GatewayProcess
from coordinator.planner import check_fits, plan_memory
from coordinator.run_dir import RunDir
from coordinator.served_model import fetch_weights, open_model
from coordinator.store import Store
from coordinator.supervisor import Supervisor
from shared.config import Settings
from shared.errors import ConfigError

log = logging.getLogger("coordinator")


def serve(
    settings: Settings,
    supervisor: Supervisor,
    listener: socket.socket | None,
) -> None:
    """Run a server until SIGINT or SIGTERM. Raises TpserveError.

    supervisor: is closed by the caller. listener: where the HTTP API is to be; None: nowhere.
    """
    models = {name: open_model(name, path, settings) for name, path in settings.model.items()}
    plans = [plan_memory(m.config, m.on_workers, settings) for m in models.values()]
    check_fits(plans, starting=True)
    for model in models.values():
        fetch_weights(model, settings)
    with ExitStack() as cleanup:
        context = zmq.Context()
        cleanup.callback(context.term)
        frontend = Frontend(context, settings.listen)
        cleanup.callback(frontend.close)
        run_dir = RunDir(settings.run_dir)
        cleanup.callback(run_dir.close)
        on_workers = [model.on_workers for model in models.values()]
        cluster = Cluster(settings, context, run_dir.path, on_workers, supervisor)
        cleanup.callback(cluster.close)
        url = None
        if listener is not None:
            gateway = GatewayProcess(listener, frontend.address, settings).start()
            cleanup.callback(gateway.stop)
            url = gateway.url
        engine = Engine(settings, models, frontend, cluster, _open_store(settings), url)
        cleanup.callback(engine.close, "the server is stopping")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: engine.stop())
        engine.run()


def _open_store(settings: Settings) -> Store | None:
    """The database of sessions and jobs; None: there is none. Raises ConfigError when the one asked for fails."""
    if settings.database == "none":
        return None
    try:
        return Store(settings.database)
    except ConfigError as error:
        if settings.database != "auto":
            raise
        # Nobody asked for it: stories and chats do not need it.
        log.warning("no sessions and no jobs are kept: %s", error.message)
        return None
