"""No engine, no layer and no network makes a GPU wait: held on a CPU, by what is asked of torch.

A value that Python reads, a result whose size depends on values, and numbers of Python's that become a tensor each wait
for all that was launched before, or copy from the host. Whatever a first call remembers, it may wait for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grouping_cases import make_case
from layer_cases import SHAPES, VARIANTS, full, slow, tokens
from model_cases import image_of, make
from model_cases import padded as padded_to
from operator_calls import operands
from spatial_grouping_attention import Neighbourhood
from spatial_grouping_attention.backends import deformable
from spatial_grouping_attention.backends.deformable import plain
from spatial_grouping_attention.backends.engines import engine
from spatial_grouping_attention.backends.fused import frames
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "_local_scalar_dense",
    "lift_fresh",
    "lift",
    "nonzero",
    "bincount",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "is_nonzero",
    "equal",
    "repeat_interleave",  # whose numbers of repetitions are in a tensor
}


class Calls(TorchDispatchMode):
    """Counts the operators that compute something, and those that make a GPU wait."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, overload = function._schema.name.split("::")[-1], function._overloadname
        if not function.is_view:
            self.launches[name] += 1
        elsewhere = name == "_to_copy" and kwargs.get("device") not in (None, args[0].device)
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        # A number alone that stays on the CPU travels with a kernel's arguments.
        alone = name == "lift_fresh" and args[0].ndim == 0 and args[0].device.type == "cpu"
        harmless = alone or (name == "repeat_interleave" and overload != "Tensor")
        if (name in WAITING and not harmless) or elsewhere or masks:
            self.waiting[f"{name}.{overload}"] += 1
        return function(*args, **kwargs)


def second(call: Callable[[], object]) -> Calls:
    """What the second of two calls asks for."""
    call()
    with Calls() as calls:
        call()
    return calls


