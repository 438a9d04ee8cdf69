"""Random grouping problems, and an oracle that states grouping from its definition alone.

Nothing here imports the operators under test. Which token sees which group is decided by loops over indices;
memberships, averages and normalisers are written with the full matrix in float64, and autograd differentiates them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from engine_cases import BACKENDS
from hypothesis import strategies as st
from spatial_grouping_attention import Neighbourhood
from torch import Tensor

LARGEST = {1: 14, 2: 6, 3: 4}


def cell_by_distance(index: int, size: int, groups: int, stride: int, kernel: int, padding: int) -> int:
    """The group whose block of ``stride`` indices has its centre nearest to an index.

    A block is centred on its group's receptive field, and where that would cut an index in half, half an index
    later. Distances are doubled to stay whole; two centres are never equally near.
    """

    def twice_centre(group: int) -> int:
        return 2 * (group * stride - padding) + (kernel - 1) + (kernel - stride) % 2

    return min(range(groups), key=lambda group: abs(2 * index - twice_centre(group)))


@lru_cache(maxsize=256)
def window_entries(neighbourhood: Neighbourhood) -> Tensor:
    """Entry of the flattened window that each pair reads, (N_in, N_out); -1 where the token does not see the group."""
    axes = list(
        zip(
            neighbourhood.input_shape,
            neighbourhood.output_shape,
            neighbourhood.stride,
            neighbourhood.kernel_size,
            neighbourhood.padding,
            neighbourhood.window,
            neighbourhood.dilation,
            strict=True,
        )
    )
    entry_of: list[dict[tuple[int, int], int]] = []
    for size, groups, stride, kernel, padding, window, dilation in axes:
        seen = {}
        for index in range(size):
            cell = cell_by_distance(index, size, groups, stride, kernel, padding)
            for entry in range(window):
                group = cell + dilation * (entry - window // 2)
                if 0 <= group < groups:
                    seen[index, group] = entry
        entry_of.append(seen)
    tokens = list(itertools.product(*(range(n) for n in neighbourhood.input_shape)))
    groups_ = list(itertools.product(*(range(n) for n in neighbourhood.output_shape)))
    rows = []
    for token in tokens:
        row = []
        for group_ in groups_:
            flat = 0
            for seen, pair, window in zip(entry_of, zip(token, group_, strict=True), neighbourhood.window, strict=True):
                entry = seen.get(pair, -1)
                flat = -1 if flat < 0 or entry < 0 else flat * window + entry
            row.append(flat)
        rows.append(row)
    return torch.tensor(rows)


@lru_cache(maxsize=256)
def squared_distances(neighbourhood: Neighbourhood) -> Tensor:
    """|p_i - p_j|^2 in units of the group spacing, (N_in, N_out) in float64, from the centres of receptive fields."""
    axes = zip(
        neighbourhood.input_shape,
        neighbourhood.output_shape,
        neighbourhood.stride,
        neighbourhood.kernel_size,
        neighbourhood.padding,
        strict=True,
    )
    of_axes = []
    for size, groups, stride, kernel, padding in axes:
        fields = [[group * stride - padding + tap for tap in range(kernel)] for group in range(groups)]
        centres = [sum(field) / kernel for field in fields]
        of_axes.append([[((index - centre) / stride) ** 2 for centre in centres] for index in range(size)])
    tokens = list(itertools.product(*(range(n) for n in neighbourhood.input_shape)))
    groups_ = list(itertools.product(*(range(n) for n in neighbourhood.output_shape)))
    rows = [
        [sum(square[i][j] for square, i, j in zip(of_axes, token, group, strict=True)) for group in groups_]
        for token in tokens
    ]
    return torch.tensor(rows, dtype=torch.float64)


@dataclass(frozen=True, repr=False)
class Case:
    """The arguments of one call, in one dtype."""

    neighbourhood: Neighbourhood | None
    q: Tensor
    k: Tensor
    v: Tensor
    u: Tensor
    lse: Tensor
    bias: Tensor | None
    valid: Tensor | None
    valid_groups: Tensor | None
    scale: float | None
    pair_bias: Tensor | None = None
    compactness: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype; lse keeps float32 at least, as the operators return it."""
        wide = torch.promote_types(dtype, torch.float32)
        cast = {name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "u")}
        biases = {name: getattr(self, name).to(dtype) for name in self._biases()}
        if self.compactness is not None:
            biases["compactness"] = self.compactness.to(wide)
        return replace(self, **cast, lse=self.lse.to(wide), **biases)

    def leaves(self) -> dict[str, Tensor]:
        """Fresh leaves of everything that gets a gradient."""
        names = ["q", "k", "v", "u", "lse", *self._biases()]
        return {name: getattr(self, name).detach().clone().requires_grad_() for name in names}

    def _biases(self) -> list[str]:
        return [name for name in ("bias", "pair_bias", "compactness") if getattr(self, name) is not None]

    def with_leaves(self, leaves: dict[str, Tensor]) -> Case:
        """This case on given leaves."""
        return replace(self, **leaves)

    def __repr__(self) -> str:
        """Sizes and options; the numbers themselves come from the seed."""
        sizes = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in ("q", "k", "v"))
        biases = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in self._biases())
        valid = None if self.valid is None else self.valid.sum(1).tolist()
        groups = None if self.valid_groups is None else self.valid_groups.sum(1).tolist()
        masks = f"valid={valid}, valid_groups={groups}"
        return f"Case({sizes}, {biases or 'no bias'}, {masks}, scale={self.scale}, {self.neighbourhood})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of a failing example."""
        printer.text(repr(self))

    @property
    def options(self) -> dict[str, object]:
        """Keywords that all operators share."""
        return {
            "scale": self.scale,
            "bias": self.bias,
            "pair_bias": self.pair_bias,
            "compactness": self.compactness,
            "valid": self.valid,
            "valid_groups": self.valid_groups,
        }


