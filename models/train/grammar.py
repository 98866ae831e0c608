"""A very small text grammar: nested choices and named slots.

``[a|b|c]`` picks one alternative (choices may be nested, an alternative may be empty) and
``{slot}`` is replaced by a value.  Both generators of the demo models are written in it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")
_SPACES = re.compile(r" {2,}")


def expand(rng: random.Random, text: str, slots: Mapping[str, str]) -> str:
    """Return ``text`` with every choice made and every slot filled."""
    while "[" in text:
        text = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), text)
    text = _SLOT.sub(lambda match: slots[match.group(1)], text)
    text = _ARTICLE.sub(r"\1n ", text)
    return _SPACES.sub(" ", text).strip()


def capital(text: str) -> str:
    """Return ``text`` with its first letter in upper case, the rest untouched."""
    return text[:1].upper() + text[1:]
