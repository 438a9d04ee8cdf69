"""The NATTEN composition, in float64, on an emulator of NATTEN's window rule; and the emulator against NATTEN itself.

NATTEN has no gradients on a CPU, and pooling is a gradient. What it computes is simple enough to emulate: windows
that are shifted at borders, dilation, and a log-sum-exp whose gradient is ignored.
"""

import math
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from compactness_cases import alone, compare
from grouping_cases import assert_near
from layer_cases import mostly_slow
from spatial_grouping_attention import Neighbourhood
from spatial_grouping_attention.backends import Backend, Operands, Problem, natten, reference
from spatial_grouping_attention.backends.selection import refusals
from torch import Tensor


def emulated_mask(shape: tuple[int, ...], window: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    mask = torch.ones(1, 1, dtype=torch.bool)
    for size, width, step in zip(shape, window, dilation, strict=True):
        axis = torch.zeros(size, size, dtype=torch.bool)
        for i in range(size):
            members = list(range(i % step, size, step))
            radius = width // 2
            centre = min(max(i // step, radius), len(members) - 1 - radius)
            axis[i, members[centre - radius : centre + radius + 1]] = True
        mask = (mask[:, None, :, None] & axis[None, :, None, :]).flatten(0, 1).flatten(1, 2)
    return mask


def emulated(q: Tensor, k: Tensor, v: Tensor, *, kernel_size, dilation, scale: float, return_lse: bool):
    assert return_lse
    shape = tuple(q.shape[1:-2])
    dilation = (dilation,) * len(shape) if isinstance(dilation, int) else dilation
    kernel_size = (kernel_size,) * len(shape) if isinstance(kernel_size, int) else kernel_size
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    scores = (scale * q @ k.mT).masked_fill(~emulated_mask(shape, kernel_size, dilation), -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    lse = scores.detach().logsumexp(-1).transpose(1, 2)
    return out.reshape(out.shape[0], *shape, *out.shape[2:]), lse.reshape(lse.shape[0], *shape, lse.shape[2])


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``import natten`` finds."""
    module: Any = ModuleType("natten")
    module.__spec__ = ModuleSpec("natten", None)
    module.HAS_LIBNATTEN = True
    module.na1d = module.na2d = module.na3d = emulated
    monkeypatch.setitem(sys.modules, "natten", module)


CASES = [
    Neighbourhood((7,), (7,), 1, 1, 0, 3),
    Neighbourhood((8,), (4,), 2, 3, 1, 3),
    Neighbourhood((11,), (6,), 2, 3, 1, 5, 2),
    Neighbourhood((5, 6), (3, 3), 2, 3, 1, (3, 5)),
    Neighbourhood((5, 4), (2, 4), (3, 1), (3, 1), (1, 0), 3),
    Neighbourhood((4, 2, 3), (2, 2, 2), (2, 1, 2), (3, 1, 3), (1, 0, 1), 3),
]


def problem(seen: Neighbourhood | None, device: str = "cuda", dtype: torch.dtype = torch.float32, bias=None) -> Problem:
    return Problem(torch.device(device), dtype, 32, seen, bias)


@pytest.mark.parametrize("operator", ["group", "assign", "pool"])
@pytest.mark.parametrize("extras", ["plain", "bias", "valid", "valid groups", "compactness", "everything"])
@pytest.mark.parametrize("seen", CASES, ids=str)
@pytest.mark.usefixtures("emulator")
def test_composition_is_the_reference(seen: Neighbourhood, extras: str, operator: str) -> None:
    assert not natten.refusals(problem(seen))
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    n, m = seen.num_inputs, seen.num_groups
    q, k, v, u, lse = leaf(2, 2, m, 4), leaf(2, 2, n, 4), leaf(2, 2, n, 3), leaf(2, 2, m, 3), leaf(2, 2, n)
    every = extras == "everything"
    bias = leaf(2, *(axis.window for axis in seen.axes)) if every or extras == "bias" else None
    compactness = leaf(2).exp().detach().requires_grad_() if every or extras == "compactness" else None
    valid = torch.rand(2, n) > 0.3 if every or extras.startswith("valid") else None
    valid_groups = torch.rand(2, m) > 0.4 if every or extras == "valid groups" else None
    masks = {"valid": valid, "valid_groups": valid_groups}
    operands = Operands(q, k, u if operator == "assign" else v, seen, 0.7, bias, compactness=compactness, **masks)
    leaves = [q, k, operands.values, bias, compactness, lse if operator == "pool" else None]
    leaves = [x for x in leaves if x is not None]

    results = []
    for module in (reference, natten):
        if operator == "assign":
            outputs = module.assign(operands)
        else:
            outputs = tuple(module.pool(operands, lse if operator == "pool" else None))[:3]
        torch.manual_seed(1)
        total = sum((o.masked_fill(o.isinf(), 0) * torch.randn(o.shape, dtype=o.dtype)).sum() for o in outputs)
        results.append((*outputs, *torch.autograd.grad(total, leaves)))
    for want, got in zip(*results, strict=True):
        # The padding is hidden by a finite logit, exp(-1e4) = 0 in any dtype.
        assert_near(got, want, 1e-10)


@pytest.mark.parametrize(
    ("name", "dtype"),
    mostly_slow(("stride 2", torch.bfloat16), ("stride 2", torch.float32), ("dilated", torch.float32)),
)
@pytest.mark.usefixtures("emulator")
def test_compactness_on_a_long_axis_is_the_closed_form(name: str, dtype: torch.dtype) -> None:
    case = alone(name)

    def operands(q: Tensor, k: Tensor, values: Tensor, compactness: Tensor) -> Operands:
        return Operands(q, k, values, case.neighbourhood, 1.0, compactness=compactness)

    errors = compare(
        case, dtype, lambda *x: natten.assign(operands(*x)), lambda *x: natten.pool(operands(*x), None).out
    )
    assert max(errors.values()) < {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype], errors


@pytest.mark.usefixtures("emulator")
def test_hidden_groups_stay_hidden_however_compact() -> None:
    """The only group that counts lies far away, and its logit far below those of ordinary calls."""
    seen = Neighbourhood((8,), (8,), 1, 1, 0, 5)
    torch.manual_seed(0)
    q, k, u = torch.randn(3, 1, 1, 8, 4, dtype=torch.float64).unbind(0)
    groups = torch.tensor([[False, False, True, False, False, False, False, False]])
    operands = Operands(q, k, u, seen, 1.0, valid_groups=groups, compactness=torch.tensor([1e5], dtype=torch.float64))
    for got, want in zip(natten.assign(operands), reference.assign(operands), strict=True):
        assert_near(got, want, 1e-10)


@pytest.mark.parametrize("operator", ["group", "assign"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("emulator")
def test_values_that_are_alike_leave_gradients_exact(operator: str, dtype: torch.dtype) -> None:
    """What groups look like once they are segments; here averages are quotients of what a kernel returns."""
    seen = Neighbourhood((20,), (10,), 2, 3, 1, 3)
    torch.manual_seed(0)
    q, k = (torch.randn(2, 2, n, 16).to(dtype) for n in (10, 20))
    values = (5.0 + 0.1 * torch.randn(2, 2, 10 if operator == "assign" else 20, 16)).to(dtype)
    arriving = torch.randn(2, 2, 20 if operator == "assign" else 10, 16).to(dtype)
    gradients = []
    for module, kind in ((natten, dtype), (reference, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in (q, k, values)]
        operands = Operands(*leaves, seen, 0.25)  # type: ignore[call-arg]
        out = module.assign(operands)[0] if operator == "assign" else module.pool(operands, None).out
        assert out.dtype == kind
        gradients.append(torch.autograd.grad(out, leaves, arriving.to(kind)))
    for got, want in zip(*gradients, strict=True):
        assert (got.double() - want).norm() < 1e-2 * want.norm()


def test_function_transforms_and_forward_mode_are_refused_by_name() -> None:
    asked = problem(CASES[0])

    def f(x: Tensor) -> Tensor:
        reasons.extend(refusals(Backend.NATTEN, asked))
        return x.sum()

    for transform, words in ((torch.func.grad, "function transforms"), (torch.func.jacfwd, "forward-mode")):
        reasons: list[str] = []
        transform(f)(torch.ones(2))
        assert any(words in reason for reason in reasons)


def test_border_cells_larger_than_the_stride_are_refused() -> None:
    reasons = natten.refusals(problem(Neighbourhood((8,), (2,), 4, 3, 1, 3)))
    assert any("border cells of axis 0 own more" in reason for reason in reasons)


def test_every_refusal_is_listed() -> None:
    reasons = natten.refusals(problem(None, "cpu", torch.float64, "full"))
    for part in ("no gradients on cpu", "float64", "per window offset only", "needs a neighbourhood"):
        assert any(part in reason for reason in reasons), part


@pytest.mark.natten
@pytest.mark.parametrize(("shape", "dilation"), [((9,), 2), ((6, 8), 1), ((6, 8), 2), ((4, 5, 6), 1)])
def test_emulator_is_natten(shape: tuple[int, ...], dilation: int) -> None:
    import natten

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, *shape, 2, 32).unbind(0)
    arguments = {"kernel_size": (3,) * len(shape), "dilation": (dilation,) * len(shape), "scale": 1 / math.sqrt(32)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex attention says that it is not compiled
        got = getattr(natten, f"na{len(shape)}d")(q, k, v, return_lse=True, **arguments)
    for mine, theirs in zip(emulated(q, k, v, return_lse=True, **arguments), got, strict=True):
        assert_near(mine, theirs, 1e-5)
