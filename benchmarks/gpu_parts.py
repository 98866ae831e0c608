"""What `benchmarks.gpu` measures besides the decoding of its own driver: peers, a server, and errors."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import server
from client.zmq_client import Client
from shared.messages import Precision
from shared.model_config import read_model_config
from shared.precision import kv_precision
from worker.comm.device import Accelerator
from worker.compare.measures import difference
from worker.compare.observe import observe
from worker.compare.text import read_text

_STORIES = 5


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """How long `work` takes, until the device is done."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    """Until it has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def transformers_rate(
    folder: Path, device: torch.device, prompt_tokens: int, tokens: int, compiled: bool
) -> float:
    """Tokens per second of its greedy generate for one sequence, bf16, sdpa.

    compiled: with a static cache, for which it compiles its forward pass on a GPU.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model.to(device)
    prompt = torch.arange(3, 3 + prompt_tokens, device=device)[None]
    ways = {"cache_implementation": "static"} if compiled else {}

    def generate() -> None:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            **ways,
        )

    for _ in range(2 if compiled else 1):
        generate()
    return tokens / min(seconds(device, generate) for _ in range(3))


def server_rates(folder: Path, flags: list[str], new_tokens: int) -> dict[str, float]:
    """A whole server, one story at a time over ZeroMQ, greedy.

    `tokens_per_s` of the best story, and `waiting`: the share of the time of all stories in which the
    worker had nothing to do, which is what coordinator, sockets and client add.
    """
    rates = []
    with (
        server(folder, ["--device", "cuda", *flags]) as address,
        Client(address, silence_s=300) as client,
    ):

        def story() -> tuple[int, float]:
            began = time.perf_counter()
            done = client.story(
                "Once upon a time", temperature=0, max_tokens=new_tokens, ignore_eos=True
            ).result()
            return done.usage.completion_tokens, time.perf_counter() - began

        for _ in range(2):
            story()
        time.sleep(0.2)  # a worker at rest has told all its times
        before, elapsed = client.status().workers[0].compute_s, 0.0
        for _ in range(_STORIES):
            tokens, took = story()
            elapsed += took
            rates.append(tokens / took)
        time.sleep(0.2)
        busy = client.status().workers[0].compute_s - before
    return {"tokens_per_s": max(rates), "waiting": 1 - busy / elapsed}


def layer_errors(
    folder: Path, dtypes: list[Precision], accelerator: Accelerator, most_tokens: int
) -> dict[str, dict[str, object]]:
    """Relative L2 error of each precision against fp32 on the same device, after each layer.

    As `tpserve compare` measures it, with its bundled text.
    """
    text = read_text(folder, read_model_config(folder), None, most_tokens)
    exact = observe(folder, "fp32", "fp32", text, None, accelerator)
    errors: dict[str, dict[str, object]] = {}
    for dtype in dtypes:
        kv_dtype = kv_precision("auto", dtype)
        ours = observe(folder, dtype, kv_dtype, text, None, accelerator)
        found = difference(ours, exact, dtype, kv_dtype)
        errors[dtype] = {
            "layers": found.layer_errors,
            "logits": found.logits_error,
            "greedy_agreement": found.greedy_agreement,
        }
    return errors
