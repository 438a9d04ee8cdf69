"""What the tests of the Triton kernels leave: every other backend and every layer on a GPU, compiled and captured.

The cases are those of the CPU's tests. Backends are held to the oracle in float64, layers to themselves in float64 on
the CPU, where their own tests hold them to the algorithm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from compactness_cases import alone, compare
from gpu_cases import DEVICE, assert_capturable, assert_gradients_near, on_device
from grouping_cases import assert_near, make_case
from layer_cases import SHAPES, full, make_layer, tokens
from spatial_grouping_attention import Neighbourhood, functional
from torch import Tensor
from triton_cases import LARGER, TOLERANCE, check, one_plan_a_class  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_plan_a_class")]

DTYPES = list(TOLERANCE)
VARIANTS = ("dense", "sparse", "deformable", "windowed")

DENSE = {
    "channels of whole vectors": {"head_size": 64, "value_size": 64},
    "odd sizes": {"head_size": 5, "value_size": 19, "heads": 3},
    "as wide as kernels go": {"head_size": 128, "value_size": 128, "heads": 1},
    "some tokens": {"head_size": 24, "value_size": 8, "valid": "some"},
    "no token in one sample": {"head_size": 35, "value_size": 16, "valid": "none in one sample"},
    "no group in one sample": {"head_size": 26, "value_size": 3, "valid_groups": "none in one sample"},
    "some of both": {"head_size": 32, "value_size": 32, "valid": "some", "valid_groups": "some", "scale": -0.2},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DENSE)
def test_dense_grouping_is_the_oracle(name: str, dtype: torch.dtype) -> None:
    """Results, normalisers and masses, and what arrives through each of them at every operand."""
    check(make_case(None, 77, 21, **DENSE[name]), DEVICE, dtype, backend="fused")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_compactness_is_the_oracle(dtype: torch.dtype) -> None:
    relation = Neighbourhood((9, 13), (5, 7), 2, 3, 1, 15)
    check(make_case(relation, head_size=16, compact=True, valid="some"), DEVICE, dtype, backend="fused")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", LARGER)
def test_tiles_are_the_oracle(geometry: str, dtype: torch.dtype) -> None:
    options = {"bias": "table", "valid": "some", "valid_groups": "some", "compact": True}
    check(make_case(LARGER[geometry], batch=1, **options), DEVICE, dtype, backend="tiled")


@pytest.mark.parametrize("backend", ["triton", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compactness_on_a_long_axis_is_the_closed_form(dtype: torch.dtype, backend: str) -> None:
    case = alone("stride 2")

    def assign(*given: Tensor) -> tuple[Tensor, Tensor]:
        q, k, u, compactness = (x.to(DEVICE) for x in given)
        out, lse = functional.assign(q, k, u, case.neighbourhood, compactness=compactness, backend=backend)
        return out.cpu(), lse.cpu()

    def group(*given: Tensor) -> Tensor:
        q, k, v, compactness = (x.to(DEVICE) for x in given)
        options = {"compactness": compactness, "backend": backend}
        return functional.grouping_attention(q, k, v, case.neighbourhood, **options)[0].cpu()

    errors = compare(case, dtype, assign, group)
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [{}, {"bias": "table", "valid": "some", "valid_groups": "some", "compact": True}])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_natten_is_the_oracle(ndim: int, extras: dict[str, object], dtype: torch.dtype) -> None:
    if not getattr(pytest.importorskip("natten"), "HAS_LIBNATTEN", False):
        pytest.skip("this natten was built without CUDA")
    relation = Neighbourhood((12,) * ndim, (6,) * ndim, 2, 3, 1, 3)
    check(make_case(relation, batch=1, head_size=16, **extras), DEVICE, dtype, backend="natten", slack=3.0)


def module(variant: str, ndim: int = 2) -> torch.nn.Module:
    """A layer with everything that it can have, in float64 on the CPU."""
    torch.manual_seed(0)
    if variant == "windowed":
        return full(variant).double()
    options = {"temperature": "learned", "relative_bias": variant != "dense", "compactness": 1.0}
    return make_layer(variant, ndim, feature_dims=16, **options).double()


def run(layer: torch.nn.Module, x: Tensor, shape: tuple[int, ...], valid: Tensor | None = None) -> Tensor:
    """The tokens or groups that a layer returns."""
    out = layer(x, 0.5, shape, valid=valid)
    return out if isinstance(out, Tensor) else out.x_out


def both_ways(layer: torch.nn.Module, x: Tensor, shape: tuple[int, ...], valid: Tensor | None = None) -> list[Tensor]:
    """What a layer returns, and gradients of a weighting of it to its input and parameters."""
    x = x.clone().requires_grad_()
    out = run(layer, x, shape, valid)
    weight = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64, device=out.device).view(out.shape).to(out)
    leaves = [x, *layer.parameters()]
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True)]


def names_of(layer: torch.nn.Module) -> list[str]:
    """Of what :func:`both_ways` returns."""
    return ["result", "input", *(name for name, _ in layer.named_parameters())]


CASES = [*itertools.product(VARIANTS[:3], (1, 2, 3)), ("windowed", 2)]


@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("variant", "ndim"), CASES)
def test_layers_are_those_of_the_cpu(variant: str, ndim: int, padded: bool) -> None:
    layer, shape = module(variant, ndim), SHAPES[ndim]
    x = tokens(shape, channels=16).double()
    valid = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(3)) < 0.8 if padded else None
    want = both_ways(layer, x, shape, valid)
    got = both_ways(on_device(layer), x.to(DEVICE, torch.float32), shape, None if valid is None else valid.to(DEVICE))
    assert_gradients_near(got, want, 1e-4, names_of(layer))


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_under_autocast(variant: str) -> None:
    layer, shape = module(variant), SHAPES[2]
    x = tokens(shape, channels=16).double()
    want = run(layer, x, shape)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(on_device(layer), x.to(DEVICE, torch.float32), shape)
    assert_near(got.float().cpu(), want, 5e-2, variant)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls what torch has deprecated
@pytest.mark.filterwarnings("ignore:.*TensorFloat32:UserWarning")  # the compiler advises to give up precision
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_compiled_whole(variant: str) -> None:
    layer, shape = on_device(module(variant)), SHAPES[2]
    x = tokens(shape, channels=16).to(DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    assert_gradients_near(both_ways(compiled, x, shape), both_ways(layer, x, shape), 1e-4, names_of(layer))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*TensorFloat32:UserWarning")
@pytest.mark.parametrize("variant", ["sparse", "windowed"])
def test_layers_with_reduced_overhead(variant: str) -> None:
    """torch's own use of graphs: the first calls record, the later ones replay."""
    layer, shape = on_device(module(variant)).eval(), SHAPES[2]
    torch._dynamo.reset()
    compiled = torch.compile(layer, mode="reduce-overhead")
    for seed in range(4):
        x = tokens(shape, channels=16, seed=seed).to(DEVICE)
        with torch.no_grad():
            got = run(compiled, x, shape).clone()
            assert_near(got.cpu(), run(layer, x, shape).cpu(), 1e-4, f"{variant}, call {seed}")


