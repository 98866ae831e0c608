"""From a request to a job that can be scheduled: resolve the model, tokenise, check limits.

Templates and tokenisers take their time with long texts, so this runs off the engine's thread, in the
order in which the requests came.
"""

import os
import secrets
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from queue import SimpleQueue

from coordinator.job import Job
from coordinator.sequence import Sequence
from coordinator.served_model import ServedModel
from coordinator.text import StopStrings
from shared.embedding_messages import Embed
from shared.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    NotReadyError,
    TpserveError,
)
from shared.messages import Detokenize, Generate, SamplingParams, Text, Tokenize, Tokens
from shared.worker_messages import Sampling

Order = Generate | Tokenize | Detokenize | Embed
"""What needs a tokenizer."""


@dataclass(frozen=True)
class Prepared:
    """A finished preparation: the job or the answer, or why there is none."""

    client: bytes
    request: Order
    outcome: Job | Tokens | Text | TpserveError


class Intake:
    """Prepares requests one after the other in a thread of its own."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = models
        self._orders: SimpleQueue[tuple[bytes, Order, ServedModel]] = SimpleQueue()
        self._finished: deque[Prepared] = deque()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Becomes readable when something has been prepared."""
        # A daemon: a template that never ends must not keep the server from stopping.
        threading.Thread(target=self._run, name="intake", daemon=True).start()

    def submit(self, client: bytes, request: Order) -> None:
        """Start preparing. Raises ModelNotFoundError at once."""
        model = self._find(request)
        self._orders.put((client, request, model))

    def prepared(self) -> Iterator[Prepared]:
        """Everything that has been prepared since the last call."""
        while self._finished:
            yield self._finished.popleft()

    def _find(self, request: Order) -> ServedModel:
        chat = isinstance(request, Generate | Tokenize) and request.messages is not None
        kind = "chat" if chat else "story"
        ready = [name for name, model in self._models.items() if model.state == "ready"]
        name = request.model or (kind if kind in ready else next(iter(ready), ""))
        if name in ready:
            return self._models[name]
        if name in self._models:
            raise NotReadyError(f"model {name!r} is {self._models[name].state}")
        loaded = ", ".join(sorted(ready)) or "none"
        raise ModelNotFoundError(f"model {name!r} is not loaded; loaded are: {loaded}")

    def _run(self) -> None:
        while True:
            client, request, model = self._orders.get()
            outcome: Job | Tokens | Text | TpserveError
            try:
                match request:
                    case Generate():
                        outcome = prepare(client, request, model)
                    case Embed():
                        outcome = prepare_embedding(client, request, model)
                    case Tokenize():
                        outcome = tokenize(request, model)
                    case Detokenize():
                        outcome = detokenize(request, model)
            except TpserveError as error:
                outcome = error
            except Exception as error:  # noqa: BLE001 - the thread's last resort: the client must hear
                outcome = TpserveError(f"the request could not be prepared: {error}")
            self._finished.append(Prepared(client, request, outcome))
            os.eventfd_write(self.wake_fd, 1)


def prepare(client: bytes, request: Generate, model: ServedModel) -> Job:
    """Tokenise and check a request. Raises ContextLengthError, InvalidRequestError."""
    params = request.params
    tokens = encode(request, model)
    room = model.max_model_len - len(tokens)
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {len(tokens)} tokens; model {model.name!r} holds "
            f"{model.max_model_len} and needs room for at least 1 new one: shorten the prompt"
        )
    if params.max_tokens is not None and params.max_tokens > room:
        raise ContextLengthError(
            f"the prompt has {len(tokens)} tokens and max_tokens is {params.max_tokens}, together "
            f"{len(tokens) + params.max_tokens}; model {model.name!r} holds {model.max_model_len}: "
            f"ask for at most {room}"
        )
    for name, ids in (
        ("logit_bias", params.logit_bias.keys()),
        ("stop_token_ids", params.stop_token_ids),
    ):
        _check_ids(name, ids, model.config.vocab_size)
    max_new = params.max_tokens or room
    if params.min_tokens > max_new:
        raise InvalidRequestError(
            f"min_tokens is {params.min_tokens}, more than the {max_new} tokens that may come"
        )
    seed = secrets.randbits(63) if params.seed is None else params.seed
    job = Job(client, request, model.name, [])
    for index in range(params.n):
        sequence = new_sequence(model, tokens, max_new, job.key)
        sequence.index = index
        sequence.leader = job.sequences[0] if index else None
        if not params.cache_prompt:
            sequence.root_digest = secrets.token_bytes(16)  # of nobody else's blocks
        sequence.min_new_tokens = params.min_tokens
        sequence.stop_strings = StopStrings(params.stop) if params.stop else None
        ends = () if params.ignore_eos else model.config.eos_ids
        sequence.end_ids = frozenset((*ends, *params.stop_token_ids))
        sequence.sampling = resolve(params, model, seed + index, len(tokens), sequence.end_ids)
        if params.echo:
            sequence.text = request.prompt or ""
        job.sequences.append(sequence)
    return job


