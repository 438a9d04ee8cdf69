"""The registered operators under torch's function transforms (``torch.func``): gradients, and a batching rule.

What ``torch.library`` makes of a backward pass is not taken by ``torch.func.grad``, so under a transform each
operator is called through an autograd function of its own. Its rule for ``vmap`` makes one call of many: the mapped
axis becomes samples, or heads, where every mapped call has a table of heads (a bias, a compactness) of its own or wants
a gradient of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Where what belongs to heads (bias table and compactness) and the masks stand among the arguments of every operator;
# all other tensors have samples and heads in front.
_TABLES, _MASKS = (4, 5), (6, 7)


def under_transform() -> bool:
    """Whether a function transform is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# Found while torch's compiler traces, and a constant to it.
under_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def mapped(
    operator: Callable[..., Any],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
    tables: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """An operator with its gradient as a function that transforms take.

    Args:
        operator: takes and returns what :mod:`.registered` says.
        save: its ``setup_context``.
        differentiate: its backward pass.
        tables: which of its results are gradients of what belongs to heads.
    """

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return operator(*args)

        setup_context = staticmethod(save)
        backward = staticmethod(differentiate)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            dims = [dim if isinstance(arg, Tensor) else None for arg, dim in zip(args, in_dims, strict=True)]
            size = info.batch_size
            given = [i for i in _TABLES if args[i] is not None]
            own_tables = any(dims[i] is not None for i in given) or (bool(given) and bool(tables))
            if not own_tables:
                return _as_samples(function, size, dims, args)
            if all(dims[mask] is None for mask in _MASKS):
                return _as_heads(function, size, dims, args, tables)
            return _one_by_one(function, size, dims, args)

    function: Callable[..., Any] = Transformed.apply
    return function


Results = tuple[tuple[Tensor, ...], tuple[int | None, ...]]
"""What a rule for vmap returns: results, and where the mapped axis is in each; None where there is nothing in one.

Tuples: what is in a list, torch does not differentiate, and does not say so.
"""


def _as_samples(function: Callable[..., Any], size: int, dims: Sequence[int | None], args: Sequence[Any]) -> Results:
    folded = list(args)
    for i, (arg, dim) in enumerate(zip(args, dims, strict=True)):
        if isinstance(arg, Tensor) and i not in _TABLES:
            folded[i] = _leading(arg, dim, size).flatten(0, 1)
    return _split(function(*folded), size, [0] * len(args))


def _as_heads(
    function: Callable[..., Any],
    size: int,
    dims: Sequence[int | None],
    args: Sequence[Any],
    tables: tuple[int, ...],
) -> Results:
    folded = list(args)
    for i, (arg, dim) in enumerate(zip(args, dims, strict=True)):
        if isinstance(arg, Tensor) and i not in _MASKS:
            leading = _leading(arg, dim, size)
            folded[i] = leading.flatten(0, 1) if i in _TABLES else leading.movedim(0, 1).flatten(1, 2)
    return _split(function(*folded), size, [0 if i in tables else 1 for i in range(len(args))])


def _one_by_one(function: Callable[..., Any], size: int, dims: Sequence[int | None], args: Sequence[Any]) -> Results:
    def call(i: int) -> Any:
        return function(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, dims, strict=True)))

    results = tuple(torch.stack(calls) for calls in zip(*map(call, range(size)), strict=True))
    return results, (0,) * len(results)


def _split(results: Sequence[Tensor], size: int, dims: Sequence[int]) -> Results:
    """Results in which the mapped axis is folded into the one at ``dims``; what is empty, (0,), is no result."""
    split: list[Tensor] = []
    where: list[int | None] = []
    for x, dim in zip(results, dims, strict=False):
        nothing = x.ndim == 1 and x.shape[0] == 0  # a compactness' gradient has one axis too
        split.append(x if nothing else torch.unflatten(x, dim, (size, x.shape[dim] // size)))
        where.append(None if nothing else dim)
    return tuple(split), tuple(where)


def _leading(x: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped axis in front; what is not mapped is the same for all."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
