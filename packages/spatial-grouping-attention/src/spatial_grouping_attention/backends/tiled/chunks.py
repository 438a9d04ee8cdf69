"""Chunks of work: some samples, some heads and a run of tiles, loaded tile by tile and put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from ...geometry import Neighbourhood
from ..operands import Operands
from ..semantics import scalars_like, widened
from .tables import Run, runs_of, tiling_of

# A tile wants at least this many fine tokens per axis, or its matrix products are too small to be efficient;
# larger tiles spend more on groups that most of their tokens cannot see. Of 1 to 32, this was the best or close to it
# in 1-D, 2-D and 3-D, with strides 1 to 4 and windows 3 to 9.
TOKENS_PER_AXIS = 4

# Elements of one chunk's logits and operands together: about 4 MB in float32 on a CPU; on a GPU enough to fill it.
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


def _untraced(make: Callable[..., Any], *arguments: Any) -> Any:
    """What follows from numbers alone, made outside of the graph that ONNX traces: it becomes the graph's constants."""
    # Private to torch, so taken where nothing else will do.
    from torch.utils._python_dispatch import _disable_current_modes

    with torch._C.DisableTorchFunction(), _disable_current_modes():
        return make(*arguments)


class Tiles:
    """The operands of one call, cut into chunks; everything is computed in the accumulation dtype."""

    def __init__(self, x: Operands) -> None:
        """Operands whose bias is a table, if there is one."""
        self.x = x
        self.dtype = widened(x.q.dtype)
        self.neighbourhood = cast(Neighbourhood, x.neighbourhood)
        self.exported = torch.onnx.is_in_onnx_export()
        numbers = self.neighbourhood, TOKENS_PER_AXIS
        self.tiling = _untraced(tiling_of, *numbers) if self.exported else tiling_of(*numbers)
        self.table = None if x.bias is None else x.bias.flatten(1).to(self.dtype)
        self.squares = None if x.compactness is None else self.dtype

    def chunks(self, *, split_heads: bool = True) -> Iterator[Chunk]:
        """Cut the work along the first axis' tiles, heads and batch so that a chunk stays in the cache."""
        x, tiling = self.x, self.tiling
        if self.exported:  # a graph has no loop, and its batch may be of any size
            sizes = TOKENS_PER_AXIS, tiling.axes[0].num
            (run,) = _untraced(runs_of, self.neighbourhood, *sizes, x.q.device, self.squares)
            yield Chunk(self, run, slice(None), slice(None))
            return
        batch, heads = x.q.shape[:2]
        channels = max(x.q.shape[-1], x.values.shape[-1])
        tokens, groups = tiling.tokens_per_tile, tiling.groups_per_tile
        row = math.prod(a.num for a in tiling.axes[1:]) * (tokens * groups + (tokens + groups) * channels)
        budget = CHUNK_ELEMENTS.get(x.q.device.type, CHUNK_ELEMENTS["cpu"])
        # All heads and all samples share a run's index tables, so those are merged before rows are.
        per_head = max(1, min(heads, budget // row)) if split_heads else heads
        per_batch = max(1, min(batch, budget // (row * heads))) if per_head == heads else 1
        rows = max(1, budget // (row * per_head * per_batch))
        rows = min(rows, tiling.axes[0].num)
        for run in runs_of(self.neighbourhood, TOKENS_PER_AXIS, rows, x.q.device, self.squares):
            for b in range(0, batch, per_batch):
                for h in range(0, heads, per_head):
                    yield Chunk(self, run, slice(b, b + per_batch), slice(h, h + per_head))

    def sums(self, channels: int) -> Tensor:
        """Zeroed padded sums over tiles, (B, H, *padded_shape, channels)."""
        shape = (*self.x.q.shape[:2], *self.tiling.padded_shape, channels)
        return torch.zeros(shape, dtype=self.dtype, device=self.x.q.device)

    def per_token(self) -> Tensor:
        """Uninitialised number for every token: every chunk writes its run, and the runs cover all tokens."""
        return scalars_like(self.x.k)


class Chunk:
    """A run of tiles for some samples and heads; b, h are their numbers, T tiles of P tokens and Q groups."""

    def __init__(self, tiles: Tiles, run: Run, batch: slice, heads: slice) -> None:
        """What the chunk is cut from, and where."""
        self.tiles, self.run, self.batch, self.heads = tiles, run, batch, heads
        self.tables = run.tables
        self.token_slots = run.tables.hidden.shape[:2]
        self.group_slots = run.tables.hidden.shape[::2]
        self.padded = (batch, heads, run.padded_rows)
        """What of padded sums (B, H, *padded_shape, C) the chunk's tiles touch."""

    def tokens(self, x: Tensor) -> Tensor:
        """Load (B, H, N_in, C) as (b, h, T, P, C); without C as (b, h, T, P)."""
        x = _rows(x[self.batch, self.heads, self.run.tokens], self.tables.tokens)
        return torch.unflatten(x.to(self.tiles.dtype), 2, self.token_slots)

    def groups(self, x: Tensor) -> Tensor:
        """Load (B, H, N_out, C) as (b, h, T, Q, C); without C as (b, h, T, Q)."""
        x = _rows(x[self.batch, self.heads, self.run.groups], self.tables.groups)
        return torch.unflatten(x.to(self.tiles.dtype), 2, self.group_slots)

    def scaled_queries(self) -> Tensor:
        """Queries times ``scale``, (b, h, T, Q, D)."""
        return self.groups(self.tiles.x.q).mul_(self.tiles.x.scale)

    def logits(self, scaled_q: Tensor, k: Tensor) -> Tensor:
        """(b, h, T, P, Q), -inf where a pair is not visible."""
        x, tables = self.tiles.x, self.tables
        scores = k @ scaled_q.mT
        if self.tiles.table is not None:
            entries = self.tiles.table[self.heads].index_select(1, tables.window_entry.flatten())
            scores += entries.view(-1, *tables.window_entry.shape)
        if x.compactness is not None and tables.squares is not None:
            scores.addcmul_(tables.squares, x.compactness[self.heads, None, None, None], value=-1)
        scores.masked_fill_(tables.hidden, -torch.inf)
        if x.valid is not None:
            valid = x.valid[self.batch, self.run.tokens].index_select(1, tables.tokens)
            scores.masked_fill_(valid.logical_not().view(-1, 1, *tables.hidden.shape[:2], 1), -torch.inf)
        if x.valid_groups is not None:
            valid = x.valid_groups[self.batch, self.run.groups].index_select(1, tables.groups)
            shape = (-1, 1, tables.hidden.shape[0], 1, tables.hidden.shape[2])
            scores.masked_fill_(valid.logical_not().view(shape), -torch.inf)
        return scores

    def store(self, out: Tensor, tiles: Tensor) -> None:
        """Write (b, h, T, P[, C]) to its tokens of ``out`` (B, H, N_in[, C]); h and H may be 1 for all heads."""
        heads = slice(None) if out.shape[1] == 1 else self.heads
        out[self.batch, heads, self.run.tokens] = _rows(tiles.flatten(2, 3), self.tables.slot_of_token)

    def collect(self, sums: Tensor, tiles: Tensor) -> None:
        """Add (b, h, T, Q, C) to the padded sums (B, H, *padded_shape, C)."""
        sums[self.padded] += self.fold(tiles)

    def spread(self, padded: Tensor) -> Tensor:
        """The chunk's part (b, h, *padded rows) of padded numbers as (b, h, T, Q)."""
        flat = padded.flatten(2).index_select(2, self.tables.padded_groups)
        return torch.unflatten(flat, 2, self.group_slots)

    def fold(self, tiles: Tensor, *, maximum: bool = False) -> Tensor:
        """Overlap-add (or overlap-max) tiles (b, h, T, Q, C) to (b, h, *padded rows, C)."""
        axes = self.tiles.tiling.axes
        shape = (*tiles.shape[:2], *self.tables.tiles, *self.tiles.tiling.group_slots, tiles.shape[-1])
        x = tiles.reshape(shape)
        for a in reversed(range(len(axes))):
            x = _fold_axis(x, 2 + a, 2 + len(axes) + a, axes[a].cells, maximum)
        return x


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of (b, h, N, ...) by their numbers; with rows in front, whole rows are copied, which is much faster."""
    return x.transpose(1, 2).index_select(1, index).transpose(1, 2).contiguous()


def _fold_axis(x: Tensor, tile_dim: int, slot_dim: int, cells: int, maximum: bool) -> Tensor:
    """Merge an axis of tiles with its axis of slots: tile t's slot q lands on ``t * cells + q``.

    The slots are cut into stretches of ``cells``; each stretch of all tiles lands on disjoint positions, so a
    handful of shifted additions does it all, deterministically.
    """
    tiles, slots = x.shape[tile_dim], x.shape[slot_dim]
    stretches = -(-slots // cells)
    x = x.movedim(slot_dim, tile_dim + 1)
    shape = [*x.shape[:tile_dim], (tiles + stretches - 1) * cells, *x.shape[tile_dim + 2 :]]
    folded = x.new_full(shape, -torch.inf) if maximum else x.new_zeros(shape)
    for i in range(stretches):
        part = x.narrow(tile_dim + 1, i * cells, min(cells, slots - i * cells))
        target = torch.unflatten(folded.narrow(tile_dim, i * cells, tiles * cells), tile_dim, (tiles, cells))
        target = target.narrow(tile_dim + 1, 0, part.shape[tile_dim + 1])
        if maximum:
            target.copy_(torch.maximum(target, part))
        else:
            target.add_(part)
    return folded
