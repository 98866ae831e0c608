"""Every architecture that is supported, against transformers: a few layers of random weights.

What is measured is recorded with the results; docs/models_table.py makes the table of docs/models.md
from it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from shared.messages import Precision
from shared.model_config import read_model_config
from tests.worker.forward import TOLERANCE, logits_of, relative
from worker.comm.base import Floats
from worker.native.api import native_library

LENGTH = 200
"""Of the prompt: longer than the contexts that the cases were "trained" for."""
SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
TRAINED = 64


def rope(kind: str, **parameters: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


CASES: dict[str, Callable[[], PreTrainedConfig]] = {
    "Llama 2": lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 6}),
    "Llama 3": lambda: LlamaConfig(**SIZES | rope("default", rope_theta=500000.0)),
    "Llama 3.1, 3.2 (rope llama3)": lambda: LlamaConfig(
        **SIZES
        | {"tie_word_embeddings": True}
        | rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=TRAINED,
        )
    ),
    "Llama, rope linear": lambda: LlamaConfig(**SIZES | rope("linear", factor=4.0)),
    "Llama, rope dynamic": lambda: LlamaConfig(
        **SIZES | {"max_position_embeddings": TRAINED} | rope("dynamic", factor=4.0)
    ),
    "Llama, rope yarn": lambda: LlamaConfig(
        **SIZES | rope("yarn", factor=4.0, original_max_position_embeddings=TRAINED)
    ),
    "Llama with biases": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "TinyLlama (8 query heads to 1)": lambda: LlamaConfig(
        **SIZES | {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64}
    ),
    "SmolLM2": lambda: LlamaConfig(
        **SIZES
        | {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144}
        | {"tie_word_embeddings": True}
    ),
    "Mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "Mistral, sliding window": lambda: MistralConfig(**SIZES, sliding_window=32, head_dim=26),
    "Qwen2, Qwen2.5": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "Qwen2.5, rope yarn": lambda: Qwen2Config(
        **SIZES | rope("yarn", factor=4.0, original_max_position_embeddings=TRAINED)
    ),
    "Qwen3": lambda: Qwen3Config(**SIZES, head_dim=48, tie_word_embeddings=True),
    "Qwen3 with biases": lambda: Qwen3Config(**SIZES, head_dim=32, attention_bias=True),
}


class Reference:
    """A checkpoint, and what transformers computes from it."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(len(name))
        from_config: Any = AutoModelForCausalLM.from_config
        model = from_config(CASES[name](), dtype=torch.float32).eval()
        with torch.no_grad():  # norms and biases, too, must matter
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(folder)
        self.folder = folder
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(3, SIZES["vocab_size"], (LENGTH,), generator=generator).tolist()
        with torch.inference_mode():
            self.logits: Floats = model(torch.tensor([self.prompt])).logits[0].numpy()

    @property
    def last(self) -> Floats:
        """Logits after the whole prompt."""
        last: Floats = self.logits[-1]
        return last


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    return {
        name: Reference(name, tmp_path_factory.mktemp(f"case{i}")) for i, name in enumerate(CASES)
    }


def ours(
    reference: Reference,
    world: int,
    kernels: str,
    chunks: list[list[int]],
    dtype: Precision = "fp32",
) -> Floats:
    # "dynamic" depends on the length that is served; transformers takes that of the text.
    return logits_of(reference.folder, world, chunks, kernels, dtype, max_model_len=LENGTH)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_logits_are_those_of_transformers(
    name: str,
    world: int,
    kernels: str,
    references: dict[str, Reference],
    record_property: Callable[[str, object], None],
) -> None:
    reference = references[name]
    in_chunks = [reference.prompt[:90], reference.prompt[90:-1], reference.prompt[-1:]]
    found = ours(reference, world, kernels, [reference.prompt, [], *in_chunks])
    errors = [relative(found[i], reference.last) for i in (0, -1)]
    for key, value in (("case", name), ("kernels", kernels), ("workers", world)):
        record_property(key, value)
    record_property("logits", max(errors))
    same = [int(found[i].argmax()) == int(reference.last.argmax()) for i in (0, -1)]
    record_property("greedy", all(same))
    assert max(errors) < TOLERANCE
    assert all(same)


@pytest.mark.parametrize("name", CASES)
def test_int8_stays_close_to_fp32(
    name: str,
    references: dict[str, Reference],
    record_property: Callable[[str, object], None],
) -> None:
    if native_library() is None:
        pytest.skip("int8 needs the native library")
    reference = references[name]
    found = [ours(reference, w, "native", [reference.prompt], "int8")[0] for w in (1, 3)]
    assert np.array_equal(found[0], found[1])
    error = float(np.linalg.norm(found[0] - reference.last) / np.linalg.norm(reference.last))
    record_property("case", name)
    record_property("int8", error)
    assert error < 0.05


def test_the_longest_context_follows_from_the_scaling(references: dict[str, Reference]) -> None:
    longest = {
        name: read_model_config(reference.folder).max_positions
        for name, reference in references.items()
    }
    assert longest["Llama, rope dynamic"] == 4 * TRAINED
    assert longest["Llama, rope yarn"] == 512
    assert longest["Llama, rope linear"] == 512
    assert longest["Llama 3.1, 3.2 (rope llama3)"] == 512
