"""config.json: what is read, and what is refused by name before weights are."""

import json
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ModelError
from shared.model_config import read_generation_defaults, read_model_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "some_field_of_the_future": True,
}


def write(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_sizes_are_read_and_derived(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path, LLAMA))
    assert (config.head_dim, config.num_kv_heads, config.dtype) == (16, 2, "bf16")
    assert config.eos_ids == (2,)
    assert config.sliding_window is None


def test_newer_configs_keep_rope_theta_and_dtype_elsewhere(tmp_path: Path) -> None:
    newer = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    del newer["torch_dtype"]
    newer["dtype"] = "float16"
    config = read_model_config(write(tmp_path, newer))
    assert (config.rope.theta, config.dtype) == (5e5, "fp16")


def test_generation_config_overrules_the_end_tokens(tmp_path: Path) -> None:
    config = read_model_config(write(tmp_path, LLAMA, {"eos_token_id": [7, 8]}))
    assert config.eos_ids == (7, 8)


def test_a_mistral_window_is_kept(tmp_path: Path) -> None:
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": 16}
    assert read_model_config(write(tmp_path, mistral)).sliding_window == 16


def test_sampling_defaults_come_from_generation_config(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40})
    defaults = read_generation_defaults(tmp_path)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 0.9, 40)
    write(tmp_path, LLAMA, {"do_sample": False, "temperature": 0.6})
    assert read_generation_defaults(tmp_path).temperature == 0


def test_penalty_and_min_p_of_the_author_are_defaults(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text('{"repetition_penalty": 1.1, "min_p": 0.05}')
    defaults = read_generation_defaults(tmp_path)
    assert (defaults.repetition_penalty, defaults.min_p) == (1.1, 0.05)
    path.write_text("{}")
    defaults = read_generation_defaults(tmp_path)
    assert (defaults.repetition_penalty, defaults.min_p) == (1.0, 0.0)
    path.write_text('{"repetition_penalty": 0}')
    with pytest.raises(ModelError, match=r"generation_config.json.*repetition_penalty"):
        read_generation_defaults(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, ["gpt2", "llama"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"model_type": "mistral", "attention_bias": True}, ["mistral", "attention_bias"]),
        ({"model_type": "qwen2", "use_sliding_window": True}, ["use_sliding_window"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, ["rope", "longrope", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor", "0.5"]),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, ["rope_scaling", "factor"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, ["low_freq_factor"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ({"rope_theta": 0}, ["rope_theta"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads 3", "4"]),
        ({"hidden_size": 66}, ["hidden_size 66"]),
        ({"hidden_size": -1}, ["hidden_size"]),
        ({"vocab_size": 1 << 40}, ["vocab_size"]),
        ({"num_hidden_layers": "two"}, ["num_hidden_layers"]),
        ({"head_dim": 15}, ["head_dim 15"]),
        ({"torch_dtype": "int8"}, ["int8"]),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        read_model_config(write(tmp_path, LLAMA | change))
    assert "config.json" in caught.value.message
    for word in words:
        assert word in caught.value.message


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model folder"):
        read_model_config(tmp_path)


def test_broken_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        read_model_config(tmp_path)