def oracle_scores(case: Case) -> tuple[Tensor, Tensor]:
    """Logits s_ij = scale <k_i, q_j> + bias (B, H, N_in, N_out), and which pairs count."""
    batch, heads, num_groups, head_size = case.q.shape
    num_tokens = case.k.shape[2]
    scale = 1.0 / math.sqrt(head_size) if case.scale is None else case.scale
    scores = scale * torch.einsum("bhid,bhjd->bhij", case.k, case.q)
    counts = torch.ones(batch, heads, num_tokens, num_groups, dtype=torch.bool)
    if case.neighbourhood is not None:
        entries = window_entries(case.neighbourhood)
        counts = counts & (entries >= 0)
        if case.bias is not None:
            scores = scores + case.bias.flatten(1)[:, entries.clamp(min=0)]
    if case.compactness is not None:
        scores = scores - case.compactness[:, None, None] * squared_distances(case.neighbourhood)
    if case.pair_bias is not None:
        scores = scores + case.pair_bias
    if case.valid is not None:
        counts = counts & case.valid[:, None, :, None]
    if case.valid_groups is not None:
        counts = counts & case.valid_groups[:, None, None, :]
    return scores, counts


def members(case: Case) -> Tensor:
    """Tokens that belong to some group, (B, H, N_in) boolean."""
    return oracle_scores(case)[1].any(-1)


