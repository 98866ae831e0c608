"""Text in, token ids out, and back: one model's tokenizer, chat template and detokeniser.

Chat templates come with the model and are not trusted: they run in jinja2's immutable sandbox.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from coordinator.tokenizer_files import (
    TokenizerConfig,
    load_tokenizer,
    read_tokenizer_config,
    token_text,
)
from shared.errors import ContextLengthError, InvalidRequestError, ModelError
from shared.messages import Alternative, Message, TokenLogprob
from shared.model_config import ModelConfig
from shared.worker_messages import TokenLogprobs

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For models without a chat template."""

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 4
_LONGEST_CHARACTER = 4  # bytes, and so tokens, of a character in UTF-8


class TextModel:
    """Tokenizer and chat template of one model."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """Read them from `folder`. Raises ModelError naming the file."""
        self._config = config
        raw = read_tokenizer_config(folder)
        self._tokenizer = load_tokenizer(folder, raw)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self._longest_token = max(map(len, vocabulary), default=1)
        highest = max([*vocabulary.values(), *config.eos_ids, config.bos_id or 0], default=0)
        if highest >= config.vocab_size:
            raise ModelError(
                f"{folder}: the tokenizer or config.json has a token id {highest}, but vocab_size "
                f"is {config.vocab_size}"
            )
        source = _template_source(folder, raw)
        self.has_chat_template = source is not None
        self._template = _compile(source or CHATML, folder)
        self._special = {
            "bos_token": token_text(raw.bos_token),
            "eos_token": token_text(raw.eos_token),
        }

    def encode_story(self, prompt: str) -> list[int]:
        """Token ids of a text to continue, with the model's own begin token if it wants one."""
        self._check_length(prompt)
        ids = self._tokenizer.encode(prompt).ids
        if not ids and self._config.bos_id is not None:
            return [self._config.bos_id]
        if not ids:
            raise InvalidRequestError("prompt is empty, and this model has no begin-of-text token")
        return ids

    def encode_chat(self, messages: Sequence[Message], *, continue_last: bool = False) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        continue_last: the last message is the beginning of that answer.

        Raises InvalidRequestError with the template's own words when it refuses the messages.
        """
        begun = messages[-1].content if continue_last else ""
        before = messages[:-1] if continue_last else messages
        plain = [{"role": m.role, "content": m.content} for m in before]
        try:
            text = self._template.render(
                messages=plain, add_generation_prompt=True, **self._special
            )
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise InvalidRequestError(
                f"the chat template refuses these messages: {error}"
            ) from None
        text += begun
        self._check_length(text)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            raise InvalidRequestError("the chat template makes nothing of these messages")
        return ids

    def _check_length(self, text: str) -> None:
        """Refuse at once what is too long in any case: to tokenise it would take seconds."""
        most = self._config.max_positions * self._longest_token
        if len(text) > most:
            raise ContextLengthError(
                f"the prompt has {len(text)} characters; {self._config.max_positions} tokens of "
                f"context cannot hold more than {most}: shorten the prompt"
            )

    def describe(self, token: int, logprobs: TokenLogprobs) -> TokenLogprob:
        """A token's log probabilities with the texts that the ids stand for."""
        return TokenLogprob(
            token_id=token,
            text=self._token_text(token),
            logprob=logprobs.chosen,
            top=[Alternative(i, self._token_text(i), value) for i, value in logprobs.top],
        )

    def _token_text(self, token: int) -> str:
        """A token by itself, for people; special tokens are shown."""
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def detokenizer(self, prompt_ids: Sequence[int]) -> "Detokenizer":
        """For the tokens that follow `prompt_ids`."""
        return Detokenizer(self._tokenizer, prompt_ids)


class Detokenizer:
    """Turns tokens into text one by one, never giving out half a character.

    A token's text depends on its neighbours (a leading space, bytes of one character), so it is
    decoded together with some tokens before it, and what those alone give is cut off. The window of
    those tokens begins between two characters.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = _whole_characters_at_the_end(tokenizer, prompt_ids)
        """The window: from the first token that is decoded with the next one."""
        # A prompt may end within a character, which the first new tokens then complete.
        self._given = tokenizer.decode(self._ids).rstrip(_REPLACEMENT)
        """The text of the window that has been given out."""
        self._complete = len(self._ids)
        """How many of its tokens that text comes from."""
        self._border = 0
        """A place between two characters where the window may be cut; 0: none yet."""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._ids.append(token)
        text: str = self._tokenizer.decode(self._ids)
        complete = len(self._ids)
        if text.endswith(_REPLACEMENT) and (held := self._tokens_held(text)):
            complete -= held
            if complete == self._complete:
                return ""
            text = self._tokenizer.decode(self._ids[:complete])
        new = text[len(self._given) :]
        self._given, self._complete = text, complete
        if not self._border and complete >= _CONTEXT_TOKENS:
            self._border = complete
        elif self._border and complete >= self._border + _CONTEXT_TOKENS:
            del self._ids[: self._border]
            self._complete = complete - self._border
            self._given = self._tokenizer.decode(self._ids[: self._complete])
            self._border = self._complete
        return new

    def _tokens_held(self, text: str) -> int:
        """How many of the last tokens may be the beginning of a character.

        As many as a character can have, or fewer: all since the last whole one. When there are more,
        some belong to no character: the most that can be a beginning, without which the text before
        them stays as it is. Special tokens, which have no text, do not count.
        """
        waiting = self._ids[self._complete :]
        held = found = 0
        for count, token in enumerate(reversed(waiting), start=1):
            found += self._tokenizer.decode([token]) != ""
            if found < _LONGEST_CHARACTER and text.startswith(
                self._tokenizer.decode(self._ids[:-count])
            ):
                held = count
        return len(waiting) if found <= _LONGEST_CHARACTER else held

    def flush(self) -> str:
        """What is left at the end, with a replacement character for an incomplete one."""
        if self._complete == len(self._ids):
            return ""
        text: str = self._tokenizer.decode(self._ids)
        return text[len(self._given) :]


def _whole_characters_at_the_end(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The last few of `ids`, from a place between two characters on."""
    for count in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + _LONGEST_CHARACTER):
        if not tokenizer.decode(ids[-count:]).startswith(_REPLACEMENT):
            return list(ids[-count:])
    return list(ids[-_CONTEXT_TOKENS:])  # no characters at all


class StopStrings:
    """Finds the first of several texts in a stream, across token borders, and holds it back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str, may_stop: bool) -> tuple[str, str | None]:
        """What of the text so far may be given out, and the stop string found after it if any.

        While `may_stop` is false nothing is looked for, and nothing held back.
        """
        if not may_stop:
            held, self._held = self._held, ""
            return held + text, None
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda item: item[0])
            self._held = ""
            return text[:at], stop
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that could be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


def _template_source(folder: Path, raw: TokenizerConfig) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: {error}") from None
    if isinstance(raw.chat_template, list):
        named = {t.name: t.template for t in raw.chat_template}
        return named.get("default") or next(iter(named.values()), None)
    return raw.chat_template


def _compile(source: str, folder: Path) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelError(f"{folder}: the chat template is broken: {error}") from None


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
