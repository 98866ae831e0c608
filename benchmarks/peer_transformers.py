"""Hugging Face transformers, as peers.py measures it. Runs in an environment of its own.

    python peer_transformers.py MODEL_FOLDER --threads 2 --dtype bfloat16

Says {"ready": ...} and then answers each line of input, a JSON object, with another one:

    {"do": "decode", "prompt": [ids], "streams": 8, "tokens": 64}
    {"do": "prefill", "prompt": [ids]}                               to the first token
    -> {"seconds": 1.2, "tokens": 512, "ids": [first stream's]}

Greedy, a loop over the model's forward pass with its own cache: what `generate` does besides is left
out. The seconds of `decode` do not count the prompt.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM


class Engine:
    """A model and its forward pass."""

    def __init__(self, folder: Path, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        # `from_pretrained` leaves it in the mode for inference.
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    @torch.inference_mode()
    def decode(self, prompt: Sequence[int], streams: int, tokens: int) -> dict[str, Any]:
        """All streams continue the same prompt."""
        step = self._step(torch.tensor([list(prompt)] * streams), None)
        last = self._best(step)
        ids = [int(last[0])]
        began = time.perf_counter()
        for _ in range(tokens):
            step = self._step(last, step.past_key_values)
            last = self._best(step)
            ids.append(int(last[0]))
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": streams * tokens, "ids": ids}

    @torch.inference_mode()
    def prefill(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Read a prompt up to the first new token."""
        began = time.perf_counter()
        last = self._best(self._step(torch.tensor([list(prompt)]), None))
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": len(prompt), "ids": [int(last[0])]}

    def _step(self, ids: torch.Tensor, cache: Any) -> Any:
        return self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @staticmethod
    def _best(step: Any) -> torch.Tensor:
        best: torch.Tensor = step.logits[:, -1:].argmax(-1)
        return best


def main() -> None:
    """Answer the lines of standard input."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    engine = Engine(options.model, options.threads, options.dtype)
    print(json.dumps({"ready": f"transformers {transformers.__version__}"}), flush=True)
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
