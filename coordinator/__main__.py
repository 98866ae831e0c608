"""`tpserve serve`: read the settings, start what takes longest, then the server itself."""

import logging
import os
import sys
from contextlib import closing

from coordinator.gateway_process import listen
from coordinator.supervisor import Supervisor
from shared.config import AUTO_WORKERS, argument_parser, load_settings
from shared.errors import ConfigError, MemoryPlanError, ModelError, TpserveError

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
        logging.basicConfig(
            level=sourced.settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )
        logging.getLogger("alembic").setLevel(logging.WARNING)  # it names all of its plugins
        listener = listen(sourced, os.environ)
        settings = sourced.settings
        if settings.workers == AUTO_WORKERS:
            # Before the fork server is busy: that would disturb what is measured.
            from coordinator.choose import settle

            settings = settle(sourced)
        with closing(Supervisor(settings.log_level)) as supervisor:
            # Takes a second to import, while the fork server imports torch.
            from coordinator.server import serve

            serve(settings, supervisor, listener)
    except TpserveError as error:
        print(f"tpserve: error: {error.message}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, _USERS_ERRORS) else EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