BACKENDS = [
    ("dense", "fused"),
    ("sparse", "triton"),
    ("sparse", "tiled"),
    ("deformable", "auto"),
    ("windowed", "tiled"),
]


def training(variant: str, backend: str) -> tuple[Callable[[], list[Tensor]], Tensor, list[str]]:
    """A step of a layer's training on one input, which may be changed in place, and names of what it returns."""
    layer, shape = on_device(module(variant)), SHAPES[2]
    layer.backend = backend
    x = tokens(shape, channels=16).to(DEVICE)
    return lambda: both_ways(layer, x, shape), x, names_of(layer)


@pytest.mark.parametrize(("variant", "backend"), BACKENDS)
def test_nothing_waits_for_the_gpu(variant: str, backend: str, unsynchronised: Callable[[], None]) -> None:
    """From the second call of a shape on: what follows from geometry is on the device by then."""
    step, *_ = training(variant, backend)
    step()
    torch.cuda.synchronize()
    unsynchronised()
    step()


@pytest.mark.parametrize(("variant", "backend"), BACKENDS)
def test_training_steps_can_be_captured(variant: str, backend: str) -> None:
    step, x, names = training(variant, backend)
    assert_capturable(step, x, tokens(SHAPES[2], channels=16, seed=9).to(DEVICE), names)
