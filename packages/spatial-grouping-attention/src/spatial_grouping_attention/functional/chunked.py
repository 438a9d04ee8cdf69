"""What the windowed operators do with one chunk of tiles: operands in, logits, running sums out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..geometry import Neighbourhood
from .tiles import Chunk, Tiling

# Stands for "nothing seen yet" in running maxima: finite, so that differences with it are never NaN.
LOWEST = -1e30


class Problem:
    """The operands of one call and how a chunk of them is loaded, in the accumulation dtype."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        bias: Tensor | None,
        valid: Tensor | None,
        geometry: list[int],
        scale: float,
    ) -> None:
        """Operands as in :mod:`.reference`; ``geometry`` is ``Neighbourhood.integers()``."""
        self.q, self.k, self.bias, self.valid, self.scale = q, k, bias, valid, scale
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.tiling = Tiling(Neighbourhood.from_integers(geometry), q.device)
        self.batch, self.heads, self.num_groups, self.head_size = q.shape
        self.num_tokens = k.shape[2]

    def chunks(self, value_size: int = 0, *, split_heads: bool = True) -> Iterator[Chunk]:
        """The chunks of this call."""
        channels = max(self.head_size, value_size)
        return self.tiling.chunks(self.batch, self.heads, channels, split_heads=split_heads)

    def sums(self, channels: int) -> Tensor:
        """Zeroed padded sums over tiles."""
        shape = (self.batch, self.heads, *self.tiling.padded_shape, channels)
        return torch.zeros(shape, dtype=self.dtype, device=self.q.device)

    def per_token(self, *channels: int) -> Tensor:
        """Uninitialised result per fine token: every chunk writes its slab, and the slabs cover all tokens."""
        shape = (self.batch, self.heads, self.num_tokens, *channels)
        return torch.empty(shape, dtype=self.dtype, device=self.q.device)

    def tokens(self, chunk: Chunk, x: Tensor) -> Tensor:
        """Load a chunk's tiles of a tensor of fine tokens."""
        return chunk.load_tokens(x).to(self.dtype)

    def groups(self, chunk: Chunk, x: Tensor) -> Tensor:
        """Load a chunk's tiles of a tensor of groups."""
        return chunk.load_groups(x).to(self.dtype)

    def scaled_queries(self, chunk: Chunk) -> Tensor:
        """Load a chunk's queries times ``scale``."""
        return self.groups(chunk, self.q).mul_(self.scale)

    def logits(self, chunk: Chunk, scaled_q: Tensor, k: Tensor) -> Tensor:
        """(b, h, tiles, P, Q), -inf where a pair is not visible."""
        scores = k @ scaled_q.mT
        if self.bias is not None:
            table = self.bias[chunk.heads].flatten(1).to(self.dtype)
            scores += table[:, chunk.tables.window_entry]
        scores.masked_fill_(chunk.tables.hidden, -torch.inf)
        if self.valid is not None:
            valid = chunk.load_tokens(self.valid[:, None].expand(-1, self.heads, -1))
            scores.masked_fill_(~valid[..., None], -torch.inf)
        return scores

    def bias_sums(self) -> Tensor:
        """Zeroed gradient of the bias table, empty where there is none."""
        shape = (0,) if self.bias is None else self.bias.shape
        return torch.zeros(shape, dtype=self.dtype, device=self.q.device)

    def collect_bias(self, chunk: Chunk, gradient: Tensor, dscores: Tensor) -> None:
        """Add the logits' gradient, summed over samples and equal offsets, to the table's."""
        if self.bias is None:
            return
        entry = chunk.tables.window_entry.flatten()
        rows = gradient.flatten(1)[chunk.heads]
        for row, weights in zip(rows, dscores.sum(0).flatten(1), strict=True):
            row += torch.bincount(entry, weights, row.numel())


class Collector:
    """Running softmax over the members of every group, merged from tile to tile.

    The merge is the online softmax of Milakov & Gimelshein (2018, arXiv:1805.02867): a group all of whose
    members much prefer other groups still keeps an exact average, where summing plain probabilities underflows.
    """

    def __init__(self, problem: Problem, value_size: int) -> None:
        """Empty sums for values of ``value_size`` channels."""
        self.tiling = problem.tiling
        self.sums = problem.sums(value_size + 1)
        self.highest = torch.full_like(self.sums[..., 0], LOWEST)

    def add(self, chunk: Chunk, scores: Tensor, v: Tensor) -> None:
        """Add exp(scores) of a chunk (which is overwritten) times its values, and the masses."""
        folded = chunk.fold(scores.amax(-2)[..., None], maximum=True).squeeze(-1)
        before = chunk.slab_of_groups(self.highest, folded.shape[2])
        now = torch.maximum(before, folded)
        chunk.slab_of_groups(self.sums, folded.shape[2]).mul_((before - now).exp_()[..., None])
        before.copy_(now)
        weights = scores.sub_(chunk.load_padded(self.highest)[..., None, :]).exp_()
        chunk.collect(self.sums, torch.cat((weights.mT @ v, weights.sum(-2)[..., None]), -1))

    def result(self) -> tuple[Tensor, Tensor]:
        """(out, log_mass) of all groups; 0 and -inf where a group has no member."""
        sums = self.tiling.crop(self.sums)
        highest = self.tiling.crop(self.highest[..., None]).squeeze(-1)
        mass = sums[..., -1:]
        out = sums[..., :-1] / mass.masked_fill(mass == 0, 1.0)
        return out, mass.squeeze(-1).log() + highest


def normaliser(scores: Tensor) -> Tensor:
    """Logsumexp over the groups; +inf for slots without a token, so that ``exp(s - lse)`` is 0."""
    lse = scores.logsumexp(-1)
    return lse.masked_fill_(lse == -torch.inf, torch.inf)
