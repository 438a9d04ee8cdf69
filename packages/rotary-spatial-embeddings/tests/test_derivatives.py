"""Every road to a derivative, through every module: torch.func, both vmaps, forward and reverse, first and second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from RoSE import (
    MultiResolutionBlock,
    RoSEMultiHeadAttention,
    RoSEMultiHeadCrossAttention,
    RotarySpatialEmbedding,
)
from RoSE.functional import cos_sin, phases, rotate
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

VALID = torch.tensor([[True, True, False]])


class Functional(nn.Module):
    """The functions without the modules."""

    def __init__(self, *given: int, interleaved: bool = True, **options: Any) -> None:
        super().__init__()
        self.interleaved = interleaved
        self.freqs = nn.Parameter(torch.randn(2, 3, 2, dtype=torch.float64))

    def forward(self, x: Tensor, coordinates: Tensor) -> Tensor:
        cos, sin = cos_sin(phases(coordinates, self.freqs), torch.float64)
        return rotate(x.unflatten(-1, (2, -1)), cos, sin, interleaved=self.interleaved).flatten(-2)


CALLS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any]]] = {
    "functional": (Functional, lambda m, x, p: m(x, p)),
    "embedding": (RotarySpatialEmbedding, lambda m, x, p: m(x, coordinates=p)),
    "pair": (RotarySpatialEmbedding, lambda m, x, p: torch.cat(m.rotate_pair(x, x + 1, coordinates=p), 0)),
    "stretched": (
        lambda *given, **more: RotarySpatialEmbedding(*given, spacing_transform="log", **more),
        lambda m, x, p: m(x, p[:1].abs().mean(0) + 0.1, coordinates=p),
    ),
    "scores": (RoSEMultiHeadCrossAttention, lambda m, x, p: m(x, x, coordinates=p)),
    "attend": (RoSEMultiHeadCrossAttention, lambda m, x, p: m.attend(x, x, x, coordinates=p)),
    "attention": (RoSEMultiHeadAttention, lambda m, x, p: m(x, coordinates=p)),
    "masked attention": (RoSEMultiHeadAttention, lambda m, x, p: m(x, coordinates=p, valid=VALID)),
    "block": (MultiResolutionBlock, lambda m, x, p: m([x, x + 1], coordinates=[p, 2 * p])[1]),
}
every = pytest.mark.parametrize(
    ("call", "interleaved"), [(c, i) for c in CALLS for i in (True, False)], ids=lambda v: str(v)
)
# Torch's vmap has slow roads.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def made(call: str, interleaved: bool) -> tuple[Callable[[Tensor, Tensor], Tensor], nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = CALLS[call][0](16, 2, 2, interleaved=interleaved, rotary_ratio=0.75, dtype=torch.float64)
    x = torch.randn(1, 3, 16, dtype=torch.float64)
    where = torch.randn(3, 2, dtype=torch.float64)
    return lambda x, p: CALLS[call][1](module, x, p), module, x, where


@every
def test_jacobians_by_every_road(call: str, interleaved: bool) -> None:
    function, _, x, where = made(call, interleaved)
    one_by_one = jacobian(function, (x, where))
    roads = {
        "vectorised": lambda: jacobian(function, (x, where), vectorize=True),
        "forward": lambda: jacobian(function, (x, where), vectorize=True, strategy="forward-mode"),
        "jacrev": lambda: jacrev(function, (0, 1))(x, where),
        "jacfwd": lambda: jacfwd(function, (0, 1))(x, where),
    }
    for road, compute in roads.items():
        torch.testing.assert_close(compute(), one_by_one, msg=lambda m, road=road: f"{road}: {m}")
    along = torch.randn_like(x), torch.randn_like(where)
    expected = sum(j.flatten(-t.dim()) @ t.flatten() for j, t in zip(one_by_one, along, strict=True))
    torch.testing.assert_close(jvp(function, (x, where), along)[1], expected)
    weights = torch.randn(2, *expected.shape, dtype=torch.float64)
    got = vmap(vjp(function, x, where)[1])(weights)[1]
    by_hand = weights.flatten(1) @ one_by_one[1].reshape(-1, where.numel())
    torch.testing.assert_close(got, by_hand.view(2, *where.shape))


@every
@pytest.mark.parametrize("create_graph", [False, True])
def test_many_gradients_at_once_are_those_one_by_one(call: str, interleaved: bool, create_graph: bool) -> None:
    function, module, x, where = made(call, interleaved)
    inputs = [x.requires_grad_(), where.requires_grad_(), *module.parameters()]
    out = function(x, where)
    weights = torch.randn(3, *out.shape, dtype=torch.float64)

    def gradients(weight: Tensor, **options: bool) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(out, inputs, weight, retain_graph=True, allow_unused=True, **options)
        return tuple(g for g in found if g is not None)

    expected = [torch.stack(each) for each in zip(*map(gradients, weights), strict=True)]
    batched = gradients(weights, is_grads_batched=True, create_graph=create_graph)
    mapped = vmap(lambda weight: gradients(weight, create_graph=create_graph))(weights)
    for got in (batched, mapped):
        torch.testing.assert_close(list(got), expected)


@every
def test_second_derivatives_by_every_road(call: str, interleaved: bool) -> None:
    """In the plain form of torch's attention: its fused kernels are differentiable once.

    Forward mode is the outer one: torch's own layer norm has a wrong derivative of its forward-mode derivative.
    """
    function, _, x, where = made(call, interleaved)

    def energy(where: Tensor) -> Tensor:
        return function(x, where).pow(3).sum()

    with sdpa_kernel(SDPBackend.MATH):
        expected = hessian(energy, where)
        for got in (
            hessian(energy, where, vectorize=True),
            hessian(energy, where, vectorize=True, outer_jacobian_strategy="forward-mode"),
            torch.func.hessian(energy)(where),
            jacrev(jacrev(energy))(where),
        ):
            torch.testing.assert_close(got, expected)


@every
def test_gradients_per_sample(call: str, interleaved: bool) -> None:
    function, module, x, where = made(call, interleaved)

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor, where: Tensor) -> Tensor:
            return function(x, where).pow(2).sum()

    called, xs = Called(), torch.stack([x, x + 1])
    parameters = {name: p.detach() for name, p in called.named_parameters()}
    one = grad(lambda p, x, where: functional_call(called, p, (x, where)))
    for in_dims, wheres in (((None, 0, None), where), ((None, 0, 0), torch.stack([where, 2 * where]))):
        got = vmap(one, in_dims)(parameters, xs, wheres)
        for i in range(2):
            expected = one(parameters, xs[i], where if in_dims[2] is None else wheres[i])
            torch.testing.assert_close({n: g[i] for n, g in got.items()}, expected)
