"""config.json -> ModelConfig: which architecture, sizes, rotary embedding, end-of-text ids.

An architecture is an entry of ARCHITECTURES. What the engine cannot compute is refused here by name, before any weight is read.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from shared.errors import ModelError
from shared.rope import Rope, read_rope

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, Dtype] = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
}

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""Of the weights: one file, or the list of several."""

T = TypeVar("T")

Size = Annotated[int, Meta(ge=1, le=1 << 24)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 24)]


class Architecture(Struct, frozen=True, kw_only=True):
    """What a model_type means beyond the fields of its config.json; None: what the field says."""

    qkv_bias: bool | None = False
    output_bias: bool | None = False
    """Of o_proj."""
    mlp_bias: bool | None = False
    head_norms: bool = False
    """Queries and keys are normed head by head."""
    window: Literal["none", "always", "switched"] = "none"
    """Whether sliding_window counts: always, or only with use_sliding_window."""


ARCHITECTURES = {
    # Llama 2, 3, 3.x, TinyLlama, SmolLM2 and most that call themselves compatible.
    "llama": Architecture(qkv_bias=None, output_bias=None, mlp_bias=None),
    "mistral": Architecture(window="always"),
    "qwen2": Architecture(qkv_bias=True, window="switched"),  # Qwen2, Qwen2.5
    "qwen3": Architecture(qkv_bias=None, output_bias=None, head_norms=True, window="switched"),
}
"""By model_type. What an entry adds to a Llama is built in worker/model.py."""


