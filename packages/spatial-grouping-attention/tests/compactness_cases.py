"""Compactness alone: with queries and keys of zero the memberships are a closed form of the distances.

Written in float64 over the window of every token of one long axis, where the whole matrix would not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from grouping_cases import cell_by_distance
from spatial_grouping_attention import Neighbourhood
from torch import Tensor

# Ordinary and awkward axes of about 4096 tokens: odd and even strides, padding, dilation, border cells larger than
# the stride.
LONG = {
    "stride 2": Neighbourhood((4096,), (2048,), 2, 3, 1, 3),
    "stride 3, padded": Neighbourhood((4095,), (1366,), 3, 4, 2, 3),
    "dilated": Neighbourhood((4096,), (1366,), 3, 4, 2, 5, 2),
    "stride 5, border cells": Neighbourhood((4096,), (818,), 5, 7, 0, 5),
}


@dataclass
class Alone:
    """Operands without content, and what the memberships then are."""

    neighbourhood: Neighbourhood
    compactness: Tensor
    """(H,) in float64."""
    u: Tensor
    """(1, H, N_out, C) in float64, values of the groups; of the tokens likewise."""
    v: Tensor

    def content(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Queries and keys of zero."""
        relation, heads = self.neighbourhood, len(self.compactness)
        sizes = (relation.num_groups, relation.num_inputs)
        q, k = (torch.zeros(1, heads, n, 16, dtype=dtype) for n in sizes)
        return q, k

    def results(self, compactness: Tensor, u: Tensor, v: Tensor) -> dict[str, Tensor]:
        """What ``assign`` and ``group`` are: u at the tokens, the normalisers, the groups' averages of v."""
        groups, seen, squares = windows(self.neighbourhood)
        scores = (-compactness[:, None, None] * squares).masked_fill(~seen, -torch.inf)
        members = scores.softmax(-1)
        carried = (members[..., None] * u[0][:, groups]).sum(-2)
        shape = (len(compactness), self.neighbourhood.num_groups)
        mass = members.new_zeros(shape).index_add(1, groups.flatten(), members.flatten(1))
        weighed = (members[..., None] * v[0][:, :, None]).flatten(1, 2)
        sums = members.new_zeros(*shape, v.shape[-1]).index_add(1, groups.flatten(), weighed)
        return {"assign": carried[None], "lse": scores.logsumexp(-1)[None], "group": (sums / mass[..., None])[None]}


def windows(neighbourhood: Neighbourhood) -> tuple[Tensor, Tensor, Tensor]:
    """Of every token of one axis: the groups of its window, which of them exist, and the squared distances."""
    columns = [getattr(neighbourhood, name)[0] for name in ("input_shape", "output_shape", "stride", "kernel_size")]
    size, groups, stride, kernel = columns
    padding, window, dilation = neighbourhood.padding[0], neighbourhood.window[0], neighbourhood.dilation[0]
    near, seen, squares = [], [], []
    for index in range(size):
        # Looked for among the groups around it, because the search goes through all it is given.
        first = min(max(index // stride - 3, 0), max(groups - 8, 0))
        few = min(groups, 8)
        cell = first + cell_by_distance(index - first * stride, size, few, stride, kernel, padding)
        row = [cell + dilation * (entry - window // 2) for entry in range(window)]
        seen.append([0 <= group < groups for group in row])
        near.append([min(max(group, 0), groups - 1) for group in row])
        squares.append([((2 * (index - group * stride + padding) - (kernel - 1)) / (2 * stride)) ** 2 for group in row])
    return torch.tensor(near), torch.tensor(seen), torch.tensor(squares, dtype=torch.float64)


def alone(name: str) -> Alone:
    """A case of :data:`LONG`, two heads of it."""
    neighbourhood = LONG[name]
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.randn(1, 2, n, 16, generator=generator, dtype=torch.float64)
        for n in (neighbourhood.num_groups, neighbourhood.num_inputs)
    )
    return Alone(neighbourhood, torch.tensor([0.3, 2.0], dtype=torch.float64), u, v)


def compare(
    case: Alone,
    dtype: torch.dtype,
    assign: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    group: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> dict[str, float]:
    """Largest errors, relative to the largest value, of results and of gradients to the compactness.

    Args:
        case: what to compute.
        dtype: of queries, keys and values; compactness is float32 at least.
        assign: of (q, k, u, compactness), the operator under test.
        group: of (q, k, v, compactness), likewise.
    """
    q, k = case.content(dtype)
    exact = case.compactness.clone().requires_grad_()
    given = case.compactness.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    u, v = case.u.to(dtype), case.v.to(dtype)
    want = case.results(exact, u.double(), v.double())
    carried, lse = assign(q, k, u, given)
    got = {"assign": carried, "lse": lse, "group": group(q, k, v, given)}
    errors = {}
    for name, theirs in want.items():
        errors[name] = _relative(got[name], theirs)
        # A weight of one sign, so that the sum over tokens is as large as its terms.
        weight = theirs.detach().sign() * torch.arange(1, theirs.shape[-1] + 1) / theirs.shape[-1]
        (mine,) = torch.autograd.grad((got[name].double() * weight).sum(), given, retain_graph=True)
        (exactly,) = torch.autograd.grad((theirs * weight).sum(), exact, retain_graph=True)
        errors[f"gradient of {name}"] = _relative(mine, exactly)
    return errors


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max()).item()
