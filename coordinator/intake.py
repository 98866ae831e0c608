"""From a request to a sequence that can be scheduled: resolve the model, tokenise, check limits.

Templates and tokenisers take their time with long texts, so this runs off the engine's thread, in the
order in which the requests came.
"""

import os
import secrets
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from coordinator.sequence import Sequence
from coordinator.served_model import ServedModel
from shared.errors import ContextLengthError, ModelNotFoundError, TpserveError
from shared.messages import Generate, Sampling, SamplingParams
from shared.model_config import GenerationDefaults


@dataclass(frozen=True)
class Prepared:
    """A finished preparation: the sequence, or why there is none."""

    client: bytes
    request_id: str
    outcome: Sequence | TpserveError


class Intake:
    """Prepares requests one after the other in a thread of its own."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = models
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="intake")
        self._finished: deque[Prepared] = deque()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Becomes readable when something has been prepared."""

    def submit(self, client: bytes, request: Generate) -> None:
        """Start preparing. Raises ModelNotFoundError at once."""
        model = self._find(request)
        self._thread.submit(self._run, client, request, model)

    def prepared(self) -> Iterator[Prepared]:
        """Everything that has been prepared since the last call."""
        while self._finished:
            yield self._finished.popleft()

    def close(self) -> None:
        """Give up what has not been prepared yet."""
        self._thread.shutdown(cancel_futures=True)
        os.close(self.wake_fd)

    def _find(self, request: Generate) -> ServedModel:
        name = request.model or (
            request.kind if request.kind in self._models else next(iter(self._models))
        )
        if name not in self._models:
            loaded = ", ".join(sorted(self._models))
            raise ModelNotFoundError(f"model {name!r} is not loaded; loaded are: {loaded}")
        return self._models[name]

    def _run(self, client: bytes, request: Generate, model: ServedModel) -> None:
        outcome: Sequence | TpserveError
        try:
            outcome = prepare(client, request, model)
        except TpserveError as error:
            outcome = error
        except Exception as error:  # noqa: BLE001 - the thread's last resort: the client must hear
            outcome = TpserveError(f"the request could not be prepared: {error}")
        self._finished.append(Prepared(client, request.id, outcome))
        os.eventfd_write(self.wake_fd, 1)


def prepare(client: bytes, request: Generate, model: ServedModel) -> Sequence:
    """Tokenise and check a request. Raises ContextLengthError, InvalidRequestError."""
    if request.messages is not None:
        tokens = model.text.encode_chat(request.messages)
    else:
        tokens = model.text.encode_story(request.prompt or "")
    room = model.max_model_len - len(tokens)
    wanted = request.params.max_tokens
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {len(tokens)} tokens; model {model.name!r} holds "
            f"{model.max_model_len} and needs room for at least 1 new one: shorten the prompt"
        )
    if wanted is not None and wanted > room:
        raise ContextLengthError(
            f"the prompt has {len(tokens)} tokens and max_tokens is {wanted}, together "
            f"{len(tokens) + wanted}; model {model.name!r} holds {model.max_model_len}: "
            f"ask for at most {room}"
        )
    return Sequence(
        client=client,
        request_id=request.id,
        kind=request.kind,
        model=model.name,
        stream=request.stream,
        tokens=tokens,
        prompt_tokens=len(tokens),
        max_new_tokens=wanted or room,
        eos_ids=frozenset(model.config.eos_ids),
        sampling=resolve(request.params, model.defaults),
        detokenizer=model.text.detokenizer(tokens),
    )


def test_sequence(client: bytes, model: ServedModel) -> Sequence:
    """One token after the model's begin token: shows that all workers compute."""
    tokens = [model.config.bos_id or 0]
    return Sequence(
        client=client,
        request_id=model.name,
        kind="story",
        model=model.name,
        stream=False,
        tokens=tokens,
        prompt_tokens=1,
        max_new_tokens=1,
        eos_ids=frozenset(),
        sampling=Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0),
        detokenizer=model.text.detokenizer(tokens),
    )


def resolve(params: SamplingParams, defaults: GenerationDefaults) -> Sampling:
    """Fill in what the client left open."""
    return Sampling(
        temperature=defaults.temperature if params.temperature is None else params.temperature,
        top_k=defaults.top_k if params.top_k is None else params.top_k,
        top_p=defaults.top_p if params.top_p is None else params.top_p,
        seed=secrets.randbits(63) if params.seed is None else params.seed,
    )
