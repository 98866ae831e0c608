"""OpenVINO GenAI's continuous batching, as peers.py measures it. Runs in the peers' environment.

    python peer_openvino.py MODEL_FOLDER --threads 2

Says {"ready": ...} and then answers each line of input, a JSON object, with another one:

    {"do": "decode", "prompt": [ids], "streams": 8, "tokens": 64}
    {"do": "prefill", "prompt": [ids]}                               to the first token
    -> {"seconds": 1.2, "tokens": 512, "ids": [first stream's]}

Greedy. The seconds of `decode` are those in which all streams are running.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found] # only the peers' environment has it
import openvino_genai  # type: ignore[import-not-found]

CACHE_GIB = 2


class Engine:
    """A model behind the pipeline that batches requests step by step."""

    def __init__(self, folder: Path, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.enable_prefix_caching = False
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(folder), scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self._requests = 0

    def decode(self, prompt: Sequence[int], streams: int, tokens: int) -> dict[str, Any]:
        """All streams continue the same prompt; one that starts first also ends first."""
        handles = [self._add(prompt, tokens + 1) for _ in range(streams)]
        ids: list[list[int]] = [[] for _ in handles]
        while not all(ids):
            self._step(handles, ids)
        before = sum(map(len, ids))
        began = time.perf_counter()
        while all(len(stream) <= tokens for stream in ids):
            self._step(handles, ids)
        seconds = time.perf_counter() - began
        generated = sum(map(len, ids)) - before
        while self._pipeline.has_non_finished_requests():
            self._step(handles, ids)
        return {"seconds": seconds, "tokens": generated, "ids": ids[0]}

    def prefill(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Read a prompt up to the first new token."""
        began = time.perf_counter()
        handle = self._add(prompt, 1)
        ids: list[list[int]] = [[]]
        while not ids[0]:
            self._step([handle], ids)
        return {"seconds": time.perf_counter() - began, "tokens": len(prompt), "ids": ids[0]}

    def _add(self, prompt: Sequence[int], tokens: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        self._requests += 1
        tensor = openvino.Tensor(np.array([prompt], np.int64))
        return self._pipeline.add_request(self._requests, tensor, config)

    def _step(self, handles: Sequence[Any], ids: Sequence[list[int]]) -> None:
        """One forward pass; what it generated goes to the end of each stream's `ids`."""
        self._pipeline.step()
        for handle, stream in zip(handles, ids, strict=True):
            if handle.can_read():
                for output in handle.read().values():
                    stream += output.generated_ids


def main() -> None:
    """Answer the lines of standard input."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    engine = Engine(options.model, options.threads)
    print(json.dumps({"ready": f"openvino-genai {openvino_genai.__version__}"}), flush=True)
    for line in sys.stdin:
        match json.loads(line):
            case {"do": "decode", "prompt": prompt, "streams": count, "tokens": tokens}:
                answer = engine.decode(prompt, count, tokens)
            case {"do": "prefill", "prompt": prompt}:
                answer = engine.prefill(prompt)
            case request:
                sys.exit(f"not understood: {request}")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
