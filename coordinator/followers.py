"""Clients that follow stored jobs, and what each of them has yet to get."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from coordinator.frontend import Frontend
from coordinator.sequence import Sequence as Answer
from shared.messages import FinishReason, Started, Token, TokenLogprob
from shared.protocol import Event


@dataclass(eq=False)
class _Follower:
    client: bytes
    request_id: str
    from_token: int
    known: dict[int, int] = field(default_factory=dict)
    """By answer: how many of its tokens the client has."""
    started: bool = False


class Followers:
    """Passes the events of followed jobs on, and of the tokens to each client those that it lacks.

    A job that is begun anew gives the same tokens, so its followers notice a pause only.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._of: dict[str, list[_Follower]] = {}

    @property
    def jobs(self) -> list[str]:
        """Ids of the jobs that anybody follows."""
        return list(self._of)

    def add(
        self, job: str, client: bytes, request_id: str, from_token: int, answers: Iterable[Answer]
    ) -> None:
        """Follow a job from a token on; `answers`: as far as it has come."""
        follower = _Follower(client, request_id, from_token)
        self._of.setdefault(job, []).append(follower)
        for answer in answers:
            self._catch_up(follower, answer)

    def remove(self, client: bytes, request_id: str) -> bool:
        """Whether it has followed anything."""
        return bool(self._remove(lambda f: (f.client, f.request_id) == (client, request_id)))

    def drop(self, client: bytes) -> list[str]:
        """A client is gone or does not read; the ids of what it has asked."""
        return [follower.request_id for follower in self._remove(lambda f: f.client == client)]

    def pass_on(self, event: Event) -> None:
        """Anything but tokens and the last event."""
        for follower in self._of.get(event.id, ()):
            if isinstance(event, Started):
                if follower.started:
                    continue
                follower.started = True
            self._send(follower, event)

    def pass_on_tokens(self, job: str, answer: Answer) -> None:
        """One of a job's answers has got more tokens, or the text that it begins with."""
        for follower in self._of.get(job, ()):
            self._catch_up(follower, answer)

    def end(self, job: str, event: Event) -> None:
        """The job's last event: nobody follows it any more."""
        for follower in self._of.pop(job, ()):
            self._send(follower, event)

    def _catch_up(self, follower: _Follower, answer: Answer) -> None:
        assert answer.text_ends is not None, "stored jobs note where tokens end"
        known = follower.known.get(answer.index, follower.from_token)
        first = answer.index not in follower.known
        token = tokens_after(
            known,
            answer.text,
            answer.tokens[answer.prompt_tokens :],
            answer.text_ends,
            index=answer.index,
            logprobs=answer.logprobs,
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )
        if token is not None and (token.token_ids or first):
            follower.known[answer.index] = known + len(token.token_ids)
            self._send(follower, token)

    def _send(self, follower: _Follower, event: Event) -> None:
        self._frontend.publish(
            follower.client, msgspec.structs.replace(event, id=follower.request_id)
        )

    def _remove(self, leaves: Callable[[_Follower], bool]) -> list[_Follower]:
        gone = []
        for job, followers in list(self._of.items()):
            gone += [follower for follower in followers if leaves(follower)]
            self._of[job] = [follower for follower in followers if not leaves(follower)]
            if not self._of[job]:
                del self._of[job]
        return gone


def tokens_after(
    known: int,
    text: str,
    token_ids: list[int],
    text_ends: Sequence[int],
    *,
    index: int = 0,
    logprobs: Sequence[TokenLogprob] = (),
    finish_reason: FinishReason | None = None,
    stop_reason: str | int | None = None,
) -> Token | None:
    """An answer without its first `known` tokens and their text; None: there is no more.

    `text_ends`: the length of the text after each token.
    """
    if known > len(token_ids):
        return None
    begin = text_ends[known - 1] if known else 0
    if known == len(token_ids) and begin == len(text):
        return None
    return Token(
        id="-",
        text=text[begin:],
        token_ids=token_ids[known:],
        index=index,
        logprobs=list(logprobs[known:]),
        finish_reason=finish_reason,
        stop_reason=stop_reason,
    )
