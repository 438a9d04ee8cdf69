"""The same as :mod:`.plain`, by compiled kernels, with gradients written by hand.

Derivatives of gradients, and batches of these, are those of the formulas in :mod:`.plain`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from RoSE.direct import directly, is_watched
from RoSE.tracing import is_transformed
from torch import Tensor

from ...geometry.lattice import Lattice
from ..derivatives import Relative, Wanted
from . import plain


class Compiled:
    """The functions of :mod:`.plain`, by the passes of an engine's kernels."""

    def __init__(self, name: str, *, ordered: bool) -> None:
        """What computes.

        Args:
            name: of a package beside this one, whose ``points.passes`` are imported by the first call.
            ordered: whether its sums are taken in one order.
        """
        self.name, self.ordered = name, ordered
        self._products = self._function("products", _differentiate_products)
        self._averages = self._function("averages", _differentiate_averages)
        self._sums = self._function("sums", _differentiate_sums)
        self._relative_sums = self._function("relative_sums", _differentiate_relative_sums)

    def products(self, q: Tensor, k: Tensor, places: Tensor, groups: Lattice) -> Tensor:
        """See :func:`.plain.products`."""
        places, groups, _, k, q = _together(places, groups, None, k, q)
        result: Tensor = self._products(q, k, places, groups)
        return result

    def averages(self, shares: Tensor, places: Tensor, u: Tensor, groups: Lattice) -> Tensor:
        """See :func:`.plain.averages`."""
        places, groups, shares, _, u = _together(places, groups, shares, None, u)
        result: Tensor = self._averages(shares, places, u, groups)
        return result

    def sums(self, shares: Tensor, places: Tensor, v: Tensor, groups: Lattice) -> Tensor:
        """See :func:`.plain.sums`."""
        places, groups, shares, v, _ = _together(places, groups, shares, v)
        result: Tensor = self._sums(shares, places, v, groups)
        return result

    def relative_sums(
        self, log_shares: Tensor, places: Tensor, v: Tensor, groups: Lattice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`.plain.relative_sums`."""
        places, groups, log_shares, v, _ = _together(places, groups, log_shares, v)
        total, masses, highest = self._relative_sums(log_shares, places, v, groups)
        return total, masses, highest

    def touches(self, places: Tensor, groups: Lattice) -> Tensor:
        """See :func:`.plain.touches`."""
        places, groups, *_ = _together(places, groups)
        touched: Tensor = self.passes().touches(places, groups)
        return touched

    def passes(self) -> ModuleType:
        """The module of the passes."""
        return importlib.import_module(f"..{self.name}.points.passes", __package__)

    def _function(self, name: str, differentiate: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
        """A pass as a function with a gradient.

        Args:
            name: of the function in :mod:`.plain`, and of the pass.
            differentiate: called with the pass' derivatives, what of the three operands is wanted, operands, grid, all
                results but the first and gradients of all; returns gradients of the operands.
        """

        def compute(*operands: Any) -> Any:
            return getattr(self.passes(), name)(*operands)

        def save(ctx: Any, operands: tuple[Any, ...], results: Any) -> None:
            *tensors, ctx.groups = operands
            numbers = results[1:] if isinstance(results, tuple) else ()
            if numbers:
                ctx.mark_non_differentiable(numbers[-1])
            ctx.save_for_backward(*tensors, *numbers)

        def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # once: checkpoints count
            operands, numbers, wanted = saved[:3], saved[3:], ctx.needs_input_grad[:3]
            to_be_ordered = torch.are_deterministic_algorithms_enabled() and not self.ordered
            if torch.is_grad_enabled() or is_watched(*arriving) or is_transformed() or to_be_ordered:
                return *_by_formulas(getattr(plain, name), operands, ctx.groups, wanted, arriving), None
            derivatives = self.passes().derivatives
            return *differentiate(derivatives, wanted, *operands, ctx.groups, *numbers, *arriving), None

        return directly(name, compute, save, backward)


def _together(
    places: Tensor,
    groups: Lattice,
    numbers: Tensor | None = None,
    of_tokens: Tensor | None = None,
    of_groups: Tensor | None = None,
) -> tuple[Tensor, Lattice, Any, Any, Any]:
    """Operands of one number of samples, heads, tokens and groups: kernels look at no shape but that of the places.

    Raises:
        RuntimeError: there is none.
    """
    given = [x.shape[:2] for x in (places, numbers, of_tokens, of_groups) if x is not None]
    batch, heads = torch.broadcast_shapes(*given)  # type: ignore[no-untyped-call]
    tokens, points, ndim = places.shape[2:]
    size = torch.Size(groups.shape).numel()
    if groups.valid is not None:
        groups = groups._replace(valid=groups.valid.expand(batch, size))
    return (
        places.expand(batch, heads, tokens, points, ndim),
        groups,
        None if numbers is None else numbers.expand(batch, heads, tokens, points),
        None if of_tokens is None else of_tokens.expand(batch, heads, tokens, -1),
        None if of_groups is None else of_groups.expand(batch, heads, size, -1),
    )


def _by_formulas(
    function: Callable[..., Any],
    operands: tuple[Tensor, ...],
    groups: Lattice,
    wanted: tuple[bool, ...],
    arriving: tuple[Tensor, ...],
) -> list[Tensor | None]:
    """Gradients that can be differentiated, where they are to be, and batched."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Places of their own in the graph: one operand may be made of another, and these gradients are partial.
        operands = tuple(x.view_as(x) for x in operands)
        results = function(*operands, groups)
    results = results if isinstance(results, tuple) else (results,)
    pairs = [(result, gradient) for result, gradient in zip(results, arriving, strict=True) if result.requires_grad]
    ends, gradients = zip(*pairs, strict=True)
    leaves = [operand for operand, is_wanted in zip(operands, wanted, strict=True) if is_wanted]
    found = iter(torch.autograd.grad(ends, leaves, gradients, create_graph=create_graph, allow_unused=True))
    return [next(found) if is_wanted else None for is_wanted in wanted]


def _differentiate_products(
    derive: Callable[..., Any],
    wanted: tuple[bool, ...],
    q: Tensor,
    k: Tensor,
    places: Tensor,
    groups: Lattice,
    gradient: Tensor,
) -> tuple[Tensor | None, ...]:
    asked = Wanted(places=wanted[2], tokens=wanted[1], groups=wanted[0])
    found = derive(gradient, places, k, q, groups, asked)
    return found.groups, found.tokens, found.places


def _differentiate_averages(
    derive: Callable[..., Any],
    wanted: tuple[bool, ...],
    shares: Tensor,
    places: Tensor,
    u: Tensor,
    groups: Lattice,
    gradient: Tensor,
) -> tuple[Tensor | None, ...]:
    asked = Wanted(factors=wanted[0], places=wanted[1], groups=wanted[2])
    found = derive(shares, places, gradient, u, groups, asked)
    return found.factors, found.places, found.groups


def _differentiate_sums(
    derive: Callable[..., Any],
    wanted: tuple[bool, ...],
    shares: Tensor,
    places: Tensor,
    v: Tensor,
    groups: Lattice,
    gradient: Tensor,
) -> tuple[Tensor | None, ...]:
    asked = Wanted(factors=wanted[0], places=wanted[1], tokens=wanted[2])
    found = derive(shares, places, v, gradient, groups, asked)
    return found.factors, found.places, found.tokens


def _differentiate_relative_sums(
    derive: Callable[..., Any],
    wanted: tuple[bool, ...],
    log_shares: Tensor,
    places: Tensor,
    v: Tensor,
    groups: Lattice,
    masses: Tensor,
    highest: Tensor,
    gradient: Tensor,
    grad_masses: Tensor,
    _: Tensor,
) -> tuple[Tensor | None, ...]:
    asked = Wanted(factors=wanted[0], places=wanted[1], tokens=wanted[2])
    relative = Relative(highest, masses, grad_masses)
    found = derive(log_shares, places, v, gradient, groups, asked, relative)
    return found.factors, found.places, found.tokens