def prepare_embedding(client: bytes, request: Embed, model: ServedModel) -> Job:
    """Tokenise and check the texts. Raises ContextLengthError, InvalidRequestError."""
    job = Job(client, request, model.name, [])
    for index, text in enumerate(request.texts):
        if not text:
            raise InvalidRequestError(
                f"text {index} (counted from 0) is empty: there is nothing to embed, leave it out"
            )
        if isinstance(text, str):
            tokens = model.text.encode_story(text)
        else:
            _check_ids(f"text {index} (counted from 0)", text, model.config.vocab_size)
            tokens = text
        if len(tokens) > model.max_model_len:
            raise ContextLengthError(
                f"text {index} (counted from 0) has {len(tokens)} tokens; model {model.name!r} "
                f"holds {model.max_model_len}: shorten it, or cut it into several texts"
            )
        sequence = new_sequence(model, tokens, 1, job.key)
        sequence.index, sequence.pooled = index, True
        job.sequences.append(sequence)
    return job


def encode(request: Generate | Tokenize, model: ServedModel) -> list[int]:
    """The prompt's tokens. Raises ContextLengthError, InvalidRequestError."""
    if request.messages is not None:
        goes_on = isinstance(request, Generate) and request.continue_last
        return model.text.encode_chat(request.messages, continue_last=goes_on)
    return model.text.encode_story(request.prompt or "")


def tokenize(request: Tokenize, model: ServedModel) -> Tokens:
    """The answer. Raises ContextLengthError, InvalidRequestError."""
    return Tokens(
        id=request.id,
        model=model.name,
        token_ids=encode(request, model),
        max_model_len=model.max_model_len,
    )


def detokenize(request: Detokenize, model: ServedModel) -> Text:
    """The answer. Raises InvalidRequestError."""
    _check_ids("token_ids", request.token_ids, model.config.vocab_size)
    return Text(id=request.id, model=model.name, text=model.text.decode(request.token_ids))


def test_job(client: bytes, model: ServedModel) -> Job:
    """One token after the model's begin token: shows that all workers compute."""
    request = Generate(id=model.name, kind="story", prompt="", stream=False)
    job = Job(client, request, model.name, [])
    job.sequences.append(new_sequence(model, [model.config.bos_id or 0], 1, job.key))
    return job


def new_sequence(
    model: ServedModel, tokens: list[int], max_new_tokens: int, job_key: tuple[bytes, str]
) -> Sequence:
    """A greedy sequence without any wishes."""
    return Sequence(
        job_key=job_key,
        tokens=list(tokens),
        prompt_tokens=len(tokens),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0),
        detokenizer=model.text.detokenizer(tokens),
        root_digest=model.root_digest,
    )


def resolve(
    params: SamplingParams,
    model: ServedModel,
    seed: int,
    prompt_tokens: int,
    ends: AbstractSet[int],
) -> Sampling:
    """What the workers are told: the model's defaults fill in what the client left open."""
    defaults = model.defaults
    return Sampling(
        temperature=defaults.temperature if params.temperature is None else params.temperature,
        top_k=defaults.top_k if params.top_k is None else params.top_k,
        top_p=defaults.top_p if params.top_p is None else params.top_p,
        seed=seed % (1 << 63),
        min_p=defaults.min_p if params.min_p is None else params.min_p,
        repetition_penalty=defaults.repetition_penalty
        if params.repetition_penalty is None
        else params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        banned=sorted(ends) if params.min_tokens else [],
        banned_before=prompt_tokens + params.min_tokens if params.min_tokens else 0,
        logprobs=-1 if params.logprobs is None else params.logprobs,
    )


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if token >= vocab_size:
            raise InvalidRequestError(
                f"{name} has token id {token}, but the vocabulary ends at {vocab_size - 1}"
            )
