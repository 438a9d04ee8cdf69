"""The operators under torch's function transforms: the gradients of every day, or a refusal that says what to do."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from engine_cases import EVERY_BACKEND, TRITON, every_backend_and
from grouping_cases import Case, assert_near, finite, make_case
from operator_calls import OPERATORS, call
from spatial_grouping_attention import DenseSpatialGroupingAttention, Neighbourhood, SparseSpatialGroupingAttention
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

WINDOW, EVERYTHING = Neighbourhood((8,), (4,), 2, 3, 1, 3), Neighbourhood((8,), (4,), 2, 3, 1, 7)
REGISTERED = ["fused", "tiled", TRITON]

every_call = pytest.mark.parametrize("operator", OPERATORS)
every_backend = pytest.mark.parametrize("backend", [*EVERY_BACKEND, TRITON])


def case_for(backend: str, *, masks: str | None = None) -> Case:
    dense = backend == "fused"
    sizes = {"head_size": 4, "value_size": 3, "batch": 1 if backend == "triton" else 2}
    case = make_case(
        EVERYTHING if dense else WINDOW, bias=None if dense else "table", valid=masks, valid_groups=masks, **sizes
    )
    # Triton takes no float64.
    return case.to(torch.float32) if backend == "triton" else case


def tolerance(backend: str) -> float:
    return 1e-4 if backend == "triton" else 1e-10


class Call:
    """An operator as a function of what it is differentiable in."""

    def __init__(self, operator: str, backend: str, case: Case) -> None:
        self.operator, self.backend, self.case = operator, backend, case
        names = {"assign": "qku", "pool": "qkv", "group": "qkv"}[operator]
        self.names = [*names, *(["lse"] if operator == "pool" else []), *(["bias"] if case.bias is not None else [])]
        self.operands = tuple(getattr(case, name) for name in self.names)
        self.every = tuple(range(len(self.names)))

    def results(self, *operands: Tensor) -> tuple[Tensor, ...]:
        case = self.case.with_leaves(dict(zip(self.names, operands, strict=True)))
        return tuple(finite(x) for x in call(self.operator, case, self.backend))

    def first(self, q: Tensor) -> Tensor:
        return self.results(q, *self.operands[1:])[0]

    def loss(self, *operands: Tensor) -> Tensor:
        return torch.stack([x.square().sum() for x in self.results(*operands)]).sum()

    def gradients(self, *operands: Tensor) -> tuple[Tensor, ...]:
        """As anybody takes them."""
        leaves = [x.detach().clone().requires_grad_() for x in operands]
        return torch.autograd.grad(self.loss(*leaves), leaves)


def assert_all_near(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float) -> None:
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert_near(mine, theirs, tolerance, f"number {i}")


def several(operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([x, 0.5 * x, x - 0.3]) for x in operands)


@every_call
@every_backend
def test_grad(backend: str, operator: str) -> None:
    f = Call(operator, backend, case_for(backend, masks="some"))
    got = grad(f.loss, argnums=f.every)(*f.operands)
    assert_all_near(got, f.gradients(*f.operands), tolerance(backend))


@every_call
@every_backend_and("masks", "some", None)
def test_vmap_of_calls_and_of_their_gradients(backend: str, operator: str, masks: str | None) -> None:
    """Each with a bias table of its own, and all with one, of which each has its own gradient."""
    f = Call(operator, backend, case_for(backend, masks=masks))
    many = several(f.operands)
    for shared in {None, "bias" if "bias" in f.names else "k"}:
        dims = tuple(None if name == shared else 0 for name in f.names)
        operands = tuple(x[0] if dim is None else x for x, dim in zip(many, dims, strict=True))
        results = vmap(f.results, dims)(*operands)
        gradients = vmap(grad(f.loss, argnums=f.every), dims)(*operands)
        for i in range(3):
            one = tuple(x if dim is None else x[i] for x, dim in zip(operands, dims, strict=True))
            assert_all_near(tuple(x[i] for x in results), f.results(*one), tolerance(backend))
            assert_all_near(tuple(x[i] for x in gradients), f.gradients(*one), tolerance(backend))


@every_call
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_vmap_over_masks(backend: str, operator: str) -> None:
    case = case_for(backend, masks="some")
    valid = torch.stack([case.valid, ~case.valid, torch.ones_like(case.valid)])

    def gradients(valid: Tensor) -> tuple[Tensor, ...]:
        f = Call(operator, backend, replace(case, valid=valid))
        return grad(f.loss, argnums=f.every)(*f.operands)

    got = vmap(gradients)(valid)
    for i in range(3):
        assert_all_near(tuple(x[i] for x in got), gradients(valid[i]), tolerance(backend))


@every_call
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_gradients_through_vmap_and_vmap_of_vmap(backend: str, operator: str) -> None:
    f = Call(operator, backend, case_for(backend))
    many = several(f.operands)
    got = grad(lambda *x: vmap(f.loss)(*x).sum(), argnums=f.every)(*many)
    want = [f.gradients(*(x[i] for x in many)) for i in range(3)]
    assert_all_near(got, tuple(map(torch.stack, zip(*want, strict=True))), tolerance(backend))
    twice = vmap(vmap(f.loss))(*(torch.stack([x, 2 * x]) for x in many))
    assert_near(twice[1, 2], f.loss(*(2 * x[2] for x in many)), tolerance(backend))


@every_call
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_jacobians(backend: str, operator: str) -> None:
    f = Call(operator, backend, case_for(backend))
    q = f.operands[0]
    want = torch.autograd.functional.jacobian(f.first, q)
    assert_near(jacrev(f.first)(q), want, tolerance(backend))
    assert_near(torch.autograd.functional.jacobian(f.first, q, vectorize=True), want, tolerance(backend))
    leaf = q.clone().requires_grad_()
    out = f.first(leaf)
    unit = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    (rows,) = torch.autograd.grad(out, leaf, unit, is_grads_batched=True)
    assert_near(rows.view_as(want), want, tolerance(backend))


@every_call
def test_forward_mode_is_served_where_nothing_else_is_asked_for(operator: str) -> None:
    for backend in ("fused", "tiled"):
        f, auto = (Call(operator, by, case_for(backend, masks="some")) for by in (backend, "auto"))
        q = f.operands[0]
        jacobian = jacrev(f.first)(q)
        assert_near(jacfwd(auto.first)(q), jacobian, 1e-10)
        along = torch.tensordot(jacobian, q, q.ndim)
        assert_near(jvp(auto.first, (q,), (q,))[1], along, 1e-10)
        with torch.autograd.forward_ad.dual_level():
            dual = auto.first(torch.autograd.forward_ad.make_dual(q, q))
            assert_near(torch.autograd.forward_ad.unpack_dual(dual).tangent, along, 1e-10)
        second = hessian(lambda q: auto.loss(q, *auto.operands[1:]))(q)  # noqa: B023  # called at once
        assert_near(second, second.permute(*range(4, 8), *range(4)), 1e-10)
        assert second.abs().max() > 0


def by_jvp(f: Callable[[Tensor], Tensor], q: Tensor) -> None:
    jvp(f, (q,), (q,))


def by_dual_numbers(f: Callable[[Tensor], Tensor], q: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        f(torch.autograd.forward_ad.make_dual(q, q))


def by_jacobian(f: Callable[[Tensor], Tensor], q: Tensor) -> None:
    torch.autograd.functional.jacobian(f, q, vectorize=True, strategy="forward-mode")


@pytest.mark.parametrize("take", [by_jvp, by_dual_numbers, by_jacobian])
@every_call
@pytest.mark.parametrize("backend", REGISTERED)
def test_forward_mode_is_refused_by_who_would_give_zero(backend: str, operator: str, take: Callable) -> None:
    f = Call(operator, backend, case_for(backend))
    with pytest.raises(ValueError, match=r"cannot serve this call:\n  - forward-mode .* reference alone"):
        take(f.first, f.operands[0])


@every_call
@pytest.mark.parametrize("backend", REGISTERED)
def test_second_derivatives_under_transforms_say_what_to_do(backend: str, operator: str) -> None:
    f = Call(operator, backend, case_for(backend))

    def first(q: Tensor) -> Tensor:
        return grad(f.loss)(q, *f.operands[1:]).square().sum()

    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice; .* backend='reference'"):
        grad(first)(f.operands[0])


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        (DenseSpatialGroupingAttention, {}),
        (SparseSpatialGroupingAttention, {}),
        (SparseSpatialGroupingAttention, {"relative_bias": True}),
    ],
)
def test_gradients_of_a_layer_sample_by_sample(variant: type[torch.nn.Module], options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    layer = variant(8, 1, 3, 2, stride=2, iters=2, **options).double()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(3, 10, 8, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(layer, parameters, (sample[None], 1.0, (10,))).x_out.square().sum()

    got = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        names = [name for name, p in layer.named_parameters() if p.requires_grad]
        leaves = dict(layer.named_parameters())
        total = layer(x[i : i + 1], 1.0, (10,)).x_out.square().sum()
        want = torch.autograd.grad(total, [leaves[name] for name in names], materialize_grads=True)
        for name, gradient in zip(names, want, strict=True):
            assert_near(got[name][i], gradient, 1e-9, name)
