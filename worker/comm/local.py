"""The collectives of a world of one rank, which owns all virtual shards: nothing is sent."""

from collections.abc import Sequence

from shared.errors import ConfigError
from shared.worker_messages import CommSetup
from worker.comm.base import Row, TreeCommunicator

_BLOCK_BYTES = 1 << 20


class LocalCommunicator(TreeCommunicator):
    """The whole reduction tree is local."""

    def __init__(self, setup: CommSetup) -> None:
        if len(setup.owned) != 1:
            raise ConfigError(
                f"--comm local is for one worker, not for {len(setup.owned)}; use --comm shm"
            )
        super().__init__(setup, _BLOCK_BYTES)

    def _all_gather(
        self,
        operation: str,
        rows: Sequence[Row],
        rows_per_rank: tuple[int, ...],
        parts: Sequence[slice] | None = None,
    ) -> Sequence[Row]:
        return rows

    def close(self) -> None:
        """Nothing is held."""
