"""Windowed operators through NATTEN's neighbourhood attention, which knows equal grids only.

Repeat every group ``stride`` times per axis and let the dilation be ``stride`` (times the window's own): then the
neighbours of fine token i are the repeats, at i's own offset within a cell, of exactly the groups that i sees. Each
offset is a dilation group of its own, so all of them are served in one call.

``assign`` is that call. ``pool`` is its transpose: sum_i A_ij [v_i, 1] is the gradient with respect to the values
for the output gradient [v, 1], summed over the repeats. What the windows need at the borders rides in channels:
the grid of groups is padded so that no window is ever shifted, and one channel hides the padding; a bias table
takes one channel per entry, compactness six per axis (:class:`_Blocks`). This answers what is asked in
SHI-Labs/NATTEN issues 262, 248, 25 and 198.

NATTEN takes a gradient for the log-sum-exp it returns and ignores it, so ``lse`` gets its gradient here.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Neighbourhood
from ..geometry.axis import Axis
from .autograd import Once, without_autocast
from .operands import Operands, Pooled, Problem
from .semantics import widened

# Logit of a group that does not exist: far below any other, those of far groups under compactness included. Nothing
# that matters is ever added to it, and finite it leaves no NaN.
HIDDEN = -1e30


def refusals(problem: Problem) -> list[str]:
    """Reasons why NATTEN cannot serve a call; empty where it can."""
    reasons = []
    device, neighbourhood = problem.device, problem.neighbourhood
    if importlib.util.find_spec("natten") is None:
        reasons.append("natten is not installed: pip install 'spatial-grouping-attention[natten]'")
    elif device.type == "cuda":
        import natten

        if not natten.HAS_LIBNATTEN:
            reasons.append("this build of natten has no CUDA kernels (natten.HAS_LIBNATTEN is False)")
    if device.type != "cuda":
        reasons.append(f"natten has no gradients on {device.type}, and pooling is one even in the forward pass")
    if problem.dtype == torch.float64:
        reasons.append("natten does not take float64")
    if problem.bias == "full":
        reasons.append("natten takes a bias per window offset only; got one for every pair")
    if neighbourhood is None:
        reasons.append("natten is windowed: it needs a neighbourhood")
        return reasons
    if neighbourhood.ndim > 3:
        reasons.append(f"natten has 1, 2 and 3 axes; got {neighbourhood.ndim}")
    for i, axis in enumerate(neighbourhood.axes):
        if axis.window == 1:
            reasons.append(f"natten needs windows of 3 or more; got 1 along axis {i}")
        if axis.offset > 0 or axis.offset + axis.groups * axis.stride < axis.size:
            reasons.append(
                f"natten needs cells of stride tokens, but border cells of axis {i} own more: size {axis.size}, "
                f"stride {axis.stride}, kernel {axis.kernel}, padding {axis.padding}"
            )
    return reasons


def assign(x: Operands) -> tuple[Tensor, Tensor]:
    """``A u`` and the tokens' normalisers."""
    x, dtype = _widened(x), x.values.dtype
    grids = _Grids(x)
    fine, groups, values = _fit(*grids.operands(x), grids.repeat(x.values))
    out = grids.crop_tokens(_attend(fine, groups, values, grids)[0])[..., : x.values.shape[-1]]
    lse = _normaliser(fine, groups, grids)
    nobody, lse = _nobody(x, lse), grids.with_own_places(x, lse)
    if nobody is not None:
        out, lse = out.masked_fill(nobody[..., None], 0.0), lse.masked_fill(nobody, torch.inf)
    return out.to(dtype), lse


def pool(x: Operands, lse: Tensor | None) -> Pooled:
    """Averages over the members of every group; without ``lse`` with the logits' own normalisers."""
    x, dtype = _widened(x), x.values.dtype
    grids = _Grids(x)
    fine, groups = grids.operands(x)
    own = _normaliser(fine, groups, grids)
    nobody, own = _nobody(x, own), grids.with_own_places(x, own)
    # exp(s - lse) = A exp(own - lse), where A is what one call can transpose.
    share = torch.ones_like(own) if lse is None else (own - lse).exp()
    if nobody is not None:
        share = share.masked_fill(nobody, 0.0)
    if lse is None:
        lse = own if nobody is None else own.masked_fill(nobody, torch.inf)
    out, log_mass = _collect(fine, groups, x.values, share, grids)
    return Pooled(out.to(dtype), log_mass, lse)