class ModelConfig(Struct, frozen=True, kw_only=True):
    """What the decoder needs to know of a model; sizes in elements."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope: Rope
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool
    sliding_window: int | None
    """A token attends to itself and the `sliding_window - 1` tokens before it; None: to all."""
    tie_word_embeddings: bool
    dtype: Dtype
    """Of the checkpoint."""
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Number of weights; a tied embedding counts once."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * queries + 2 * keys + 3 * self.intermediate_size + 2)
        layer += self.qkv_bias * (queries + 2 * keys) + self.output_bias * self.hidden_size
        layer += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        layer += self.head_norms * 2 * self.head_dim
        embeddings = self.hidden_size * self.vocab_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


class _RawKind(Struct):
    """What is read first: the fields of other architectures have other names."""

    model_type: str


class _RawConfig(Struct, kw_only=True):
    """The fields of a Hugging Face config.json that matter to the computation; others are ignored."""

    model_type: str
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Meta(ge=1, le=1024)]
    num_attention_heads: Annotated[int, Meta(ge=1, le=4096)]
    num_key_value_heads: Annotated[int, Meta(ge=1, le=4096)] | None = None
    head_dim: Annotated[int, Meta(ge=2, le=4096)] | None = None
    vocab_size: Size
    max_position_embeddings: Size = 2048
    rms_norm_eps: Annotated[float, Meta(gt=0, lt=1)] = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    sliding_window: Size | None = None
    use_sliding_window: bool = False
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    torch_dtype: str | None = None
    dtype: str | None = None
    bos_token_id: TokenId | list[TokenId] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    quantization_config: dict[str, Any] | None = None


class _RawGenerationConfig(Struct, kw_only=True):
    eos_token_id: TokenId | list[TokenId] | UnsetType | None = UNSET
    do_sample: bool = True
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None


class GenerationDefaults(Struct, frozen=True, kw_only=True):
    """Sampling defaults that the model's author gave in generation_config.json."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_model_config(folder: Path) -> ModelConfig:
    """Parse `config.json` (and the eos ids of `generation_config.json`) in `folder`.

    Raises ModelError naming the file and the field when something is missing, contradictory or not
    supported.
    """
    path = folder / "config.json"
    kind = _kind(_read_json(path, _RawKind).model_type, path)
    raw = _read_json(path, _RawConfig)
    generation = _read_generation_config(folder)
    _refuse_unsupported(raw, kind, path)

    kv_heads = raw.num_key_value_heads or raw.num_attention_heads
    if raw.num_attention_heads % kv_heads:
        raise ModelError(
            f"{path}: num_attention_heads {raw.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    if raw.head_dim is None and raw.hidden_size % raw.num_attention_heads:
        raise ModelError(
            f"{path}: hidden_size {raw.hidden_size} is not a multiple of num_attention_heads "
            f"{raw.num_attention_heads}, and there is no head_dim"
        )
    head_dim = raw.head_dim or raw.hidden_size // raw.num_attention_heads
    if head_dim % 2:
        raise ModelError(f"{path}: head_dim {head_dim} is odd; rotary embedding needs an even one")

    rope, max_positions = read_rope(
        raw.rope_parameters or raw.rope_scaling or {},
        raw.rope_theta,
        raw.max_position_embeddings,
        path,
    )
    eos = raw.eos_token_id if generation.eos_token_id is UNSET else generation.eos_token_id
    return ModelConfig(
        model_type=raw.model_type,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_layers=raw.num_hidden_layers,
        num_heads=raw.num_attention_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=raw.vocab_size,
        max_positions=max_positions,
        rms_norm_eps=raw.rms_norm_eps,
        rope=rope,
        qkv_bias=raw.attention_bias if kind.qkv_bias is None else kind.qkv_bias,
        output_bias=raw.attention_bias if kind.output_bias is None else kind.output_bias,
        mlp_bias=raw.mlp_bias if kind.mlp_bias is None else kind.mlp_bias,
        head_norms=kind.head_norms,
        sliding_window=raw.sliding_window if kind.window == "always" else None,
        tie_word_embeddings=raw.tie_word_embeddings,
        dtype=DTYPES[raw.torch_dtype or raw.dtype or "float32"],
        bos_id=_ids(raw.bos_token_id)[0] if _ids(raw.bos_token_id) else None,
        eos_ids=_ids(eos),
    )


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """Those of `generation_config.json`; neutral values where it has none.

    Where the author does not want sampling, greedy; penalties count then too.
    """
    raw = _read_generation_config(folder)
    neutral = GenerationDefaults()
    return GenerationDefaults(
        temperature=(neutral.temperature if raw.temperature is None else raw.temperature)
        if raw.do_sample
        else 0.0,
        top_k=neutral.top_k if raw.top_k is None else raw.top_k,
        top_p=neutral.top_p if raw.top_p is None else raw.top_p,
        min_p=neutral.min_p if raw.min_p is None else raw.min_p,
        repetition_penalty=neutral.repetition_penalty
        if raw.repetition_penalty is None
        else raw.repetition_penalty,
    )


def _read_generation_config(folder: Path) -> _RawGenerationConfig:
    path = folder / "generation_config.json"
    return _read_json(path, _RawGenerationConfig) if path.exists() else _RawGenerationConfig()


def _read_json(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: {path.parent} is not a model folder") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: {error}") from None


def _kind(model_type: str, path: Path) -> Architecture:
    kind = ARCHITECTURES.get(model_type)
    if kind is None:
        supported = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"{path}: model_type {model_type!r} is not supported (supported: {supported})"
        )
    return kind


def _refuse_unsupported(raw: _RawConfig, kind: Architecture, path: Path) -> None:
    if raw.hidden_act != "silu":
        raise ModelError(f"{path}: hidden_act {raw.hidden_act!r} is not supported (only 'silu')")
    for name, meant in (("attention_bias", kind.qkv_bias), ("mlp_bias", kind.mlp_bias)):
        if getattr(raw, name) and meant is False:
            raise ModelError(f"{path}: a {raw.model_type} model has no {name}")
    if kind.window == "switched" and raw.use_sliding_window:
        raise ModelError(
            f"{path}: use_sliding_window is not supported: only some layers have the window"
        )
    if raw.quantization_config is not None:
        raise ModelError(
            f"{path}: pre-quantised checkpoints (quantization_config) are not supported"
        )
    dtype = raw.torch_dtype or raw.dtype or "float32"
    if dtype not in DTYPES:
        raise ModelError(f"{path}: dtype {dtype!r} is not supported (float32, bfloat16, float16)")


def _ids(value: int | list[int] | UnsetType | None) -> tuple[int, ...]:
    if value is None or value is UNSET:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
