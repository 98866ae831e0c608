from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.client.peer import Peer

MakePeer = Callable[..., Peer]


@pytest.fixture
def make_peer() -> Iterator[MakePeer]:
    """Starts servers that are closed when the test ends."""
    with ExitStack() as stack:

        def make(*args: Any, **kwargs: Any) -> Peer:
            peer = Peer(*args, **kwargs)
            stack.callback(peer.close)
            return peer

        yield make
