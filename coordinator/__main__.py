"""`tpserve serve`: read the settings, wire the parts, run until a signal, clean up."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack

import zmq

from coordinator.cluster import Cluster
from coordinator.engine import Engine
from coordinator.frontend import Frontend
from coordinator.gateway_process import GatewayProcess, listen
from coordinator.planner import check_fits, plan_memory
from coordinator.run_dir import RunDir
from coordinator.served_model import fetch_weights, open_model
from coordinator.store import Store
from coordinator.supervisor import WORKER_COMMAND
from shared.config import Settings, argument_parser, load_settings
from shared.errors import ConfigError, MemoryPlanError, ModelError, TpserveError

log = logging.getLogger("coordinator")

EXIT_FAILED = 1
EXIT_USAGE = 2
_USERS_ERRORS = ConfigError | ModelError | MemoryPlanError


def main() -> int:
    """Entry of the coordinator process; the exit code."""
    flags = argument_parser().parse_args()
    try:
        sourced = load_settings(flags, os.environ)
        if "print_config" in flags:
            print(sourced.describe())
            return 0
        settings = sourced.settings
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )
        serve(settings, listener=listen(sourced, os.environ))
    except TpserveError as error:
        print(f"tpserve: error: {error.message}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, _USERS_ERRORS) else EXIT_FAILED
    return 0


def serve(
    settings: Settings,
    worker_command: Sequence[str] = WORKER_COMMAND,
    listener: socket.socket | None = None,
) -> None:
    """Run a server until SIGINT or SIGTERM. Raises TpserveError.

    listener: where the HTTP API is to be; None: nowhere.
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
        cluster = Cluster(settings, context, run_dir.path, on_workers, worker_command)
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


if __name__ == "__main__":
    sys.exit(main())
