"""The Triton kernels of the rotation against the formula in float64, forward and in every gradient.

Every check runs in two places: in triton's interpreter on a CPU (mark ``triton``, TRITON_INTERPRET=1 in the
environment), and on a GPU (mark ``gpu``).
"""

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from RoSE import functional, kernels
from RoSE.kernels import operators
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

INTERPRETER = pytest.param("cpu", marks=pytest.mark.triton)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
everywhere = pytest.mark.parametrize("device", [INTERPRETER, GPU])

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_near(got: Tensor, want: Tensor, tolerance: float, what: str = "") -> None:
    """Largest difference within ``tolerance`` of the largest wanted value."""
    assert got.shape == want.shape, what
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    error, size = (got - want).abs().max().item(), max(want.abs().max().item(), 1e-3)
    assert error <= tolerance * size, f"{what}: off by {error:.3g} of {size:.3g}"


def by_formula(x: Tensor, coordinates: Tensor, freqs: Tensor, prefix: int, interleaved: bool) -> Tensor:
    """Complex multiplication of pairs by exp(i <p, w>), in float64; prefix tokens and further heads as they are."""
    x, coordinates, freqs = x.double(), coordinates.double(), freqs.double()
    heads, planes = freqs.shape[:2]
    angles = torch.einsum("...ns,hcs->...hnc", coordinates, freqs)
    turning = x[:, :heads, prefix:, : 2 * planes]
    pairs = turning.unflatten(-1, (-1, 2)) if interleaved else turning.unflatten(-1, (2, -1)).mT
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    turned = turned.flatten(-2) if interleaved else turned.mT.flatten(-2)
    turned = torch.cat((turned, x[:, :heads, prefix:, 2 * planes :]), -1)
    turned = torch.cat((x[:, :heads, :prefix], turned), 2)
    return torch.cat((turned, x[:, heads:]), 1)


