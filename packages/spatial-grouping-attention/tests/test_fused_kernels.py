"""What the dense operators ask of CUDA's attention kernels, on a CPU that emulates them.

Emulated is what the kernels document and what their sources do: head sizes in multiples of 8; products of operands as
they are, accumulated in float32; probabilities and logit gradients rounded to the operands' type; results in that type;
log-sum-exp padded to blocks of 32 queries; and, in half types, ``out`` read in the backward pass as (B, N, H, C) lying
in one piece, whatever its strides say (kernel_backward.h: output_ptr + m * value_size * num_heads).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from grouping_cases import Case, assert_near, finite, make_case, oracle_group
from operator_calls import group
from spatial_grouping_attention import Neighbourhood
from spatial_grouping_attention.backends.fused import dense, flash, frames, on_cuda
from spatial_grouping_attention.backends.fused.channels import Call
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}


class EmulatedKernels:
    """The two operators, with the layout and rounding of the CUDA kernels."""

    def __init__(self) -> None:
        self.calls = 0

    def _scaled_dot_product_efficient_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: None, compute_lse: bool, *, scale: float
    ) -> tuple[Tensor, Tensor, None, None]:
        self.calls += 1
        for x in (q, k, v):
            assert x.stride(-1) == 1
            assert x.shape[-1] % 8 == 0
            assert x.dtype == q.dtype
            bytes_apart = [step * x.element_size() for step in (*x.stride()[:-1], x.storage_offset())]
            assert not any(step % 16 for step in bytes_apart), "rows start in the middle of a vector"
            assert x.isfinite().all()
        scores = scale * (q.float() @ k.float().mT)
        assert scores.isfinite().all()
        lse = scores.logsumexp(-1)
        shares = (scores - scores.amax(-1, keepdim=True)).exp()
        out = (shares.to(q.dtype).float() @ v.float() / shares.sum(-1, keepdim=True)).to(q.dtype)
        lse = torch.nn.functional.pad(lse, (0, -q.shape[2] % 32), value=math.inf)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse, None, None

    def _scaled_dot_product_efficient_attention_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, out: Tensor, lse: Tensor, *rest: object,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, None]:  # fmt: skip
        self.calls += 1
        rows, dtype = q.shape[2], q.dtype
        assert lse.shape[-1] % 32 == 0
        assert (lse[..., rows:] == math.inf).all()
        assert not lse.isnan().any()
        assert (lse > -1e29).all(), "exp2(log2e s - log2e lse) of a row of nothing but -1e30 may be infinite"
        scores = scale * (q.float() @ k.float().mT)
        shares = (scores - lse[..., :rows, None]).exp()
        delta = (grad.float() * as_read(out).float()).sum(-1)
        dv = (shares.to(dtype).float().mT @ grad.float()).to(dtype)
        dscores = (shares * (grad.float() @ v.float().mT - delta[..., None]) * scale).to(dtype).float()
        return (dscores @ k.float()).to(dtype), (dscores.mT @ q.float()).to(dtype), dv, None


def as_read(out: Tensor) -> Tensor:
    """``out`` as the backward kernel finds it in memory."""
    if out.dtype == torch.float32:  # torch computes g . out beforehand
        return out
    heads, channels = out.shape[1], out.shape[3]
    strides = (out.stride(0), out.stride(1), channels * heads, 1)
    last = sum((n - 1) * stride for n, stride in zip(out.shape, strides, strict=True))
    assert out.storage_offset() + last < out.untyped_storage().nbytes() // out.element_size(), "reads behind its end"
    return torch.as_strided(out, out.shape, strides)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> EmulatedKernels:
    """CUDA's half of the dense operators, on operands that lie on a CPU."""
    emulated = EmulatedKernels()
    monkeypatch.setattr(on_cuda, "aten", emulated)
    monkeypatch.setattr(flash, "_kernels", lambda device: on_cuda)
    monkeypatch.setattr(dense, "_widen", lambda x: x)
    monkeypatch.setattr(frames, "_on_cpu", lambda x: False)
    yield emulated
    assert emulated.calls


def check(case: Case, dtype: torch.dtype, *, through_masses: bool = True, tolerance: float | None = None) -> None:
    """Results and gradients of grouping against the definition in float64, on the numbers of ``dtype``."""
    case = case.to(dtype)
    exact, results = case.to(torch.float64), []
    for given, function in ((case, lambda c: group(c, "fused")), (exact, oracle_group)):
        leaves = {name: leaf for name, leaf in given.leaves().items() if name not in ("u", "lse")}
        out, lse, mass = function(given.with_leaves(leaves))
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator) for x in (out, lse, mass)]
        used = (True, True, through_masses)
        total = sum(
            (finite(x).double() * w).sum() for x, w, use in zip((out, lse, mass), weights, used, strict=True) if use
        )
        results.append((out, lse, mass, *torch.autograd.grad(total, list(leaves.values()))))
    names = ("out", "lse", "mass", *leaves)
    for name, got, want in zip(names, *results, strict=True):
        assert_near(got, want, tolerance or TOLERANCE[dtype], name, size=0.1)