def _softmax(scores: Tensor, counts: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Shares of the counted pairs along ``dim`` (0 where there is none), and their logsumexp (-inf there)."""
    highest = scores.detach().masked_fill(~counts, -1e300).amax(dim, keepdim=True)
    weights = torch.where(counts, scores - highest, 0.0).exp() * counts
    total = weights.sum(dim, keepdim=True)
    some = total > 0
    lse = torch.where(some, torch.where(some, total, 1.0).log() + highest, -torch.inf)
    return weights / torch.where(some, total, 1.0), lse.squeeze(dim)


def oracle_assign(case: Case) -> tuple[Tensor, Tensor]:
    """A u, and l; +inf for tokens that belong to nobody."""
    scores, counts = oracle_scores(case)
    members, lse = _softmax(scores, counts, -1)
    return torch.einsum("bhij,bhjc->bhic", members, case.u), lse.masked_fill(lse == -torch.inf, torch.inf)


def oracle_pool(case: Case) -> tuple[Tensor, Tensor]:
    """softmax_i(s_ij - l_i) v with the case's l, and the logarithm of the sums of exp(s_ij - l_i)."""
    scores, counts = oracle_scores(case)
    shares, log_mass = _softmax(scores - case.lse[..., None], counts, -2)
    return torch.einsum("bhij,bhic->bhjc", shares, case.v), log_mass


def oracle_group(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(out, l, log mass) of A_ij = softmax_j s_ij and out_j = sum_i A_ij v_i / sum_i A_ij."""
    _, lse = oracle_assign(case)
    finite = lse.masked_fill(lse == torch.inf, 0.0)
    out, log_mass = oracle_pool(replace(case, lse=finite))
    return out, lse, log_mass


def finite(x: Tensor) -> Tensor:
    """Infinite normalisers and masses (of nobody, of nothing) as 0, without a gradient."""
    return x.masked_fill(x.isinf(), 0.0)


def gradients(outputs: tuple[Tensor, ...], leaves: dict[str, Tensor], *, retain: bool = False) -> dict[str, Tensor]:
    """Gradients of a random weighting of the outputs; zeros for leaves that they do not depend on.

    Weights are numbers that every dtype has: what arrives at an output is then the same for all of them, unrounded.
    """
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(x.shape, generator=generator).bfloat16().double() for x in outputs)
    total = sum((finite(x).double() * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=retain)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def natural_sizes(case: Case) -> dict[str, float]:
    """How large the terms are that make up each result and gradient, before they cancel in sums.

    Gradients of a softmax are differences, which can vanish exactly; logsumexps are differences of logits. Rounding
    is relative to what is subtracted, so that is what a floating type's tolerance refers to.
    """
    scores, _ = oracle_scores(case)
    largest = {name: getattr(case, name).abs().max().item() for name in ("q", "k", "v", "u")}
    scale = 1.0 / math.sqrt(case.q.shape[-1]) if case.scale is None else abs(case.scale)
    values = max(largest["v"], largest["u"])
    # What arrives at the logits: from the averages, and one from each normaliser and mass.
    dscores = values * math.sqrt(case.v.shape[-1]) + 1.0
    return {
        "out": values,
        "log": max(1.0, scores.abs().max().item()),
        "q": scale * dscores * largest["k"],
        "k": scale * dscores * largest["q"],
        "v": 1.0,
        "u": 1.0,
        "lse": dscores,
        "bias": dscores,
        "pair_bias": dscores,
        "compactness": dscores * _farthest(case),
    }


def _farthest(case: Case) -> float:
    """Largest squared distance of a token and a group that it sees, 1 at least."""
    if case.neighbourhood is None:
        return 1.0
    squares = squared_distances(case.neighbourhood)
    return max(1.0, squares[window_entries(case.neighbourhood) >= 0].max().item())


def assert_near(got: Tensor, want: Tensor, tolerance: float, what: str = "", *, size: float = 1e-3) -> None:
    """Largest difference within ``tolerance`` of the largest wanted value or ``size``; infinities exactly equal."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    assert not got.isnan().any(), f"{what}: NaN"
    assert torch.equal(got.isinf(), want.isinf()), f"{what}: infinities differ"
    infinite = want.isinf()
    assert torch.equal(got[infinite], want[infinite]), f"{what}: signs of infinities differ"
    got, want = got[~infinite], want[~infinite]
    if want.numel():
        error, size = (got - want).abs().max().item(), max(want.abs().max().item(), size)
        assert error <= tolerance * size, f"{what}: off by {error:.3g} of {size:.3g}"


@st.composite
def axes(draw: st.DrawFn, largest: int, *, covering: bool) -> tuple[int, ...]:
    """(n, G, stride, kernel, padding, window, dilation) of one axis, with every kind of awkwardness."""
    size = draw(st.integers(1, largest))
    padding = draw(st.integers(0, 2))
    kernel = draw(st.integers(1, min(5, size + 2 * padding)))
    stride = draw(st.integers(1, 5))
    groups = (size + 2 * padding - kernel) // stride + 1
    if covering:
        window, dilation = 2 * groups - 1 + 2 * draw(st.integers(0, 1)), 1
    else:
        window, dilation = draw(st.sampled_from((1, 3, 5))), draw(st.integers(1, 2))
    return size, groups, stride, kernel, padding, window, dilation


@st.composite
def neighbourhoods(draw: st.DrawFn, *, covering: bool = False, max_pairs: int = 4000) -> Neighbourhood:
    """A neighbourhood in 1, 2 or 3 dimensions, different along each axis."""
    ndim = draw(st.integers(1, 3))
    columns = [draw(axes(LARGEST[ndim], covering=covering)) for _ in range(ndim)]
    # Too many pairs for the oracle's loops: shorten the longest axes.
    while math.prod(c[0] for c in columns) * math.prod(c[1] for c in columns) > max_pairs:
        longest = max(range(ndim), key=lambda a: columns[a][0] * columns[a][1])
        columns[longest] = (3, 3, 1, 1, 0, *columns[longest][5:]) if not covering else (3, 3, 1, 1, 0, 5, 1)
    return Neighbourhood(*zip(*columns, strict=True))


@st.composite
def cases(draw: st.DrawFn, backend: str, *, strength: float = 1.0) -> Case:
    """A call that a backend can serve, in float64."""
    served = BACKENDS[backend]
    forms = (["none", "covering"] if served.dense else []) + (["windowed", "windowed"] if served.windowed else [])
    form = draw(st.sampled_from(forms))
    if form == "none":
        neighbourhood, num_tokens, num_groups = None, draw(st.integers(1, 24)), draw(st.integers(1, 12))
    else:
        neighbourhood = draw(neighbourhoods(covering=form == "covering"))
        num_tokens, num_groups = neighbourhood.num_inputs, neighbourhood.num_groups
    kinds = [kind for kind in served.biases if kind in (None, "full") or neighbourhood is not None]
    return make_case(
        neighbourhood,
        num_tokens,
        num_groups,
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        head_size=draw(st.sampled_from((1, 2, 4, 5, 8))),
        value_size=draw(st.sampled_from((1, 3, 8, 11))),
        bias=draw(st.sampled_from(kinds)),
        valid=draw(st.sampled_from((None, "some", "none in one sample"))),
        valid_groups=draw(st.sampled_from((None, None, "some", "none in one sample"))),
        scale=draw(st.sampled_from((None, 0.7))),
        compact=neighbourhood is not None and draw(st.booleans()),
        strength=strength,
        seed=draw(st.integers(0, 2**16)),
    )


def make_case(
    neighbourhood: Neighbourhood | None,
    num_tokens: int | None = None,
    num_groups: int | None = None,
    *,
    batch: int = 2,
    heads: int = 2,
    head_size: int = 8,
    value_size: int = 5,
    bias: str | None = None,
    valid: str | None = None,
    valid_groups: str | None = None,
    scale: float | None = None,
    compact: bool = False,
    strength: float = 1.0,
    seed: int = 0,
) -> Case:
    """Random operands in float64; ``strength`` multiplies the queries, so the logits."""
    if neighbourhood is not None:
        num_tokens, num_groups = neighbourhood.num_inputs, neighbourhood.num_groups
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    table = pairs = None
    if bias in ("table", "both"):
        table = random(heads, *neighbourhood.window)
    if bias in ("full", "both"):
        # One number for every pair, or the same for all samples, or for all heads too, or for all tokens.
        forms = (
            (batch, 1, num_tokens, num_groups),
            (1, heads, num_tokens, num_groups),
            (1, 1, num_tokens, num_groups),
            (batch, heads, 1, num_groups),
        )
        pairs = random(*forms[seed % 4])

    def some(what: str | None, size: int) -> Tensor | None:
        if what is None:
            return None
        mask = torch.rand(batch, size, generator=generator) < 0.7
        if what == "none in one sample" and batch:
            mask[-1] = False
        return mask

    masks = some(valid, num_tokens), some(valid_groups, num_groups)
    return Case(
        neighbourhood,
        strength * random(batch, heads, num_groups, head_size),
        random(batch, heads, num_tokens, head_size),
        random(batch, heads, num_tokens, value_size),
        random(batch, heads, num_groups, value_size),
        random(batch, heads, num_tokens),
        table,
        *masks,
        scale,
        pairs,
        random(heads).exp() if compact else None,
    )
