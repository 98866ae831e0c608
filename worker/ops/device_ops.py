"""The decoder's arithmetic on one device, weights, activations and KV cache included.

The residual stream is float32; products take their inputs and give their outputs in the compute
dtype, which is the weights', or bfloat16 where those are int8, and add up in float32. Each rank
multiplies its own columns at once, and the ranks' sums are added up by the device's collectives; with
deterministic kernels there is a sum for each virtual shard, and they are added in the fixed tree.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from shared.worker_messages import SequenceStep
from worker.comm.base import Floats
from worker.comm.device import Accelerator
from worker.device import check_room
from worker.kv_cache import KVCache, block_bytes
from worker.native.sampling import Wanted
from worker.ops.base import NO_SUMS, HeadLayout, HeadNorms, RopeTable, Source
from worker.ops.device_kernels import DeviceKernels, Heads, Int8Weight, Matrix
from worker.ops.device_step import DeviceStep
from worker.ops.torch_ops import prepare
from worker.sampling.vocabulary import Doubles, Ints, StepLogits, best_of


@dataclass(frozen=True)
class RowWeight:
    """A weight whose inputs are this rank's, and how many of them each owned virtual shard has."""

    matrix: Matrix
    """[N, K]; int8 of deterministic kernels has scales [S, N]."""
    widths: list[int]


