"""Random cases, the formula written a second time, and a memory meter: shared by the test files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from RoSE import Grid, RotarySpatialEmbedding
from torch import Tensor

DIRECTIONS = ("axial", "mixed", "uniform")
SCALINGS = ("none", "linear", "sqrt", "adaptive")
LAYOUTS = ("bnd", "bnhd", "bhnd")


@dataclass(frozen=True)
class Case:
    """One embedding and one grid, reproducible from its description."""

    spatial_dims: int
    num_heads: int
    head_dim: int
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    options: tuple[tuple[str, object], ...]
    seed: int

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def tokens(self) -> int:
        return Grid(self.shape).size

    def embedding(self, dtype: torch.dtype = torch.float64, **more: object) -> RotarySpatialEmbedding:
        torch.manual_seed(self.seed)
        options = dict(self.options) | more
        return RotarySpatialEmbedding(
            self.dim, self.num_heads, self.spatial_dims, reference_spacing=4.0, dtype=dtype, **options
        )

    def features(self, tokens: int | None = None, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(batch, tokens or self.tokens, self.dim, generator=generator, dtype=dtype)


@st.composite
def cases(draw: Callable[..., object], **fixed: object) -> Case:
    """Cases over one to four dimensions and all options of the embedding."""
    spatial_dims = draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=spatial_dims, max_size=spatial_dims)))
    step = st.floats(0.05, 3.0)
    options = {
        "learnable": draw(st.booleans()),
        "base_theta": draw(st.sampled_from([10.0, 1e4])),
        "rotary_ratio": draw(st.sampled_from([0.5, 0.7, 1.0])),
        "frequency_scaling": draw(st.sampled_from(SCALINGS)),
        "directions": draw(st.sampled_from(DIRECTIONS)),
        "rotary_partition": draw(st.sampled_from(["channels", "heads"])),
        "interleaved": draw(st.booleans()),
    } | fixed
    return Case(
        spatial_dims=spatial_dims,
        num_heads=draw(st.integers(2, 4)),
        head_dim=2 * draw(st.integers(4, 9)),
        shape=shape,
        spacing=tuple(draw(st.lists(step, min_size=spatial_dims, max_size=spatial_dims))),
        options=tuple(options.items()),
        seed=draw(st.integers(0, 2**16)),
    )


def to_layout(x: Tensor, heads: int, layout: str) -> Tensor:
    """Lay ``(batch, tokens, dim)`` out in another way."""
    if layout == "bnd":
        return x
    split = x.unflatten(-1, (heads, -1))
    return split if layout == "bnhd" else split.transpose(1, 2)


def from_layout(x: Tensor, layout: str) -> Tensor:
    """Back to ``(batch, tokens, dim)``."""
    if layout == "bnd":
        return x
    return (x.transpose(1, 2) if layout == "bhnd" else x).flatten(2)


def formula_scores(
    embedding: RotarySpatialEmbedding, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor
) -> Tensor:
    """Scores straight from the definition, in complex float64: no rotation of q or k, no angles per token.

    ``sum_c Re(q_c conj(k_c) exp(i <p_n - p_m, w_c>))`` over the planes, plus plain products elsewhere.
    """
    freqs = embedding.freqs.detach().to(torch.float64)
    turning, planes, _ = freqs.shape
    q, k = (t.to(torch.float64).unflatten(-1, (embedding.num_heads, -1)) for t in (q, k))
    apart = q_positions.unsqueeze(-2) - k_positions.unsqueeze(-3)
    phase = torch.einsum("nmd,hpd->hnmp", apart.to(torch.float64), freqs)
    wave = torch.polar(torch.ones_like(phase), phase)

    def pairs(t: Tensor) -> Tensor:
        part = t[..., :turning, : 2 * planes]
        if embedding.interleaved:
            return torch.complex(part[..., 0::2], part[..., 1::2])
        return torch.complex(part[..., :planes], part[..., planes:])

    total = torch.einsum("bnhd,bmhd->bhnm", q, k)
    plain = torch.einsum("bnhp,bmhp->bhnm", pairs(q), pairs(k).conj()).real
    turned = torch.einsum("bnhp,bmhp,hnmp->bhnm", pairs(q), pairs(k).conj(), wave)
    total[:, :turning] += turned.real - plain
    return total


def scores(embedding: RotarySpatialEmbedding, q: Tensor, k: Tensor) -> Tensor:
    """Inner products per head of ``(batch, tokens, dim)`` features: ``(batch, heads, n, m)``."""
    q, k = (t.unflatten(-1, (embedding.num_heads, -1)).transpose(1, 2) for t in (q, k))
    return q @ k.transpose(-2, -1)


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """Measure the most memory that tensors hold at one time, above what they held at the start."""
    peak: list[int] = []
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        yield peak
    moves = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held, highest = 0, 0
    for event in sorted(moves, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    peak.append(highest)
