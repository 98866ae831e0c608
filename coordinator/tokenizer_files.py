"""A model folder's tokenizer files -> tokenizers.Tokenizer, and tokenizer_config.json.

tokenizer.json is used as it is. Where it is missing, tokenizer.model and the added tokens of
tokenizer_config.json and added_tokens.json make an equal one.
"""

from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from tokenizers import AddedToken, Tokenizer, processors

from coordinator.sentencepiece_model import build_tokenizer, read_sentencepiece
from shared.errors import ModelError

T = TypeVar("T")

_MODEL = "tokenizer.model"


class NamedTemplate(Struct):
    """One of several chat templates."""

    name: str
    template: str


class TokenText(Struct):
    """A special token, as older and newer files write it."""

    content: str
    special: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


class _SpecialTokens(Struct):
    bos_token: str | TokenText | None = None
    eos_token: str | TokenText | None = None


class TokenizerConfig(Struct):
    """The fields of tokenizer_config.json that are used; the rest is ignored."""

    chat_template: str | list[NamedTemplate] | None = None
    bos_token: str | TokenText | None = None
    eos_token: str | TokenText | None = None
    # What follows is for a tokenizer.model only; a tokenizer.json has it in itself.
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    added_tokens_decoder: dict[int, TokenText] = {}


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Parse `tokenizer_config.json`; an empty one where it is missing. Raises ModelError."""
    config = _read_json(folder / "tokenizer_config.json", TokenizerConfig) or TokenizerConfig()
    if config.bos_token is None or config.eos_token is None:
        # Older checkpoints have them here.
        older = _read_json(folder / "special_tokens_map.json", _SpecialTokens) or _SpecialTokens()
        config.bos_token = config.bos_token or older.bos_token
        config.eos_token = config.eos_token or older.eos_token
    return config


def load_tokenizer(folder: Path, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a model folder. Raises ModelError naming the file."""
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / _MODEL).exists():
        return _from_sentencepiece(folder, config)
    try:
        description: dict[str, Any] = msgspec.json.decode(path.read_bytes())
        for token in description.get("added_tokens") or []:
            # A special token stands for itself. Some files ask for it to be normalised first, which
            # would give it a leading space and make it ordinary text when it is decoded.
            if token.get("special"):
                token["normalized"] = False
        tokenizer = Tokenizer.from_str(msgspec.json.encode(description).decode())
        tokenizer.no_truncation()  # what does not fit is refused, not cut
        tokenizer.no_padding()
        return tokenizer
    except FileNotFoundError:
        raise ModelError(f"{path} is missing, and so is {_MODEL}") from None
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exceptions
        raise ModelError(f"{path} is not a usable tokenizer: {error}") from None


def token_text(token: str | TokenText | None) -> str:
    """The text of a special token; empty for none."""
    if token is None:
        return ""
    return token if isinstance(token, str) else token.content


def _from_sentencepiece(folder: Path, config: TokenizerConfig) -> Tokenizer:
    path = folder / _MODEL
    model = read_sentencepiece(path)
    try:
        tokenizer = build_tokenizer(
            model,
            # As transformers did before the field existed.
            spaced_segments=config.legacy is not False,
            prefix=config.add_prefix_space is not False,
        )
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exceptions
        raise ModelError(f"{path} is not a usable tokenizer: {error}") from None
    for number, token in sorted(_added_tokens(folder, config).items()):
        _add(tokenizer, number, token, folder)
    begin = token_text(config.bos_token) or "<s>"
    end = token_text(config.eos_token) or "</s>"
    template = ["$A"]
    if config.add_bos_token is not False:
        template.insert(0, begin)
    if config.add_eos_token:
        template.append(end)
    special = [(text, _id_of(tokenizer, text, path)) for text in template if text != "$A"]
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    return tokenizer


def _added_tokens(folder: Path, config: TokenizerConfig) -> dict[int, TokenText]:
    """By id: what stands beside the vocabulary of tokenizer.model."""
    listed = _read_json(folder / "added_tokens.json", dict[str, int]) or {}
    return {number: TokenText(text) for text, number in listed.items()} | (
        config.added_tokens_decoder
    )


def _add(tokenizer: Tokenizer, number: int, token: TokenText, folder: Path) -> None:
    made = AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        # A special token stands for itself, as above.
        normalized=token.normalized and not token.special,
        special=token.special,
    )
    add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
    add([made])
    if tokenizer.token_to_id(token.content) != number:
        raise ModelError(
            f"{folder}: the added token {token.content!r} has id {number}, where "
            f"{tokenizer.token_to_id(token.content)} comes next after {_MODEL}: add the "
            "checkpoint's tokenizer.json to the folder"
        )


def _id_of(tokenizer: Tokenizer, text: str, path: Path) -> int:
    number: int | None = tokenizer.token_to_id(text)
    if number is None:
        raise ModelError(f"{path} has no token {text!r}, which texts are to begin or end with")
    return number


def _read_json(path: Path, kind: type[T]) -> T | None:
    """None when there is no such file. Raises ModelError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: {error}") from None