class DeviceOps:
    """See Ops."""

    def __init__(
        self,
        accelerator: Accelerator,
        kernels: DeviceKernels,
        shard_counts: Sequence[int],
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        sliding_window: int | None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """shard_counts: virtual shards of every rank. dtype: of the weights; int8 computes in bfloat16.

        progress: is told the weight bytes so far.
        """
        self.device = accelerator.device
        self._kernels, self._shard_counts = kernels, tuple(shard_counts)
        self._collectives = accelerator.collectives
        self._dtype, self._kv_dtype, self._window = dtype, kv_dtype, sliding_window
        self._compute = torch.bfloat16 if dtype == torch.int8 else dtype
        self._progress = progress
        self._forward: Callable[[], torch.Tensor] | None = None
        self._take: Callable[[Floats], None] | None = None
        self.weight_bytes = 0
        self.comm_seconds = 0.0  # collectives run on the device, beside the host
        self._cache: KVCache | None = None
        self._heads: Heads | None = None
        self._step: DeviceStep | None = None
        self._rope: RopeTable | None = None
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None

    # --- loading ---

    def vector(self, values: torch.Tensor, *, head_dim: int | None = None) -> torch.Tensor:
        """See Ops."""
        return values.to(self.device, torch.float32)

    def table(self, rows: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        return self._count(rows.to(self.device, self._compute))

    def weight(
        self,
        source: Source,
        *,
        head_dim: int | None = None,
        token_ids: Sequence[range] | None = None,
    ) -> Matrix:
        """See Ops."""
        return self._counted(self._read(source))

    def row_weight(
        self, source: Source, widths: Sequence[int], *, head_dim: int | None = None
    ) -> RowWeight:
        """See Ops."""
        if self._dtype == torch.int8 and self._kernels.deterministic:
            # A scale for each row of a shard: what a rank owns besides must not matter.
            pieces = torch.split(source.read().to(self.device), list(widths), dim=1)
            shards = [self._quantized(piece) for piece in pieces]
            values = torch.cat([shard.values for shard in shards], dim=1)
            scales = torch.stack([shard.scales for shard in shards])
            return RowWeight(self._counted(Int8Weight(values, scales)), [*widths])
        return RowWeight(self._counted(self._read(source)), [*widths])

    def block_bytes(self, layers: int, layout: HeadLayout) -> int:
        """See Ops."""
        return block_bytes(layers, len(layout.kv_heads), layout.head_dim, self._kv_dtype)

    def observe(self, take: Callable[[Floats], None]) -> None:
        """See Ops."""
        self._take = take

    def allocate(
        self,
        forward: Callable[[], torch.Tensor],
        layers: int,
        layout: HeadLayout,
        blocks: int,
        tokens: int,
    ) -> None:
        """See Ops. One block more is there for rows that only fill up a batch: number `blocks`."""
        self._forward = forward
        self._heads = Heads.of(layout, self.device)
        shape = (layers, len(layout.kv_heads), layout.head_dim, blocks + 1)
        self._cache = KVCache(*shape, self._kv_dtype, self.device)

    def _read(self, source: Source) -> Matrix:
        read = source.read()
        if self._dtype == torch.int8:
            return self._quantized(read.to(self.device))
        return read.to(self.device, self._dtype).contiguous()

    def _quantized(self, weight: torch.Tensor) -> Int8Weight:
        if not weight.shape[1]:  # of a virtual shard without heads
            nothing = weight.new_zeros(weight.shape, dtype=torch.int8)
            return Int8Weight(nothing, weight.new_ones(len(weight), dtype=self._compute))
        return Int8Weight.of(weight, self._compute)

    def _counted(self, weight: Matrix) -> Matrix:
        if isinstance(weight, Int8Weight):
            self._count(weight.scales)
            self._count(weight.values)
        else:
            self._count(weight)
        return weight

    def _count(self, weight: torch.Tensor) -> torch.Tensor:
        self.weight_bytes += weight.nbytes
        self._progress(self.weight_bytes)
        return weight

    # --- a forward pass ---

    def embed(self, table: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        return table[self._now.ids].float()

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Ops."""
        return self._kernels.add_norm(x, delta, weight, eps, self._compute)

    def final_norm(
        self, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See Ops."""
        for span, total in self._now.pooled:
            hidden = F.rms_norm(x[span] + delta[span], weight.shape, weight, eps)
            total += hidden.double().sum(0).cpu().numpy()
        rows = self._now.logit_rows
        if rows is not None:
            x, delta = x[rows], delta[rows]
        return self._kernels.add_norm(x, delta, weight, eps, self._compute)[1]

    def linear(self, x: torch.Tensor, weight: Matrix) -> torch.Tensor:
        """See Ops."""
        return self._kernels.linear(x.to(self._compute), weight)

    def add_bias(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        return x + bias

    def linear_all_reduce(self, x: torch.Tensor, weight: RowWeight) -> torch.Tensor:
        """See Ops. Of deterministic kernels only the sum is of a product for each virtual shard."""
        if not self._kernels.deterministic:
            return self._collectives.all_reduce(self.linear(x, weight.matrix))
        x = x.to(self._compute)
        own = self._kernels.shard_products(x, weight.matrix, weight.widths)
        return _tree_sum(self._of_all_ranks(own))

    def _of_all_ranks(self, own: torch.Tensor) -> torch.Tensor:
        """Partial sums [own shards, T, N] of every rank -> [virtual shards, T, N]."""
        if self._collectives.world == 1:
            return own
        most = max(self._shard_counts)
        every = self._collectives.all_gather(F.pad(own, (0, 0, 0, 0, 0, most - len(own))))
        counts = self._shard_counts
        return torch.cat([rows[:count] for rows, count in zip(every, counts, strict=True)])

    def attention(
        self,
        qkv: torch.Tensor,
        rope: RopeTable,
        layer: int,
        layout: HeadLayout,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor:
        """See Ops."""
        assert self._cache is not None, "allocate comes before steps"
        assert self._heads is not None, "allocate comes before steps"
        tokens, heads = len(qkv), len(layout.heads)
        if not heads:  # fewer heads than virtual shards
            return qkv.new_empty((tokens, 0))
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        angles, places = self._angles_of(rope), self._now.places
        q = self._kernels.rotate_and_store(qkv, angles, places, norms, keys, values, layout)
        q = q.to(self._compute)
        mixed = self._kernels.attend(q, keys, values, self._now, self._heads)
        return mixed.reshape(tokens, heads * layout.head_dim)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        return self._kernels.swiglu(gate_up)

    def probe(self, x: torch.Tensor, delta: torch.Tensor) -> None:
        """See Ops."""
        if self._take is not None:
            self._take((x + delta).cpu().numpy())

    def logits(self, x: torch.Tensor, head: Matrix) -> torch.Tensor:
        """See Ops."""
        return self.linear(x, head).float()

    def _angles_of(self, rope: RopeTable) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the step's positions, [T, 1, head_dim / 2] each; looked up once a step."""
        if self._angles is None:
            if self._rope is None:
                self._rope = RopeTable(rope.cos.to(self.device), rope.sin.to(self.device))
            at = self._now.positions
            self._angles = self._rope.cos[at][:, None], self._rope.sin[at][:, None]
        return self._angles

    @property
    def _now(self) -> DeviceStep:
        assert self._step is not None, "operations belong to a step"
        return self._step

    # --- steps ---

    def copy_block(self, source: int, target: int) -> None:
        """See Ops."""
        assert self._cache is not None, "allocate comes before steps"
        self._cache.copy(source, target)

    def run(
        self,
        sequences: Sequence[SequenceStep],
        last_tokens: Ints,
        wanted: Wanted | None = None,
        sums: Mapping[int, Doubles] = NO_SUMS,
        *,
        every_token: bool = False,
    ) -> StepLogits:
        """See Ops. Logits are copied to the host; a DeviceChooser does without."""
        logits: Floats = self.forward(
            self.prepared(sequences, last_tokens, sums, every_token=every_token)
        ).numpy(force=True)
        if not logits.flags.writeable:
            logits = logits.copy()
        return StepLogits(logits, best_of(logits), range(len(logits)))

    def prepared(
        self,
        sequences: Sequence[SequenceStep],
        last_tokens: Ints,
        sums: Mapping[int, Doubles] = NO_SUMS,
        *,
        every_token: bool = False,
    ) -> DeviceStep:
        """What `run` computes for these sequences, on the device."""
        step = prepare(sequences, last_tokens, self._window, sums, every_token)
        return DeviceStep.of(step, self._window, self.device)

    def prepared_decode(
        self, ids: torch.Tensor, positions: torch.Tensor, table: torch.Tensor
    ) -> DeviceStep:
        """See DeviceStep.of_decode."""
        return DeviceStep.of_decode(ids, positions, table, self._window)

    @torch.inference_mode()
    def forward(self, step: DeviceStep) -> torch.Tensor:
        """Logits [B, own tokens] float32, on the device."""
        assert self._forward is not None, "allocate comes before steps"
        self._step, self._angles = step, None
        check_room(len(step.ids))
        return self._forward()


def _tree_sum(partials: torch.Tensor) -> torch.Tensor:
    """[S, T, N] -> [T, N]: neighbours first, so that the order depends on nothing but S, a power of two."""
    while len(partials) > 1:
        partials = partials[0::2] + partials[1::2]
    return partials[0]
