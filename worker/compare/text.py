"""The text that precisions are compared on: from a file to windows of token ids."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from shared.errors import ConfigError, ModelError
from shared.model_config import ModelConfig

BUNDLED = Path(__file__).parent / "stories.txt"
PROMPTS = 4
PROMPT_TOKENS = 16
"""Cut from the text at even distances; the begin-of-text token is not among them."""
NEW_TOKENS = 40
"""Of each continuation, where the context has room for them."""
LEAST_TOKENS = PROMPT_TOKENS + 1


@dataclass(frozen=True)
class Text:
    """Token ids of one text; windows and prompts begin with the begin-of-text token if the model has it."""

    name: str
    tokens: int
    """Of the text itself."""
    windows: tuple[tuple[int, ...], ...]
    """The whole text, each at most as long as the context."""
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    """By which each prompt is continued."""

    @property
    def positions(self) -> int:
        """Tokens of all windows."""
        return sum(map(len, self.windows))


def read_text(
    folder: Path, config: ModelConfig, file: Path | None = None, max_tokens: int | None = None
) -> Text:
    """The first `max_tokens` tokens of a file in UTF-8; None: all, and of the bundled stories.

    Raises ConfigError if it cannot be read or is too short, ModelError if the tokenizer in `folder`
    is unusable.
    """
    name = "bundled stories" if file is None else str(file)
    if max_tokens is not None and max_tokens < LEAST_TOKENS:
        raise ConfigError(f"--max-tokens is {max_tokens}, it must be at least {LEAST_TOKENS}")
    ids: list[int] = _tokenizer(folder / "tokenizer.json").encode(_read(file or BUNDLED)).ids
    if max(ids, default=0) >= config.vocab_size:
        raise ModelError(
            f"{folder}: tokenizer.json has a token id {max(ids)}, but vocab_size is"
            f" {config.vocab_size}"
        )
    begin = ids[:1] if ids and ids[0] == config.bos_id else []
    body = ids[len(begin) :][:max_tokens]
    if len(body) < LEAST_TOKENS:
        raise ConfigError(
            f"{name} has {len(body)} tokens, at least {LEAST_TOKENS} are needed: name a longer text"
            " with --text"
        )
    step = config.max_positions - len(begin)
    if step < LEAST_TOKENS:
        raise ModelError(
            f"{folder}: a context of {config.max_positions} tokens is too short to compare texts"
        )
    starts = [(len(body) - PROMPT_TOKENS) * i // PROMPTS for i in range(PROMPTS)]
    return Text(
        name=name,
        tokens=len(body),
        windows=tuple((*begin, *body[at : at + step]) for at in range(0, len(body), step)),
        prompts=tuple((*begin, *body[at : at + PROMPT_TOKENS]) for at in starts),
        new_tokens=min(NEW_TOKENS, step - PROMPT_TOKENS),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--text {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--text {path} is not UTF-8 (byte {error.start}): convert it first"
        ) from None


def _tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        raise ModelError(f"{path} is missing")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exceptions
        raise ModelError(f"{path} is not a usable tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
