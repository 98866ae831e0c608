"""CUDA graphs: steps of fixed shapes, launched as one."""

from collections.abc import Callable, Hashable

import torch


class StepGraphs:
    """Functions that are run again and again on the same tensors, by their keys.

    On a GPU the first run of a key is an ordinary one, which also has the libraries make what they
    need; the second is captured, and from then on the capture is replayed. Elsewhere all runs are
    ordinary ones.
    """

    def __init__(self, device: torch.device, capturable: bool) -> None:
        self._capturing = capturable and device.type == "cuda"
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._first: torch.cuda.CUDAGraph | None = None

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """`step` must neither wait for the device nor make tensors that are used outside of it."""
        if not self._capturing:
            step()
            return
        if key not in self._seen:
            self._seen.add(key)
            step()
            return
        if key not in self._graphs:
            self._graphs[key] = self._capture(step)
        graph = self._graphs[key]
        if graph is None:
            step()
        else:
            graph.replay()

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """None: there is no memory for it."""
        graph = torch.cuda.CUDAGraph()
        # One pool for all: only one of them runs at a time.
        pool = None if self._first is None else self._first.pool()
        try:
            # Other threads may load models meanwhile, and allocate.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                step()
        except torch.OutOfMemoryError:
            return None
        self._first = self._first or graph
        return graph
