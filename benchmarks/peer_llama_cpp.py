"""llama.cpp, as peers.py measures it. Runs in the peers' own environment, which tpserve is not in.

    python peer_llama_cpp.py quantize SOURCE.gguf TARGET.gguf {q4_0,q8_0}
    python peer_llama_cpp.py serve MODEL.gguf --threads 2 --streams 32 --context 256

`serve` says {"ready": ...} and then answers each line of input, a JSON object, with another one:

    {"do": "decode", "prompt": [ids], "streams": 8, "tokens": 64}   the loop over llama_decode
    {"do": "prefill", "prompt": [ids]}                              the same, to the first token
    {"do": "generate", "prompt": [ids], "tokens": 64}               the binding's own Llama.generate
    -> {"seconds": 1.2, "tokens": 512, "ids": [first stream's]}

Greedy. The seconds of `decode` and `generate` do not count the prompt.
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found] # only the peers' environment has it
import numpy as np
import numpy.typing as npt

FILE_TYPES = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}

# llama.cpp writes pages about each model to standard error.
LOG_NOTHING = llama_cpp.llama_log_callback(lambda level, text, data: None)


def quantize(source: Path, target: Path, kind: str) -> None:
    """As llama.cpp's own command does it: with Q4_0 the head gets 6 bits a weight."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if status:
        sys.exit(f"llama_model_quantize failed with {status}")


class Engine:
    """A model and a context, driven through the C interface."""

    def __init__(self, path: Path, threads: int, streams: int, context: int) -> None:
        # Memory of its own takes huge pages, a mapped file does not.
        load = llama_cpp.llama_model_default_params()
        load.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), load)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context * streams
        params.n_seq_max = streams
        params.n_batch = max(context, streams)
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            sys.exit(f"llama.cpp cannot load {path}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def decode(self, prompt: Sequence[int], streams: int, tokens: int) -> dict[str, Any]:
        """All streams continue the same prompt; `tokens` steps count."""
        memory = self._forget()
        last = self._prefill(prompt)
        for stream in range(1, streams):
            llama_cpp.llama_memory_seq_cp(memory, 0, stream, -1, -1)
        chosen = np.full(streams, last)
        ids = [last]
        began = 0.0
        for step in range(tokens + 1):
            if step == 1:
                began = time.perf_counter()  # the first step carries out the copies as well
            for stream in range(streams):
                self._put(stream, int(chosen[stream]), len(prompt) + step, stream, wanted=True)
            chosen = self._step(streams, streams)
            ids.append(int(chosen[0]))
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": streams * tokens, "ids": ids}

    def prefill(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Read a prompt up to the first new token."""
        self._forget()
        began = time.perf_counter()
        first = self._prefill(prompt)
        return {
            "seconds": time.perf_counter() - began,
            "tokens": len(prompt),
            "ids": [first],
        }

    def _forget(self) -> Any:
        """The KV cache, empty."""
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_clear(memory, True)
        return memory

    def _prefill(self, prompt: Sequence[int]) -> int:
        """Read the prompt into stream 0; the token after it."""
        for i, token in enumerate(prompt):
            self._put(i, token, i, stream=0, wanted=i == len(prompt) - 1)
        return int(self._step(len(prompt), 1)[0])

    def _put(self, i: int, token: int, position: int, stream: int, *, wanted: bool) -> None:
        batch = self._batch
        batch.token[i] = token
        batch.pos[i] = position
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = stream
        batch.logits[i] = wanted

    def _step(self, tokens: int, wanted: int) -> npt.NDArray[np.int64]:
        """The most probable token for each of the `wanted` places of the batch."""
        self._batch.n_tokens = tokens
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status:
            sys.exit(f"llama_decode failed with {status}")
        logits = llama_cpp.llama_get_logits(self._context)
        rows = np.ctypeslib.as_array(logits, shape=(wanted, self._vocab_size))
        chosen: npt.NDArray[np.int64] = rows.argmax(axis=1)
        return chosen


class Binding:
    """The same through `Llama`, as programs in Python use it."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def generate(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        """Continue `prompt` by `tokens` tokens after the one that ends it."""
        self._llama.reset()
        ids = []
        stream = self._llama.generate(list(prompt), temp=0.0, repeat_penalty=1.0)
        ids.append(next(stream))
        began = time.perf_counter()
        for token in stream:
            ids.append(token)
            if len(ids) > tokens:
                break
        return {"seconds": time.perf_counter() - began, "tokens": tokens, "ids": ids}


def serve(path: Path, threads: int, streams: int, context: int) -> None:
    """Answer the lines of standard input."""
    engine = Engine(path, threads, streams, context)
    binding: Binding | None = None
    features = llama_cpp.llama_print_system_info().decode().strip()
    print(
        json.dumps({"ready": f"llama-cpp-python {llama_cpp.__version__}, {features}"}), flush=True
    )
    for line in sys.stdin:
        match json.loads(line):
            case {"do": "decode", "prompt": prompt, "streams": count, "tokens": tokens}:
                answer = engine.decode(prompt, count, tokens)
            case {"do": "prefill", "prompt": prompt}:
                answer = engine.prefill(prompt)
            case {"do": "generate", "prompt": prompt, "tokens": tokens}:
                binding = binding or Binding(path, threads, context)
                answer = binding.generate(prompt, tokens)
            case request:
                sys.exit(f"not understood: {request}")
        print(json.dumps(answer), flush=True)


def main() -> None:
    """One of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    quantizing = commands.add_parser("quantize")
    quantizing.add_argument("source", type=Path)
    quantizing.add_argument("target", type=Path)
    quantizing.add_argument("kind", choices=FILE_TYPES)
    serving = commands.add_parser("serve")
    serving.add_argument("model", type=Path)
    serving.add_argument("--threads", type=int, default=1)
    serving.add_argument("--streams", type=int, default=1)
    serving.add_argument("--context", type=int, default=256)
    options = parser.parse_args()
    llama_cpp.llama_log_set(LOG_NOTHING, ctypes.c_void_p(0))
    if options.command == "quantize":
        quantize(options.source, options.target, options.kind)
    else:
        serve(options.model, options.threads, options.streams, options.context)


if __name__ == "__main__":
    main()
