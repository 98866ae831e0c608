"""Changes of the logits that come before the choice: bias, penalties, banned tokens.

Each rank changes its own tokens' logits and counts its own tokens only.
"""

import numpy as np

from shared.worker_messages import History, Sampling
from worker.comm.base import Floats
from worker.sampling.vocabulary import Ints, Vocabulary


class TokenCounts:
    """How often one sequence has had each of this rank's tokens."""

    def __init__(self, history: History, vocabulary: Vocabulary) -> None:
        self._first_id = vocabulary.first_id
        prompt = vocabulary.own_columns(_token_ids(history.prompt))
        output = vocabulary.own_columns(_token_ids(history.output))
        self.output = np.bincount(output, minlength=vocabulary.size).astype(np.float32)
        """[own tokens]; the prompt does not count."""
        self.seen = self.output > 0
        """[own tokens]; in the prompt or the output."""
        self.seen[prompt] = True

    def add(self, token: int) -> None:
        """One more token of the output, which may be another rank's, or none (negative)."""
        column = token - self._first_id
        if 0 <= column < len(self.output):
            self.output[column] += 1
            self.seen[column] = True

    def penalise(self, logits: Floats, sampling: Sampling) -> None:
        """Change one row [own tokens] in place.

        Repetition: positive logits are divided, others multiplied (Keskar et al. 2019). Presence and
        frequency: as OpenAI defines them, for tokens of the output.
        """
        columns = np.flatnonzero(self.seen)
        changed, counts = logits[columns], self.output[columns]
        if sampling.repetition_penalty != 1:
            penalty = sampling.repetition_penalty
            changed = np.where(changed > 0, changed / penalty, changed * penalty)
        changed -= sampling.frequency_penalty * counts
        changed -= sampling.presence_penalty * np.sign(counts)
        logits[columns] = changed


def change_logits(
    logits: Floats,
    sampling: Sampling,
    position: int,
    counts: TokenCounts | None,
    vocabulary: Vocabulary,
) -> None:
    """Change one row [own tokens] in place; `counts` if the sampling penalises.

    A row with NaN or +inf becomes all NaN, so that no change can hide it.
    """
    if not logits.size:
        return
    if not logits.max() < np.inf:
        logits[:] = np.nan
        return
    if sampling.logit_bias:
        ids = np.array(list(sampling.logit_bias), dtype=np.int64)
        bias = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        logits[vocabulary.own_columns(ids)] += bias[vocabulary.holds(ids)]
    if counts is not None:
        counts.penalise(logits, sampling)
    if sampling.banned_before > position:
        banned = np.array(sampling.banned, dtype=np.int64)
        logits[vocabulary.own_columns(banned)] = -np.inf


def _token_ids(data: bytes) -> Ints:
    return np.frombuffer(data, dtype="<i4").astype(np.int64)