def _widened(x: Operands) -> Operands:
    """Half types in float32: here sums and masses are results of a kernel, and gradients are differences of them."""
    dtype = widened(x.q.dtype)
    bias = None if x.bias is None else x.bias.to(dtype)
    return x._replace(q=x.q.to(dtype), k=x.k.to(dtype), values=x.values.to(dtype), bias=bias)


def _nobody(x: Operands, lse: Tensor) -> Tensor | None:
    """Tokens that belong to no group, (B, 1 or H, N_in); None where every token belongs to some."""
    nobody = None if x.valid is None else ~x.valid[:, None, :]
    if x.valid_groups is not None:
        sees_nothing = lse < HIDDEN / 2
        nobody = sees_nothing if nobody is None else nobody | sees_nothing
    return nobody


class _Grids:
    """The padded equal grids on which NATTEN works, (B, *grid, H, C)."""

    def __init__(self, x: Operands) -> None:
        neighbourhood = cast(Neighbourhood, x.neighbourhood)
        self.axes = neighbourhood.axes
        self.input_shape = neighbourhood.input_shape
        self.output_shape = neighbourhood.output_shape
        self.window = tuple(axis.window for axis in self.axes)
        self.dilation = tuple(axis.stride * axis.dilation for axis in self.axes)
        self.halo = tuple(_halo(axis) for axis in self.axes)
        self.padded = tuple(axis.groups + 2 * halo for axis, halo in zip(self.axes, self.halo, strict=True))

    def operands(self, x: Operands) -> tuple[Tensor, Tensor]:
        """Fine and repeated group operands whose products are the logits; border, bias and hidden groups included."""
        fine = [x.k * x.scale, torch.ones_like(x.k[..., :1])]
        hidden = torch.zeros_like(x.q[..., :1])
        if x.valid_groups is not None:
            hidden = hidden.masked_fill(~x.valid_groups[:, None, :, None], HIDDEN)
        groups = [x.q, hidden]
        if x.compactness is not None:
            tokens, of_groups = self._place_channels(x.compactness)
            fine.append(tokens.to(x.k).expand(*x.k.shape[:2], -1, -1))
            groups.append(of_groups.to(x.q.dtype).expand(x.q.shape[0], -1, -1, -1))
        if x.bias is not None:
            table, one_hot = self._bias_channels(x.bias)
            fine.append(table.expand(x.k.shape[0], -1, -1, -1))
            groups.append(one_hot.to(x.q.dtype).expand(*x.q.shape[:2], -1, -1))
        padded = self._pad(torch.cat(groups, -1), self.output_shape, self._group_padding())
        border = torch.full(self.padded, HIDDEN, dtype=x.q.dtype, device=x.q.device)
        border[tuple(slice(h, h + g) for h, g in zip(self.halo, self.output_shape, strict=True))] = 0.0
        at_border = F.pad(border[..., None, None], (x.q.shape[-1], padded.shape[-1] - x.q.shape[-1] - 1))
        return self.pad_tokens(torch.cat(fine, -1)), self._repeat_padded(padded + at_border)

    def repeat(self, u: Tensor) -> Tensor:
        """Values of the groups (B, H, N_out, C), padded and repeated to the fine grid."""
        return self._repeat_padded(self._pad(u, self.output_shape, self._group_padding()))

    def pad_tokens(self, x: Tensor) -> Tensor:
        """Values of the tokens (B, H, N_in, C) on the padded fine grid, zero around them."""
        sides = []
        for axis, halo, padded in zip(self.axes, self.halo, self.padded, strict=True):
            before = halo * axis.stride - axis.offset
            sides.append((before, padded * axis.stride - before - axis.size))
        return self._pad(x, self.input_shape, sides)

    def crop_tokens(self, x: Tensor) -> Tensor:
        """(B, *padded fine grid, H, C) -> (B, H, N_in, C)."""
        inner = []
        for axis, halo in zip(self.axes, self.halo, strict=True):
            before = halo * axis.stride - axis.offset
            inner.append(slice(before, before + axis.size))
        return x[(slice(None), *inner)].flatten(1, -3).transpose(1, 2)

    def sum_repeats(self, x: Tensor) -> Tensor:
        """(B, *padded fine grid, H, C) -> sums over every group's repeats, (B, H, N_out, C)."""
        split = [n for axis, padded in zip(self.axes, self.padded, strict=True) for n in (padded, axis.stride)]
        x = x.reshape(x.shape[0], *split, *x.shape[-2:]).sum([2 + 2 * i for i in range(len(self.axes))])
        inner = tuple(slice(h, h + g) for h, g in zip(self.halo, self.output_shape, strict=True))
        return x[(slice(None), *inner)].flatten(1, -3).transpose(1, 2)

    def _group_padding(self) -> list[tuple[int, int]]:
        return [(halo, halo) for halo in self.halo]

    def _pad(self, x: Tensor, shape: tuple[int, ...], sides: list[tuple[int, int]]) -> Tensor:
        grid = x.transpose(1, 2).reshape(x.shape[0], *shape, x.shape[1], x.shape[3])
        return F.pad(grid, (0, 0, 0, 0, *itertools.chain(*reversed(sides))))

    def _repeat_padded(self, x: Tensor) -> Tensor:
        for dim, axis in enumerate(self.axes, start=1):
            x = x.repeat_interleave(axis.stride, dim)
        return x

    def with_own_places(self, x: Operands, lse: Tensor) -> Tensor:
        """Normalisers with ``- compactness x^2``, which no softmax over groups sees; see :class:`_Blocks`."""
        if x.compactness is None:
            return lse
        squares = torch.zeros(1, dtype=lse.dtype, device=lse.device)
        for axis in self.axes:
            own = _Blocks(axis).of_tokens()[1].square().to(squares)
            squares = (squares[:, None] + own).flatten()
        return lse - x.compactness[:, None] * squares

    def _place_channels(self, compactness: Tensor) -> tuple[Tensor, Tensor]:
        """Minus compactness times squared distance, less the tokens' own part, as products of channels.

        Returns:
            (N_in, 6 * axes): per axis and colour, one and the local place, where the token has that colour;
            (H, N_out, 6 * axes): the factors of both, for a token of that colour.
        """
        fine, groups = [], []
        for i, axis in enumerate(self.axes):
            blocks = _Blocks(axis)
            colour, place = blocks.of_tokens()
            chosen = F.one_hot(colour, 3).to(place)
            ones_and_places = torch.stack((chosen, chosen * place[:, None]), -1).flatten(1)
            fine.append(_along(i, ones_and_places, self.input_shape))
            seen = blocks.of_groups()
            factors = torch.stack((-seen.square(), 2 * seen), -1).flatten(1)
            groups.append(_along(i, factors, self.output_shape))
        return torch.cat(fine, -1), compactness[:, None, None] * torch.cat(groups, -1).to(compactness)

    def _bias_channels(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A table as products of channels: the groups of a window differ in their ranks modulo the window.

        Returns:
            (H, N_in, prod(window)): the entry of the group with each residue; (N_out, prod(window)): one-hot residues.
        """
        heads, device = bias.shape[0], bias.device
        entry = torch.zeros(1, 1, dtype=torch.long, device=device)
        residue = torch.zeros(1, dtype=torch.long, device=device)
        for axis in self.axes:
            cells = torch.tensor([axis.cell(i) for i in range(axis.size)], device=device) // axis.dilation
            ranks = torch.arange(axis.groups, device=device) // axis.dilation
            window = torch.arange(axis.window, device=device)
            entries = (window[None, :] - cells[:, None] + axis.radius) % axis.window
            entry = (entry[:, None, :, None] * axis.window + entries[None, :, None, :]).flatten(0, 1).flatten(1, 2)
            residue = (residue[:, None] * axis.window + ranks % axis.window).flatten()
        table = bias.reshape(heads, -1)[:, entry]
        return table, F.one_hot(residue, table.shape[-1])


def _along(i: int, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows of the indices along axis i, for all points of a grid: (points, channels)."""
    before, after = math.prod(shape[:i]), math.prod(shape[i + 1 :])
    return rows[None, :, None].expand(before, -1, after, -1).flatten(0, 2)


class _Blocks:
    """Places along an axis of groups as small numbers: relative to blocks of groups, in three alternating colours.

    With blocks as wide as a token's reach, all that it sees lies in its own block and the two beside it. Of three
    blocks in a row each has another colour, so a group knows by a token's colour which block the token is in, and both
    can be told from the centre of that block: ``-|x - y|^2 = -x^2 + 2 x y - y^2`` in numbers no larger than the reach,
    wherever on the grid. The colour is a choice of channels.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.width = max(axis.reach, 1)

    def of_tokens(self) -> tuple[Tensor, Tensor]:
        """Colour of every fine index (size,), and its place from the centre of its block, in float64."""
        axis = self.axis
        blocks = torch.tensor([axis.cell(i) for i in range(axis.size)]) // self.width
        twice = 2 * torch.arange(axis.size) - (axis.kernel - 1) + 2 * axis.padding
        return blocks % 3, (twice - axis.stride * self._twice_centre(blocks)).double() / (2 * axis.stride)

    def of_groups(self) -> Tensor:
        """Places of every group from the centres of the blocks around it, by their colour: (groups, 3), float64."""
        places = torch.arange(self.axis.groups)
        blocks = places // self.width
        # The block of a colour that is next to a block, or that block itself.
        step = (torch.arange(3) - blocks[:, None] + 1) % 3 - 1
        return (2 * places[:, None] - self._twice_centre(blocks[:, None] + step)).double() / 2

    def _twice_centre(self, blocks: Tensor) -> Tensor:
        return 2 * blocks * self.width + self.width - 1


def _halo(axis: Axis) -> int:
    """Groups to add on both sides, so that no real window is shifted and NATTEN accepts the grid."""
    return max(axis.reach, -((axis.groups - axis.window * axis.dilation) // 2))


def _fit(*operands: Tensor) -> tuple[Tensor, ...]:
    """Zero channels up to one head size for all, a multiple of eight."""
    size = max(x.shape[-1] for x in operands)
    size += -size % 8
    return tuple(F.pad(x, (0, size - x.shape[-1])) for x in operands)


def _attend(fine: Tensor, groups: Tensor, values: Tensor, grids: _Grids) -> tuple[Tensor, Tensor]:
    """One neighbourhood attention: (B, *grid, H, C) and its log-sum-exp (B, *grid, H)."""
    import natten

    call = getattr(natten, f"na{fine.ndim - 3}d")
    out, lse = call(fine, groups, values, kernel_size=grids.window, dilation=grids.dilation, scale=1.0, return_lse=True)
    return out, lse


def _normaliser(fine: Tensor, groups: Tensor, grids: _Grids) -> Tensor:
    """lse (B, H, N_in) with the gradient that NATTEN does not give: dl/dk = E[q], dl/dq = A k."""
    fine, groups = _fit(fine, groups)
    expected, lse = _attend(fine.detach(), groups.detach(), groups, grids)
    slope = (fine * expected.detach() + fine.detach() * expected).sum(-1)
    lse = lse.detach() + (slope - slope.detach())
    return grids.crop_tokens(lse.unsqueeze(-1)).squeeze(-1)


def _collect(fine: Tensor, groups: Tensor, v: Tensor, share: Tensor, grids: _Grids) -> tuple[Tensor, Tensor]:
    """(out, log_mass): sums of v and of one over the groups' members, weighted by A times a share per token."""
    values = torch.cat((v, torch.ones_like(v[..., :1])), -1) * share.unsqueeze(-1)
    fine, groups, values = _fit(fine, groups, grids.pad_tokens(values))
    repeated: Tensor = _Transposed.apply(fine, groups, values, grids)  # type: ignore[no-untyped-call]
    sums = grids.sum_repeats(repeated)[..., : v.shape[-1] + 1]
    mass = sums[..., -1:]
    out = sums[..., :-1] / mass.masked_fill(mass == 0, 1.0)
    empty = mass.squeeze(-1) == 0
    log_mass = mass.squeeze(-1).masked_fill(empty, 1.0).log().masked_fill(empty, -torch.inf)
    return out, log_mass


class _Transposed(torch.autograd.Function):
    """A^T values, as the gradient of ``A x`` with respect to x for the output gradient ``values``."""

    @staticmethod
    def forward(ctx: Any, fine: Tensor, groups: Tensor, values: Tensor, grids: _Grids) -> Tensor:
        ctx.save_for_backward(fine, groups, values)
        ctx.grids = grids
        with torch.enable_grad():
            unknown = torch.zeros_like(groups).requires_grad_()
            out, _ = _attend(fine.detach(), groups.detach(), unknown, grids)
            return torch.autograd.grad(out, unknown, values)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *Once.apply(_transposed_backward, *ctx.saved_tensors, gradient, ctx.grids), None  # type: ignore[no-untyped-call]


@without_autocast
def _transposed_backward(
    fine: Tensor, groups: Tensor, values: Tensor, gradient: Tensor, grids: _Grids
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        fine, groups = fine.detach().requires_grad_(), groups.detach().requires_grad_()
        out, _ = _attend(fine, groups, gradient, grids)
        dfine, dgroups = torch.autograd.grad(out, (fine, groups), values)
    return dfine, dgroups, out.detach()
