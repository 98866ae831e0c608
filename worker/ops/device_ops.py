"""The decoder's arithmetic in torch on one device, weights, activations and KV cache included.

The residual stream is float32; products take their inputs and give their outputs in the compute
dtype, which is the weights', or bfloat16 where those are int8, and add up in float32. Each rank
multiplies its own columns at once, and the ranks' sums are added up by the device's collectives.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from shared.errors import ModelError
from shared.worker_messages import SequenceStep
from worker.comm.base import Floats
from worker.comm.device import Accelerator
from worker.kv_cache import KVCache, block_bytes
from worker.native.sampling import Wanted
from worker.ops.base import NO_SUMS, HeadLayout, HeadNorms, RopeTable, Source
from worker.ops.device_step import DeviceStep, attend
from worker.ops.torch_ops import prepare, uneven_kv_of_head
from worker.sampling.vocabulary import Doubles, Ints, StepLogits, best_of


@dataclass(frozen=True)
class Int8Weight:
    """A weight [N, K] whose rows are integers times a scale each."""

    values: torch.Tensor
    """[N, K] int8."""
    scales: torch.Tensor
    """[N], in the compute dtype."""

    @classmethod
    def of(cls, weight: torch.Tensor, compute: torch.dtype) -> "Int8Weight":
        """Rounded to the nearest; the largest number of a row becomes 127."""
        rows = weight.float()
        scales = (rows.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return cls((rows / scales[:, None]).round().to(torch.int8), scales.to(compute))


Matrix = torch.Tensor | Int8Weight


class DeviceOps:
    """See Ops."""

    def __init__(
        self,
        accelerator: Accelerator,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        sliding_window: int | None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """dtype: of the weights; int8 computes in bfloat16. progress: is told the weight bytes so far."""
        self.device = accelerator.device
        self._collectives = accelerator.collectives
        self._dtype, self._kv_dtype, self._window = dtype, kv_dtype, sliding_window
        self._compute = torch.bfloat16 if dtype == torch.int8 else dtype
        self._progress = progress
        self._forward: Callable[[], torch.Tensor] | None = None
        self._take: Callable[[Floats], None] | None = None
        self.weight_bytes = 0
        self.comm_seconds = 0.0  # collectives run on the device, beside the host
        self._cache: KVCache | None = None
        self._kv_of_head: torch.Tensor | None = None
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
        return self._matrix(source)

    def row_weight(
        self, source: Source, widths: Sequence[int], *, head_dim: int | None = None
    ) -> Matrix:
        """See Ops."""
        return self._matrix(source)

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
        uneven = uneven_kv_of_head(layout)
        self._kv_of_head = None if uneven is None else uneven.to(self.device)
        shape = (layers, len(layout.kv_heads), layout.head_dim, blocks + 1)
        try:
            self._cache = KVCache(*shape, self._kv_dtype, self.device)
        except torch.OutOfMemoryError:
            size = (blocks + 1) * self.block_bytes(layers, layout)
            raise ModelError(
                f"{self.device} has no room for a KV cache of {size / 1e9:.2f} GB:"
                " give less --kv-memory, or unload a model"
            ) from None

    def _matrix(self, source: Source) -> Matrix:
        read = source.read()
        if self._dtype != torch.int8:
            return self._count(read.to(self.device, self._dtype))
        weight = Int8Weight.of(read.to(self.device), self._compute)
        self._count(weight.scales)
        self._count(weight.values)
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
        if delta is not None:
            x = x + delta
        return x, self._norm(x, weight, eps)

    def final_norm(
        self, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See Ops."""
        x = x + delta
        for span, total in self._now.pooled:
            hidden = F.rms_norm(x[span], weight.shape, weight, eps)
            total += hidden.double().sum(0).cpu().numpy()
        rows = self._now.logit_rows
        return self._norm(x if rows is None else x[rows], weight, eps)

    def linear(self, x: torch.Tensor, weight: Matrix) -> torch.Tensor:
        """See Ops."""
        x = x.to(self._compute)
        if isinstance(weight, Int8Weight):
            return F.linear(x, weight.values.to(self._compute)) * weight.scales
        return F.linear(x, weight)

    def add_bias(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        return x + bias

    def linear_all_reduce(self, x: torch.Tensor, weight: Matrix) -> torch.Tensor:
        """See Ops. The sum is of one product for each rank, not for each virtual shard."""
        return self._collectives.all_reduce(self.linear(x, weight))

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
        tokens, heads, kv_heads = len(qkv), len(layout.heads), len(layout.kv_heads)
        if not heads:  # fewer heads than virtual shards
            return qkv.new_empty((tokens, 0))
        by_head = qkv.view(tokens, heads + 2 * kv_heads, layout.head_dim)
        rotated = by_head[:, : heads + kv_heads].float()
        if norms is not None:
            rotated = torch.cat(
                (
                    F.rms_norm(rotated[:, :heads], (layout.head_dim,), norms.query, norms.eps),
                    F.rms_norm(rotated[:, heads:], (layout.head_dim,), norms.key, norms.eps),
                ),
                dim=1,
            )
        rotated = _rotate(rotated, *self._angles_of(rope))
        q, k = rotated[:, :heads].to(self._compute), rotated[:, heads:]
        self._cache.write(layer, k, by_head[:, heads + kv_heads :], self._now.places)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        mixed = attend(q, keys, values, self._now, self._kv_of_head)
        return mixed.reshape(tokens, heads * layout.head_dim)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def probe(self, x: torch.Tensor, delta: torch.Tensor) -> None:
        """See Ops."""
        if self._take is not None:
            self._take((x + delta).cpu().numpy())

    def logits(self, x: torch.Tensor, head: Matrix) -> torch.Tensor:
        """See Ops."""
        return self.linear(x, head).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, eps).to(self._compute)

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
        return self._forward()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, head_dim] by its position; cos, sin [T, 1, head_dim / 2].

    Dimension i is paired with i + head_dim / 2, as in Hugging Face checkpoints.
    """
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
