"""vLLM's engine on a CPU, as peers.py measures it. Runs in the peers' environment.

    python peer_vllm.py MODEL_FOLDER --dtype bfloat16 --streams 32 --context 1024

Says {"ready": ...} and then answers each line of input, a JSON object, with another one:

    {"do": "decode", "prompt": [ids], "streams": 8, "tokens": 64}
    {"do": "prefill", "prompt": [ids]}                               to the first token
    -> {"seconds": 1.2, "tokens": 512, "ids": [first stream's]}

Greedy. The seconds of `decode` are those in which all streams are running. The engine runs in this
process, so that no message between processes is in its times; how many threads it has, and how much
memory for its KV cache, is in its environment (see contestants.py).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO


class Engine:
    """A model behind the engine that batches requests step by step."""

    def __init__(self, folder: Path, dtype: str, streams: int, context: int) -> None:
        from vllm import EngineArgs, LLMEngine  # type: ignore[import-not-found] # after main's setting

        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(folder),
                dtype=dtype,
                max_model_len=context,
                max_num_seqs=streams,
                enable_prefix_caching=False,
            )
        )
        self._requests = 0

    def decode(self, prompt: Sequence[int], streams: int, tokens: int) -> dict[str, Any]:
        """All streams continue the same prompt; one that starts first also ends first."""
        names = [self._add(prompt, tokens + 1) for _ in range(streams)]
        ids: dict[str, list[int]] = {name: [] for name in names}
        while not all(ids.values()):
            self._step(ids)
        before = sum(map(len, ids.values()))
        began = time.perf_counter()
        while all(len(stream) <= tokens for stream in ids.values()):
            self._step(ids)
        seconds = time.perf_counter() - began
        generated = sum(map(len, ids.values())) - before
        while self._engine.has_unfinished_requests():
            self._step(ids)
        return {"seconds": seconds, "tokens": generated, "ids": ids[names[0]]}

    def prefill(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Read a prompt up to the first new token."""
        began = time.perf_counter()
        name = self._add(prompt, 1)
        ids: dict[str, list[int]] = {name: []}
        while not ids[name]:
            self._step(ids)
        return {"seconds": time.perf_counter() - began, "tokens": len(prompt), "ids": ids[name]}

    def _add(self, prompt: Sequence[int], tokens: int) -> str:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self._requests += 1
        name = str(self._requests)
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        return name

    def _step(self, ids: dict[str, list[int]]) -> None:
        """One forward pass; its outputs hold all tokens of a stream so far."""
        for output in self._engine.step():
            stream = next(name for name in ids if _is_request(output.request_id, name))
            ids[stream] = list(output.outputs[0].token_ids)


def _is_request(found: str, name: str) -> bool:
    """Newer versions append something of their own to a request's name."""
    return found == name or found.startswith(f"{name}-")


def _quiet_output() -> TextIO:
    """Standard output for the answers alone: what anything else prints there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def main() -> None:
    """Answer the lines of standard input."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    answers = _quiet_output()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
    engine = Engine(options.model, options.dtype, options.streams, options.context)
    import vllm

    print(json.dumps({"ready": f"vLLM {vllm.__version__}"}), file=answers)
    for line in sys.stdin:
        match json.loads(line):
            case {"do": "decode", "prompt": prompt, "streams": count, "tokens": tokens}:
                answer = engine.decode(prompt, count, tokens)
            case {"do": "prefill", "prompt": prompt}:
                answer = engine.prefill(prompt)
            case request:
                sys.exit(f"not understood: {request}")
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
