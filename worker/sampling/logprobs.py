"""Log probabilities of tokens under the model's own logits, for those who ask for them."""

from collections.abc import Sequence

import numpy as np

from shared.worker_messages import TokenLogprobs
from worker.comm.base import Communicator, Floats
from worker.sampling.candidates import candidates, merge
from worker.sampling.vocabulary import Ints, Vocabulary, gather, partial_sums, softmax_sums


def logprobs_of(
    comm: Communicator, vocabulary: Vocabulary, own: Floats, tokens: Ints, top: Sequence[int]
) -> list[TokenLogprobs]:
    """Of the chosen `tokens` [R] and the `top` [R] most probable ones. Takes one collective.

    own: [R, own tokens] as the model gave them, without NaN and +inf. Tokens of probability 0 are
    not among the most probable ones.
    """
    ones = np.ones((len(own), 1))
    chosen = np.full(len(own), -np.inf)
    held = vocabulary.holds(tokens)
    chosen[held] = own[held, vocabulary.own_columns(tokens)]
    every_chosen, every_sum, every_best = gather(
        comm,
        chosen,
        partial_sums(own, ones, vocabulary),
        candidates(own, max(top), vocabulary),
    )
    highest, sums = softmax_sums(every_sum, ones, vocabulary)
    log_total = highest + np.log(sums)
    values, ids, _ = merge(every_best, ())
    chosen_logprobs = (every_chosen.max(axis=0) - log_total[:, 0]).tolist()
    found = []
    for row, count in enumerate(top):
        logprobs = (values[row, :count] - log_total[row]).tolist()
        best = zip(ids[row, :count].tolist(), logprobs, strict=True)
        found.append(TokenLogprobs(chosen_logprobs[row], [(i, p) for i, p in best if p > -np.inf]))
    return found
