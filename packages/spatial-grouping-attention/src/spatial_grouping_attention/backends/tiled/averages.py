"""Averages over the members of every group, merged from tile to tile."""

from __future__ import annotations

import torch
from torch import Tensor

from ..semantics import LOWEST, rows_like
from .chunks import Chunk, Tiles


class RunningAverages:
    """Running softmax over the members of every group.

    The merge is the online softmax of Milakov & Gimelshein (2018, arXiv:1805.02867): a group all of whose
    members much prefer other groups still keeps an exact average, where summing plain probabilities underflows.
    """

    def __init__(self, tiles: Tiles) -> None:
        """Empty sums of the values and of the masses."""
        self.tiles = tiles
        self.sums = tiles.sums(tiles.x.values.shape[-1] + 1)
        self.highest = torch.full_like(self.sums[..., 0], LOWEST)

    def add(self, chunk: Chunk, scores: Tensor, v: Tensor) -> None:
        """Add exp(scores) of a chunk (which is overwritten) times its values, and the masses."""
        highest, sums = self.highest[chunk.padded], self.sums[chunk.padded]
        now = torch.maximum(highest, chunk.fold(scores.amax(-2)[..., None], maximum=True).squeeze(-1))
        sums.mul_((highest - now).exp_()[..., None])
        highest.copy_(now)
        weights = scores.sub_(chunk.spread(highest)[..., None, :]).exp_()
        sums.add_(chunk.fold(torch.cat((weights.mT @ v, weights.sum(-2)[..., None]), -1)))

    def result(self) -> tuple[Tensor, Tensor]:
        """(out, log_mass) of all groups; 0 and -inf where a group has no member."""
        values, crop = self.tiles.x.values, self.tiles.tiling.crop
        sums, highest = crop(self.sums), crop(self.highest)
        mass = sums[..., -1]
        log_mass = (mass.log() + highest).flatten(2)
        out = rows_like(values, log_mass.shape[2], values.shape[-1])
        averages = sums[..., :-1] / mass.masked_fill(mass == 0, 1.0)[..., None]
        out.copy_(averages.flatten(2, -2))
        return out, log_mass


def normaliser(scores: Tensor) -> Tensor:
    """Logsumexp over the groups; +inf for slots without a token, so that ``exp(s - lse)`` is 0."""
    lse = scores.logsumexp(-1)
    return lse.masked_fill_(lse == -torch.inf, torch.inf)
