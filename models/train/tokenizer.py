"""Trains the tokenizers of the demo models and writes their files.

Both are byte-level BPE, so every Unicode string comes back as it went in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from models.train.dialogues import Message
from models.train.stories import BOS, EOS

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1024
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Special:
    """The special tokens of one model; ``bos`` is set only if every text begins with it."""

    tokens: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str
    chat_template: str | None = None


STORY = Special(tokens=(BOS, EOS), bos=BOS, eos=EOS, pad=EOS)
CHAT = Special(
    tokens=(END_OF_TEXT, IM_START, IM_END),
    bos=None,
    eos=IM_END,
    pad=END_OF_TEXT,
    chat_template=CHAT_TEMPLATE,
)


def train_tokenizer(texts: Iterable[str], special: Special) -> Tokenizer:
    """Learn a byte-level BPE vocabulary from ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special.tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if special.bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special.bos} $A",
            pair=f"{special.bos} $A $B",
            special_tokens=[(special.bos, tokenizer.token_to_id(special.bos))],
        )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the number of a token that must be there."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise KeyError(token)
    return number


def chat_segments(messages: list[Message]) -> list[tuple[str, bool]]:
    """Return a dialogue as ChatML in pieces: (text, whether the model is to learn to say it)."""
    segments = []
    for message in messages:
        segments.append((f"{IM_START}{message['role']}\n", False))
        spoken = message["role"] == "assistant"
        segments.append((f"{message['content']}{IM_END}", spoken))
        segments.append(("\n", False))
    return segments


def write_tokenizer(tokenizer: Tokenizer, special: Special, folder: Path, length: int) -> None:
    """Write the tokenizer files as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": special.eos, "pad_token": special.pad}
    if special.bos is not None:
        names["bos_token"] = special.bos
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in special.tokens
        },
        **names,
    }
    if special.chat_template is not None:
        config["chat_template"] = special.chat_template
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", names)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file for people to read, too."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
