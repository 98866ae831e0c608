"""Checkpoints with random weights in the shape of real models, so that nothing need be downloaded.

Their text is noise; sizes, number types and names of tensors are the real ones'. The tokenizer is of
Llama's kind, so that other engines take it too, with as many tokens as the real one's.
"""

import itertools
import json
import math
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from shared.errors import ConfigError

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 32_000,
}
SHAPES: Mapping[str, dict[str, Any]] = {
    "tinyllama-1.1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "llama-3.2-1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_theta": 500_000.0,
        "vocab_size": 128_256,
    },
    "llama-160m": _LLAMA
    | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "tinystories-656k": _LLAMA
    | {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "vocab_size": 2048,
    },
    "tiny": _LLAMA
    | {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 512,
    },
    "tiny-gqa": _LLAMA
    | {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
_SPREAD = 0.02
"""Standard deviation of the weights."""
_REPEATED = 1 << 20
"""Numbers that are drawn; matrices are made of shifted copies, which compute as slowly."""
_SPECIAL = ("<unk>", "<s>", "</s>")
_SPACE = "\u2581"
"""Stands for a space, before a word."""


def random_checkpoint(shape: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint in bf16 of one of SHAPES in `folder`, made unless it is there. Raises ConfigError."""
    config = SHAPES[shape] | {"torch_dtype": "bfloat16"}
    done = folder / "config.json"
    if done.exists():
        return folder
    shapes = dict(_tensor_shapes(config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"))
        fields = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict(zip(("unk_token", "bos_token", "eos_token"), _SPECIAL, strict=True)),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))
        _save(shapes, folder / "model.safetensors", seed)
        done.write_text(json.dumps(config, indent=1))  # the last one: without it there is nothing
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    return folder


def _tensor_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocabulary = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim", hidden // heads)
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        own = f"model.layers.{layer}."
        yield own + "self_attn.q_proj.weight", (heads * head, hidden)
        yield own + "self_attn.k_proj.weight", (kv_heads * head, hidden)
        yield own + "self_attn.v_proj.weight", (kv_heads * head, hidden)
        yield own + "self_attn.o_proj.weight", (hidden, heads * head)
        yield own + "mlp.gate_proj.weight", (inner, hidden)
        yield own + "mlp.up_proj.weight", (inner, hidden)
        yield own + "mlp.down_proj.weight", (hidden, inner)
        yield own + "input_layernorm.weight", (hidden,)
        yield own + "post_attention_layernorm.weight", (hidden,)


def _save(shapes: Mapping[str, tuple[int, ...]], path: Path, seed: int) -> None:
    """Tensor by tensor, so that the memory of one is enough.

    The format (https://github.com/huggingface/safetensors): the length of a header, the header, which
    is JSON, and the numbers. numpy has no bf16: it is the upper half of a float32.
    """
    drawn = np.random.default_rng(seed).normal(0, _SPREAD, _REPEATED).astype(np.float32)
    numbers = (drawn.view(np.uint32) >> 16).astype(np.uint16)
    one = (np.array([1.0], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded = encoded.ljust(-(-len(encoded) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for index, shape in enumerate(shapes.values()):
            values = one if len(shape) == 1 else np.roll(numbers, 7919 * index)
            np.resize(values, shape).tofile(file)


def _tokenizer(size: int) -> Tokenizer:
    """Words of letters, a token each, and bytes for what is not made of them.

    Merges only ever add a letter to the beginning of a word, so a word is one token as soon as the
    vocabulary has it, and otherwise its longest beginning and its other letters.
    """
    letters = string.ascii_lowercase
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), _SPACE, *letters]
    merges: list[tuple[str, str]] = []
    of_last_length = [_SPACE]
    while len(tokens) < size:
        longer = itertools.product(of_last_length, letters)
        new = [*itertools.islice(longer, size - len(tokens))]
        merges += new
        of_last_length = list(map("".join, new))
        tokens += of_last_length
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token=_SPECIAL[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_SPECIAL[1]} $A", special_tokens=[(_SPECIAL[1], 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer
