"""Chooses tokens on the device that has the logits, without the host: the sampler's rules in torch.

The same noise, cuts and order as `noise`, `cuts` and `sampler`, which define them; sums are added in
another order. Rows whose logits are changed or reported are the sampler's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from shared.worker_messages import Sampling
from worker.comm.device import Collectives
from worker.sampling.cuts import is_cut, temperature_of
from worker.sampling.noise import FIRST_FACTOR, GOLDEN_GAMMA, SECOND_FACTOR, mix
from worker.sampling.sampler import NOT_FINITE
from worker.sampling.vocabulary import Vocabulary

INTEGERS, NUMBERS = 3, 3
"""Columns of the packed form of a row's parameters."""


class Manner(Enum):
    """How the rows of a batch are chosen; each manner can do what those before it can."""

    GREEDY = 0
    NOISY = 1
    CUT = 2


def manner_of(sampling: Sequence[Sampling]) -> Manner:
    """The least that these rows need."""
    if all(s.temperature == 0 for s in sampling):
        return Manner.GREEDY
    return Manner.CUT if any(s.temperature > 0 and is_cut(s) for s in sampling) else Manner.NOISY


def is_choosable(s: Sampling, position: int) -> bool:
    """Whether tokens from this position on follow from the logits as they are, unreported."""
    changed = s.logit_bias or s.penalises or s.banned_before > position
    return s.logprobs < 0 and not changed


def pack(s: Sampling) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """The parameters of a row as INTEGERS integers and NUMBERS numbers, for `Draws.of`."""
    seed = _signed(mix(s.seed))
    if s.temperature == 0:
        return (seed, 0, 0), (1.0, np.inf, 0.0)
    return (seed, 1, s.top_k), (temperature_of(s), s.top_p if s.top_p < 1 else np.inf, s.min_p)


@dataclass(frozen=True)
class Draws:
    """How B rows are to be drawn; each tensor is [B, 1], on the device."""

    seeds: torch.Tensor
    """int64: the bits of the mixed seeds."""
    noisy: torch.Tensor
    """int64: 0 takes the best."""
    top_k: torch.Tensor
    """int64; 0: no such cut."""
    temperature: torch.Tensor
    """float64, as the next two."""
    top_p: torch.Tensor
    """Infinite: no such cut."""
    min_p: torch.Tensor
    """0: no such cut."""

    @classmethod
    def of(cls, integers: torch.Tensor, numbers: torch.Tensor) -> "Draws":
        """Views of packed rows: [B, INTEGERS] int64 and [B, NUMBERS] float64."""
        columns = [integers[:, i : i + 1] for i in range(INTEGERS)]
        columns += [numbers[:, i : i + 1] for i in range(NUMBERS)]
        return cls(*columns)


class DeviceSampler:
    """Tokens from sharded logits on a device, the same on every rank."""

    def __init__(self, collectives: Collectives, vocabulary: Vocabulary) -> None:
        self._collectives, self._vocabulary = collectives, vocabulary

    def __call__(
        self, logits: torch.Tensor, positions: torch.Tensor, draws: Draws, manner: Manner
    ) -> torch.Tensor:
        """A token id for each row [B] int64, or NOT_FINITE; never waits for the device.

        logits: [B, own tokens] float32; positions: [B] int64, of the tokens to choose.
        """
        if manner is Manner.CUT:
            whole = self._whole(logits)
            highest = whole.max(dim=1).values
            chosen = _draw(whole, positions, draws)
            return torch.where(highest.isfinite(), chosen, NOT_FINITE)
        return self._agree(*self._own_best(logits, positions, draws, manner))

    def _own_best(
        self, logits: torch.Tensor, positions: torch.Tensor, draws: Draws, manner: Manner
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score and id of this rank's best token: [B] float64 and int64."""
        size, first = self._vocabulary.size, self._vocabulary.first_id
        if not size:  # fewer groups of tokens than virtual shards
            nothing = logits.new_full((len(logits),), -np.inf, dtype=torch.float64)
            return nothing, torch.zeros_like(positions)
        highest, columns = logits.max(dim=1)
        if manner is Manner.GREEDY:
            return highest.double(), columns + first
        ids = torch.arange(first, first + size, device=logits.device)
        noisy, noisy_columns = _scores(logits, ids, positions, draws).max(dim=1)
        finite = highest.isfinite()
        # Scores that are not finite stay as they are: no rank may hide them.
        score = torch.where(finite, noisy, highest.double())
        return score, torch.where(finite, noisy_columns, columns) + first

    def _agree(self, scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The ids [B] of the best scores [B] of all ranks."""
        if self._collectives.world > 1:
            every = self._collectives.all_gather(torch.stack((scores, ids.double())))
            # NaN counts as the highest; the lowest rank, so the lowest id, among equals.
            rank = every[:, 0].argmax(dim=0, keepdim=True)
            scores = every[:, 0].gather(0, rank)[0]
            ids = every[:, 1].gather(0, rank)[0].long()
        return torch.where(scores.isfinite(), ids, NOT_FINITE)

    def _whole(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, own tokens] of every rank -> [B, vocabulary]."""
        if self._collectives.world == 1:
            return logits
        sizes = self._vocabulary.sizes
        padded = torch.nn.functional.pad(logits, (0, max(sizes) - logits.shape[1]))
        every = self._collectives.all_gather(padded)
        return torch.cat([rows[:, :size] for rows, size in zip(every, sizes, strict=True)], dim=1)


def uniform(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What `noise.uniform` gives: keys [B, 1], ids [M] or [B, M] int64 -> [B, M] float64."""
    z = (ids + 1) * _signed(GOLDEN_GAMMA) + keys
    return (_shifted(_mixed(z), 12).double() + 0.5) * 2.0**-52


def noise_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What `noise.noise_keys` gives: mixed seeds [B, 1], positions [B] -> [B, 1] int64."""
    return _mixed(seeds + (positions[:, None] + 1) * _signed(GOLDEN_GAMMA))


def _scores(
    logits: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor, draws: Draws
) -> torch.Tensor:
    """Logits over temperature, with Gumbel noise where it is wanted: [B, M] float64."""
    gumbel = -(-uniform(noise_keys(draws.seeds, positions), ids).log()).log()
    return logits / draws.temperature + gumbel * draws.noisy


def _draw(logits: torch.Tensor, positions: torch.Tensor, draws: Draws) -> torch.Tensor:
    """A token of each row [B] after all cuts, from whole logits [B, vocabulary]."""
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    size = values.shape[1]
    weights = ((values.double() - values[:, :1]) / draws.temperature).exp()
    running = weights.cumsum(dim=1)
    unlimited = draws.top_k == 0
    by_rank = torch.where(unlimited, size, draws.top_k.clamp(max=size))
    total = running.gather(1, by_rank - 1)
    by_mass = (running < draws.top_p * total).sum(dim=1, keepdim=True) + 1
    by_ratio = (weights >= draws.min_p).sum(dim=1, keepdim=True)
    kept = torch.minimum(torch.minimum(by_rank, by_mass), by_ratio)
    scores = _scores(values, ids, positions, draws)
    left_out = torch.arange(size, device=logits.device) >= kept
    best = scores.masked_fill(left_out, -np.inf).argmax(dim=1, keepdim=True)
    return ids.gather(1, best)[:, 0]


def _mixed(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function; products of int64 wrap as those of uint64 do."""
    z = (z ^ _shifted(z, 30)) * _signed(FIRST_FACTOR)
    z = (z ^ _shifted(z, 27)) * _signed(SECOND_FACTOR)
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right as if int64 had no sign, which torch's own shift copies."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of a uint64."""
    return word - (1 << 64) if word >> 63 else word