def covering(*shape: int) -> Neighbourhood:
    groups = tuple((n - 1) // 2 + 1 for n in shape)
    return Neighbourhood(shape, groups, 2, 3, 1, tuple(2 * g - 1 for g in groups))


def windowed(*shape: int) -> Neighbourhood:
    return Neighbourhood(shape, tuple((n - 1) // 2 + 1 for n in shape), 2, 3, 1, 3)


def test_the_watch_notices() -> None:
    """Each of the ways in which Python can wait."""
    x = torch.arange(3.0)
    for wait in (
        lambda: x.max().item(),
        lambda: bool(x.sum() > 0),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: x.unique(),
        lambda: x.to("meta"),
        lambda: x.repeat_interleave(torch.arange(3)),
        lambda: torch.equal(x, x),
    ):
        assert second(wait).waiting, wait
    assert not second(lambda: x.to(torch.bfloat16).repeat_interleave(3)).waiting


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ndim", SHAPES)
@pytest.mark.parametrize("name", ["tiled", "fused"])
def test_engines(
    name: str, ndim: int, dtype: torch.dtype, compact: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "_on_cpu", lambda x: False)
    neighbourhood = (covering if name == "fused" else windowed)(*SHAPES[ndim])
    bias = "table" if name == "tiled" else None
    masks = {"valid": "some", "valid_groups": "some"} if masked else {}
    case = make_case(neighbourhood, bias=bias, compact=compact, **masks).to(dtype)
    passes, up, down = engine(name), operands(case, case.u), operands(case, case.v)

    def run() -> None:
        out, lse = passes.assign(up)
        for grad_lse in (None, lse):
            passes.assign_backward(up, out, lse, out, grad_lse)
        for given in (None, lse):
            pooled = passes.pool(down, given)
            grad_lse = lse if given is None else None
            passes.pool_backward(down, pooled, pooled.out, pooled.log_mass, grad_lse)

    assert not second(run).waiting


@pytest.mark.parametrize("ndim", SHAPES)
def test_deformable_operators(ndim: int) -> None:
    case = make_case(windowed(*SHAPES[ndim]), valid_groups="some").to(torch.float32)
    shape = case.neighbourhood.output_shape
    places = torch.rand(2, 2, case.k.shape[2], 3, ndim) * torch.tensor([float(n) for n in shape])
    starts = places[0, 0].floor()
    visible = torch.ones(case.k.shape[2], 3, dtype=torch.bool)
    tokens = case.neighbourhood.places()

    def run() -> None:
        for valid in (None, case.valid_groups):
            groups = deformable.lattice(shape, valid)
            leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.u, case.v, places)]
            q, k, u, v, some = leaves
            apart = deformable.squared_distances(tokens, case.neighbourhood.stride, starts, some - starts, groups)
            shares = deformable.point_log_shares(q, k, some, visible, groups, scale=0.5, lowering=apart)
            shares = shares.masked_fill(shares == -torch.inf, -1e3)
            up = deformable.assign(shares, some, u, groups)
            down, mass = deformable.pool(shares, some, v, groups)
            total = up.sum() + down.sum() + deformable.spread(shares, some, v, groups).sum() + mass.clamp(min=-9).sum()
            torch.autograd.grad(total, leaves)
            deformable.labels(shares.detach(), some.detach(), groups)

    assert not second(run).waiting


def step(layer: torch.nn.Module, x: Tensor, options: dict[str, Any]) -> Callable[[], object]:
    """A forward and backward pass, with what an assignment does between them."""

    def run() -> None:
        out = layer(x, **options)
        if not isinstance(out, Tensor):
            members = out.assignment
            out = members.upsample(out.x_out).sum() + members.pool(x).sum() + out.x_out.sum()
        out.sum().backward()

    return run


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["auto", "gpu's"])
@pytest.mark.parametrize("variant", [*VARIANTS, "windowed self-attention"])
def test_layers(variant: str, backend: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_on_cpu", lambda x: False)
    engines = {"auto": "auto", "gpu's": {"dense": "fused", "deformable": "reference"}.get(variant, "tiled")}
    layer = full(variant, backend=engines[backend])
    x, shape = tokens((6, 9), channels=16), (6, 9)
    options: dict[str, Any] = {"grid_shape" if variant not in VARIANTS else "input_grid_shape": shape}
    if padded:
        options["valid"] = torch.ones(2, *shape, dtype=torch.bool)
        options["valid"][1, 4:] = False
    assert not second(step(layer, x, options)).waiting


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{"head": "panoptic"}, {"head": "fused", "stem": "conv"}, {"downsample": "conv"}])
def test_networks(options: dict[str, Any], padded: bool) -> None:
    network, image, valid = make(2, **options), image_of((13, 10)), None
    if padded:
        image, valid = padded_to(image, (19, 17), 0.0)

    def run() -> None:
        output = network(image, torch.full((2, 2), 0.7), valid)
        pooled = [members.pool(x).sum() for members, x in zip(output.assignments, output.features, strict=False)]
        (output.logits.sum() + sum(pooled)).backward()

    assert not second(run).waiting


# Three rounds with a GPU's parts (550, 1,180 and 2,600); in a CPU's, 3-D grids take four times as many.
MOST_LAUNCHES = {1: 600, 2: 1250, 3: 2700}


@pytest.mark.parametrize("ndim", [1, 2, *slow(3)])
def test_a_deformable_forward_pass_takes_few_launches(ndim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every operator is a launch, and small ones cost what launching costs."""
    monkeypatch.setitem(plain.PART_ELEMENTS, "cpu", plain.PART_ELEMENTS["cuda"])
    shape = {1: (4096,), 2: (48, 48), 3: (12, 12, 12)}[ndim]
    layer = VARIANTS["deformable"](64, ndim, 3, 4, backend="reference")
    x = tokens(shape, channels=64)
    assert second(lambda: layer(x, 1.0, shape)).launches.total() <= MOST_LAUNCHES[ndim]
