"""Prompts of an exact length in tokens, each of them new: no cache may know how it begins."""

import random
import string
from dataclasses import dataclass
from pathlib import Path

from coordinator.text import TextModel
from shared.errors import ModelError
from shared.model_config import read_model_config

_WORDS = (
    "the and you that was for are with his they this have from one had word but not what all were"
    " when your can said there use each which she how their will other about out many then them"
    " these some her would make like him into time has look two more write see number way could"
    " people than first water been call who oil now find long down day did get come made may part"
)
_ATTEMPTS = 1_000


@dataclass(frozen=True)
class Prompt:
    """A text, and the tokens that a model's tokenizer makes of it."""

    text: str
    ids: list[int]


class Prompts:
    """Makes prompts for one model."""

    def __init__(self, model: Path, seed: int = 0) -> None:
        """Raises ModelError when the tokenizer has no word or letter that is a single token."""
        self._encode = TextModel(model, read_model_config(model)).encode_story
        self._random = random.Random(seed)
        length = len(self._encode("x"))
        self._words = [
            word
            for word in (*_WORDS.split(), *string.ascii_letters)
            if len(self._encode(f"x {word}")) == length + 1
        ]
        if not self._words:
            raise ModelError(f"{model}: its tokenizer makes no single token of any common word")

    def of(self, text: str) -> Prompt:
        """A given text."""
        return Prompt(text, self._encode(text))

    def make(self, tokens: int) -> Prompt:
        """Random words, `tokens` tokens of them with what the tokenizer adds.

        Raises ModelError where that cannot be reached.
        """
        count = tokens
        for _ in range(_ATTEMPTS):
            prompt = self.of(" ".join(self._random.choices(self._words, k=count)))
            if len(prompt.ids) == tokens:
                return prompt
            count = max(1, count + tokens - len(prompt.ids))
        raise ModelError(f"no prompt of exactly {tokens} tokens was found for this tokenizer")