def operands(
    *,
    batch: int = 2,
    heads: int = 2,
    tokens: int = 21,
    channels: int = 8,
    rotary_heads: int | None = None,
    planes: int | None = None,
    axes: int = 2,
    prefix: int = 0,
    batched: bool = False,
    origin: float = 0.0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, coordinates, freqs) with different memory layouts of q and k."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = random(batch, tokens, heads, channels).float().to(device).transpose(1, 2)
    k = random(batch, heads, tokens, channels).float().to(device)
    lead = (batch,) if batched else ()
    coordinates = 10 * random(*lead, tokens - prefix, axes) + origin
    freqs = random(rotary_heads or heads, planes or channels // 2, axes).float()
    return q, k, coordinates.to(device), freqs.to(device)


FEATURES = {
    "one axis": {"axes": 1},
    "three axes, positions per sample": {"axes": 3, "batched": True},
    "prefix tokens": {"prefix": 3, "batched": True},
    "part of the channels": {"channels": 20, "planes": 3},
    "part of the heads": {"heads": 3, "rotary_heads": 2},
    "an odd channel": {"channels": 9, "planes": 4},
    "several blocks": {"batch": 1, "tokens": 150, "channels": 64},
}


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("feature", FEATURES)
@everywhere
def test_positions(feature: str, interleaved: bool, device: str) -> None:
    """q and k turn as the formula says; gradients reach q, k, coordinates and wave vectors."""
    options = FEATURES[feature]
    leaves = [x.requires_grad_() for x in operands(**options, device=device)]
    prefix = options.get("prefix", 0)
    q, k, coordinates, freqs = leaves
    got = kernels.rotate_positions(q, k, coordinates, freqs, num_prefix_tokens=prefix, interleaved=interleaved)
    want = [by_formula(x, coordinates, freqs, prefix, interleaved) for x in (q, k)]
    for name, mine, theirs in zip("qk", got, want, strict=True):
        assert mine.dtype == torch.float32
        assert_near(mine, theirs, 1e-5, name)
    grads = [torch.randn_like(x) for x in got]
    mine = torch.autograd.grad(got, leaves, grads)
    theirs = torch.autograd.grad(want, leaves, [g.double() for g in grads])
    for name, one, other in zip(("q", "k", "coordinates", "freqs"), mine, theirs, strict=True):
        assert one.dtype == other.dtype
        assert_near(one, other, 1e-5, f"gradient to {name}")


@everywhere
@pytest.mark.parametrize("feature", ["prefix tokens", "part of the heads"])
def test_many_gradients_at_once_are_those_one_by_one(feature: str, device: str) -> None:
    leaves = [x.requires_grad_() for x in operands(**FEATURES[feature], device=device)]
    q, k, coordinates, freqs = leaves
    by_position = kernels.rotate_positions(
        q, k, coordinates, freqs, num_prefix_tokens=q.shape[2] - coordinates.shape[-2]
    )
    angles = torch.randn(q.shape[-2], q.shape[-1] // 2, device=device, requires_grad=True)
    by_angle = kernels.rotate(q, angles.cos(), angles.sin())
    for outs, inputs in ((by_position, leaves), (by_angle, (q, angles)), (by_position[:1], (q,))):
        outs = (outs,) if isinstance(outs, Tensor) else outs
        weights = [torch.randn(3, *out.shape, device=device) for out in outs]
        one_by_one = [torch.autograd.grad(outs, inputs, each, retain_graph=True) for each in zip(*weights, strict=True)]
        batched = torch.autograd.grad(outs, inputs, weights, retain_graph=True, is_grads_batched=True)
        for got, want in zip(batched, zip(*one_by_one, strict=True), strict=True):
            assert_near(got, torch.stack(want), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@everywhere
def test_half_types(dtype: torch.dtype, device: str) -> None:
    q, k, coordinates, freqs = operands(device=device)
    leaves = [q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_(), freqs.requires_grad_()]
    got = kernels.rotate_positions(leaves[0], leaves[1], coordinates, leaves[2])
    want = [by_formula(x, coordinates, leaves[2], 0, True) for x in leaves[:2]]
    grads = [torch.randn_like(x) for x in got]
    mine = torch.autograd.grad(got, leaves, grads)
    theirs = torch.autograd.grad(want, leaves, [g.double() for g in grads])
    for one, other in zip((*got, *mine), (*want, *theirs), strict=True):
        assert_near(one, other, TOLERANCE[dtype])
    assert all(x.dtype == dtype for x in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@everywhere
def test_far_from_zero(dtype: torch.dtype, device: str) -> None:
    """Positions of 1e5 units are as exact as their own dtype has them."""
    q, k, coordinates, freqs = operands(origin=1e5, device=device)
    coordinates = coordinates.to(dtype)
    for mine, x in zip(kernels.rotate_positions(q, k, coordinates, freqs), (q, k), strict=True):
        assert (mine - by_formula(x, coordinates, freqs, 0, True)).abs().max() < 1e-4


@everywhere
def test_many_turns_are_as_exact_as_few(device: str) -> None:
    """Angles of 1e7 radians, as 1e5 units meet with the shortest waves of a microscope."""
    q, k, coordinates, freqs = operands(origin=1e5, device=device)
    freqs = freqs * (1e7 / (coordinates @ freqs.double().flatten(0, 1).T).abs().max()).float()
    for mine, x in zip(kernels.rotate_positions(q, k, coordinates, freqs), (q, k), strict=True):
        assert (mine - by_formula(x, coordinates, freqs, 0, True)).abs().max() < 5e-6


def test_reducing_turns_does_not_depend_on_fused_operations() -> None:
    """The kernels' arithmetic in torch, every product once rounded before the subtraction and once after it."""
    numbers = torch.Generator().manual_seed(0)
    p = (torch.rand(10_000, generator=numbers) * 2e5).float()
    w = torch.rand(10_000, generator=numbers) * 16

    def leading_bits(x: Tensor) -> Tensor:
        return (x.view(torch.int32) & -4096).view(torch.float32)

    p1, w1 = leading_bits(p), leading_bits(w)
    for a, b in ((p1, w1), (p1, w - w1), (p - p1, w1)):
        product = a * b
        nearest = (product + 0.5).floor()
        assert torch.equal(product - nearest, (a.double() * b.double() - nearest.double()).float())
        assert torch.equal(product.double(), a.double() * b.double())
    assert ((p - p1) * (w - w1)).abs().max() < 1


@everywhere
def test_a_token_at_zero_is_copied_bit_by_bit(device: str) -> None:
    q, k, coordinates, freqs = operands(device=device)
    got = kernels.rotate_positions(q, k, coordinates * 0, freqs)
    assert torch.equal(got[0], q)
    assert torch.equal(got[1], k)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("shape", "angles"), [((2, 3, 5, 8), (3, 5, 3)), ((5, 8), (1, 4)), ((3, 5, 8), (3, 1, 2))])
@everywhere
def test_given_cosines(shape: tuple[int, ...], angles: tuple[int, ...], interleaved: bool, device: str) -> None:
    """The same as the plain function, also in the gradients to cosines and sines that are broadcast."""
    leaves = [torch.randn(s, device=device).requires_grad_() for s in (shape, angles, angles)]
    got = kernels.rotate(*leaves, interleaved=interleaved)
    want = functional.rotate(*leaves, interleaved=interleaved)
    assert_near(got, want, 1e-6)
    grad = torch.randn_like(got)
    mine, theirs = (torch.autograd.grad(out, leaves, grad) for out in (got, want))
    for one, other in zip(mine, theirs, strict=True):
        assert_near(one, other, 1e-5)
    # Fixed angles keep nothing of x.
    fixed = kernels.rotate(leaves[0], leaves[1].detach(), leaves[2].detach(), interleaved=interleaved)
    assert_near(torch.autograd.grad(fixed, leaves[0], grad)[0], theirs[0], 1e-5)


@everywhere
def test_one_tensor_alone(device: str) -> None:
    q, _, coordinates, freqs = operands(device=device)
    q.requires_grad_()
    got, nothing = kernels.rotate_positions(q, None, coordinates, freqs.requires_grad_())
    assert nothing is None
    want = by_formula(q, coordinates, freqs, 0, True)
    assert_near(got, want, 1e-5)
    mine, theirs = (torch.autograd.grad(out.square().sum() + out.sum(), (q, freqs)) for out in (got, want))
    for one, other in zip(mine, theirs, strict=True):
        assert_near(one, other, 1e-4)


@everywhere
def test_more_samples_than_a_launch_holds(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from RoSE.kernels import launch

    if device == "cpu":
        monkeypatch.setattr(launch, "_MOST_SAMPLES", 2)
    batch = 5 if device == "cpu" else 70_000
    leaves = [x.requires_grad_() for x in operands(batch=batch, tokens=3, batched=True, device=device)]
    got = kernels.rotate_positions(*leaves)
    want = [by_formula(x, leaves[2], leaves[3], 0, True) for x in leaves[:2]]
    grads = [torch.randn_like(x) for x in got]
    mine = torch.autograd.grad(got, leaves, grads)
    theirs = torch.autograd.grad(want, leaves, [g.double() for g in grads])
    for one, other in zip((*got, *mine), (*want, *theirs), strict=True):
        assert_near(one, other, 1e-4)


@everywhere
def test_in_place(device: str) -> None:
    q, k, coordinates, freqs = operands(device=device)
    want = kernels.rotate_positions(q, k, coordinates, freqs, num_prefix_tokens=0)
    got = kernels.rotate_positions(q, k, coordinates, freqs, in_place=True)
    assert got[0] is q
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    cos, sin = torch.ones(21, 4, device=device), torch.zeros(21, 4, device=device)
    assert kernels.rotate(k, cos, sin, in_place=True) is k
    with pytest.raises(ValueError, match="no_grad"):
        kernels.rotate_positions(q.requires_grad_(), k, coordinates, freqs, in_place=True)


@everywhere
def test_results_keep_the_order_of_dimensions_in_memory(device: str) -> None:
    q, k, coordinates, freqs = operands(device=device)
    packed = torch.randn(2, 21, 3, 2, 8, device=device).unbind(2)  # one projection of q, k and v
    for x in (q, k, packed[1].transpose(1, 2)):
        out, _ = kernels.rotate_positions(x, None, coordinates, freqs)
        assert_near(out, by_formula(x, coordinates, freqs, 0, True), 1e-5)
    assert kernels.rotate_positions(q, k, coordinates, freqs)[0].stride() == q.stride()


@everywhere
def test_operators_keep_their_contract_with_torch(device: str) -> None:
    """Schema, registration of autograd, and fake tensors with the shapes, dtypes and strides of real ones."""
    q, k, coordinates, freqs = operands(batched=True, device=device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    backward = ("test_schema", "test_faketensor")
    grad = torch.randn_like(q)
    cos, sin = (torch.randn(21, 4, device=device) for _ in range(2))
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, coordinates, freqs)]
    opcheck(operators.rotate_positions, (*leaves, 0, True), test_utils=checks)
    opcheck(operators.rotate_positions, (q, None, coordinates, freqs, 0, False), test_utils=checks)
    opcheck(
        operators.rotate_positions_in_place, (q.clone(), k.clone(), coordinates, freqs, 0, True), test_utils=backward
    )
    for needs in ((False, False), (True, True)):
        arguments = (q, k, coordinates, freqs, 0, True, grad, torch.randn_like(k), *needs)
        opcheck(operators.rotate_positions_backward, arguments, test_utils=backward)
    opcheck(operators.rotate, (q, cos, sin, True), test_utils=checks)
    opcheck(operators.rotate_in_place, (q.clone(), cos, sin, True), test_utils=backward)
    for x in (None, q):
        opcheck(operators.rotate_backward, (x, cos, sin, True, grad), test_utils=backward)


@everywhere
def test_the_dispatcher_is_asked_only_where_somebody_looks_on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does around an operator takes as long as a launch, and its first call imports the compiler."""
    q, k, coordinates, freqs = (x.to(device) for x in operands())
    leaves = [x.requires_grad_() for x in (q, k, coordinates, freqs)]
    cos, sin = (torch.ones(q.shape[2], 1, requires_grad=True, device=device) for _ in range(2))
    watching = []
    for name in ("rotate", "rotate_backward", "rotate_positions", "rotate_positions_backward"):
        watching.append(Mock(wraps=getattr(operators, name)))
        monkeypatch.setattr(operators, name, watching[-1])

    def use() -> None:
        for x in kernels.rotate_positions(q, k, coordinates, freqs):
            torch.autograd.grad(x.sum(), leaves, retain_graph=True, allow_unused=True)
        torch.autograd.grad(kernels.rotate(q, cos, sin).sum(), (q, cos, sin))

    use()
    assert not any(operator.called for operator in watching)
    with FlopCounterMode(display=False):
        use()
    assert all(operator.called for operator in watching)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's word of TorchScript
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@everywhere
def test_tracers_see_operators(device: str) -> None:
    q, k, coordinates, freqs = (x.to(device) for x in operands())

    def rotate(q: Tensor, k: Tensor, coordinates: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor | None]:
        return kernels.rotate_positions(q, k, coordinates, freqs)

    want = rotate(q, k, coordinates, freqs)
    for pre_dispatch in (False, True):
        graph = make_fx(rotate, pre_dispatch=pre_dispatch)(q, k, coordinates, freqs)
        assert "rotary_spatial_embeddings.rotate_positions" in graph.code
        assert all(map(torch.equal, graph(q, k, coordinates, freqs), want))
    traced = torch.jit.trace(rotate, (q, k, coordinates, freqs))
    assert all(map(torch.equal, traced(q, k, coordinates, freqs), want))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls what torch has deprecated
@pytest.mark.parametrize(
    ("device", "compiler"),
    [
        pytest.param("cpu", "aot_eager", marks=pytest.mark.triton),
        pytest.param("cuda", "inductor", marks=pytest.mark.gpu),
    ],
)
def test_compiled_whole_is_the_same_forward_and_backward(device: str, compiler: str) -> None:
    def step(q: Tensor, k: Tensor, coordinates: Tensor, freqs: Tensor) -> Tensor:
        q, k = kernels.rotate_positions(q, k, coordinates, freqs, num_prefix_tokens=1)
        # Of one and the same token q . k does not depend on the rotation, and gradients would be rounding errors.
        return (q * k.flip(2)).sum((1, 3)).square().sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        leaves = [x.requires_grad_() for x in operands(prefix=1, device=device)]
        total = function(*leaves)
        results.append((total, *torch.autograd.grad(total, leaves)))
    for eager, compiled in zip(*results, strict=True):
        assert_near(compiled, eager, 1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@everywhere
def test_exported_with_any_batch_size(device: str) -> None:
    class Rotation(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, coordinates: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor | None]:
            return kernels.rotate_positions(q, k, coordinates, freqs)

    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = ({0: batch}, {0: batch}, None, None)
    program = torch.export.export(Rotation(), operands(device=device), dynamic_shapes=dynamic)
    more = operands(batch=3, device=device)
    for mine, theirs in zip(program.module()(*more), Rotation()(*more), strict=True):
        assert_near(mine, theirs, 1e-6)


@pytest.mark.triton
def test_what_cannot_be_served_is_refused_with_every_reason() -> None:
    assert kernels.refusals(torch.device("cpu"), torch.bfloat16, 64) == []
    every = kernels.refusals(torch.device("meta"), torch.float64, 513)
    for reason, words in zip(every, ("meta", "float64", "513"), strict=True):
        assert words in reason
    q, k, coordinates, freqs = operands()
    with pytest.raises(ValueError, match=r"cannot serve this call:\n  - .*float64"):
        kernels.rotate_positions(q.double(), k, coordinates, freqs)
    with pytest.raises(ValueError, match="num_prefix_tokens=1"):
        kernels.rotate_positions(q, k, coordinates, freqs, num_prefix_tokens=1)
    with pytest.raises(ValueError, match=r"coordinates \(1, 21, 2\)"):
        kernels.rotate_positions(q, k, coordinates[None], freqs)
    with pytest.raises(ValueError, match="one shape"):
        kernels.rotate(q, freqs[..., 0], freqs[:1, :, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gradients_do_not_depend_on_the_order_of_programs(dtype: torch.dtype) -> None:
    q, k, coordinates, freqs = operands(tokens=5000, heads=8, channels=64, device="cuda")
    runs = []
    for _ in range(3):
        leaves = [x.requires_grad_() for x in (q.to(dtype), k.to(dtype), coordinates, freqs)]
        torch.manual_seed(0)
        got = kernels.rotate_positions(*leaves)
        runs.append(torch.autograd.grad(got, leaves, [torch.randn_like(x) for x in got]))
    for first, other in zip(runs[0] * 2, runs[1] + runs[2], strict=True):
        assert torch.equal(first, other)


@pytest.mark.triton
@pytest.mark.parametrize("interpreter", ["0", "1"])
def test_importing_the_kernels_and_asking_does_not_import_triton(interpreter: str) -> None:
    code = """
import sys, torch
import RoSE.kernels
print(RoSE.kernels.refusals(torch.device("cpu"), torch.float32, 64))
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
"""
    environment = {**os.environ, "TRITON_INTERPRET": interpreter}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    ).stdout
    assert ("need tensors on cuda" in answer) == (interpreter == "0")