@pytest.mark.parametrize("through_masses", [False, True])
@pytest.mark.parametrize("value_size", [64, 36])
@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_read_results_where_they_lie(
    dtype: torch.dtype, heads: int, value_size: int, through_masses: bool
) -> None:
    case = make_case(None, 130, 50, heads=heads, head_size=64, value_size=value_size)
    check(case, dtype, through_masses=through_masses)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_in_the_middle_of_a_vector_are_copied(dtype: torch.dtype) -> None:
    """The first 8 of 9 channels, and all but the first of 9: aligned in elements of neither type."""
    case = make_case(None, 60, 20, head_size=9, value_size=9)
    for part in (slice(0, 8), slice(1, 9)):
        views = {name: getattr(case.to(dtype), name)[..., part] for name in ("q", "k", "v", "u")}
        views = {name: x.to(dtype) for name, x in views.items()}
        assert views["k"].stride(-2) == 9
        check_views(replace(case.to(dtype), **views), dtype)


def check_views(case: Case, dtype: torch.dtype) -> None:
    """As :func:`check`, without leaves of one's own: a copied leaf is aligned."""
    out, lse, mass = group(case, "fused")
    for name, got, want in zip(
        ("out", "lse", "mass"), (out, lse, mass), oracle_group(case.to(torch.float64)), strict=True
    ):
        assert_near(got, want, TOLERANCE[dtype], name, size=0.1)


@pytest.mark.parametrize("what", ["valid", "valid_groups"])
@pytest.mark.parametrize("head_size", [24, 26, 32, 35])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_of_which_nothing_is_valid(dtype: torch.dtype, head_size: int, what: str) -> None:
    case = make_case(None, 60, 20, head_size=head_size, value_size=16, **{what: "none in one sample"})
    check(case, dtype)
    mass = group(case.to(dtype), "fused")[2]
    assert (mass[-1] == -math.inf).all()


@pytest.mark.parametrize("scale", [-0.125, 1e-4, -1e-4, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_the_scale_biases_arrive_whole(dtype: torch.dtype, scale: float) -> None:
    case = make_case(None, 60, 20, head_size=16, value_size=16, valid="some", scale=scale)
    if abs(scale) > 1:
        case = replace(case, q=0.02 * case.q)
    check(case, dtype)


@pytest.mark.parametrize("value", [1e-3, 1.0, 300.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_normalisers_of_any_size_keep_their_digits(dtype: torch.dtype, value: float) -> None:
    """Three half numbers hold a float32 normaliser to 1e-5 of it, or 1e-5."""
    q, k = torch.zeros(1, 1, 40, 8, dtype=dtype), torch.zeros(1, 1, 24, 8, dtype=dtype)
    bias = value * torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(0))
    _, lse = on_cuda.attention(Call(q, k, k, 0.3, bias))
    assert_near(lse, bias.double().logsumexp(-1)[..., None].expand(-1, -1, 40), 1e-5, size=1.0)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("shape", [(300,), (24, 20)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compactness_in_channels(dtype: torch.dtype, shape: tuple[int, ...], stride: int) -> None:
    groups = tuple((n - 1) // stride + 1 for n in shape)
    neighbourhood = Neighbourhood(shape, groups, stride, 3, 1, tuple(2 * g - 1 for g in groups))
    case = make_case(neighbourhood, batch=1, head_size=16, value_size=16)
    case = replace(case, compactness=torch.tensor([0.5, 2.0], dtype=torch.float64))
    check(case, dtype, tolerance={torch.float32: 1e-4}.get(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compactness_far_from_the_origin(dtype: torch.dtype) -> None:
    """Without content memberships are the closed form, on 4096 tokens an axis too; float16 ends at 65504."""
    neighbourhood = Neighbourhood((4096,), (2048,), 2, 3, 1, 4095)
    q, k = torch.zeros(1, 1, 2048, 8, dtype=dtype), torch.zeros(1, 1, 4096, 8, dtype=dtype)
    v = torch.randn(1, 1, 4096, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    case = Case(neighbourhood, q, k, v, q, q[..., 0], None, None, None, None)
    case = replace(case, compactness=torch.tensor([2.0]))
    out, lse, mass = group(case, "fused")
    want = oracle_of_places(case)
    assert_near(out, want[0], TOLERANCE[dtype])
    assert_near(lse, want[1], 1e-4, size=1.0)
    assert_near(mass, want[2], 1e-4, size=1.0)


def oracle_of_places(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    tokens, groups = torch.arange(4096).double() / 2, torch.arange(2048).double()
    logits = -2.0 * (tokens[:, None] - groups).square()
    lse = logits.logsumexp(-1)
    mass = (logits - lse[:, None]).logsumexp(0)
    return (
        ((logits - lse[:, None] - mass).exp().mT @ case.v[0, 0].double())[None, None],
        lse[None, None],
        mass[None, None],
    )
