"""How operands may lie in memory, what is never read of them, and what a call allocates."""

from dataclasses import replace

import pytest
import torch
from grouping_cases import assert_near, gradients, make_case
from operator_calls import OPERATORS, operands
from spatial_grouping_attention import Neighbourhood, functional
from spatial_grouping_attention.backends import triton as engine
from torch import Tensor
from triton_cases import call, check, everywhere, moved, on_gpu, one_plan_a_class  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_plan_a_class")


@everywhere
def test_values_of_many_channels_are_worked_through_in_slices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives at normalisers, masses and bias must enter once, not once a slice."""
    from spatial_grouping_attention.backends.triton import passes

    monkeypatch.setattr(passes, "MOST_CHANNELS", 8)
    case = make_case(
        Neighbourhood((9,), (5,), 2, 3, 1, 3), batch=1, heads=1, value_size=19, bias="table", valid_groups="some"
    )
    check(case, device)
    check(case, device, torch.bfloat16, operators=("group",))


@pytest.mark.slow
@everywhere
def test_what_excluded_tokens_and_groups_hold_is_never_read(device: str) -> None:
    """The passes themselves, without what zeroes such rows before them."""
    neighbourhood = Neighbourhood((9, 7), (5, 4), 2, 3, 1, 3)
    masks = {"valid": "some", "valid_groups": "some"}
    case = moved(make_case(neighbourhood, bias="table", compact=True, **masks).to(torch.float32), device)
    tokens, groups = ~case.valid[:, None, :, None], ~case.valid_groups[:, None, :, None]
    # Valid tokens that see no valid group are excluded too.
    _, lse = call("assign", case)
    tokens = tokens | lse.isinf()[..., None]

    def every_pass(poison: float) -> list[Tensor]:
        q, u = (x.masked_fill(groups, poison) for x in (case.q, case.u))
        k, v = (x.masked_fill(tokens, poison) for x in (case.k, case.v))
        x = operands(replace(case, q=q, k=k), u)
        out, lse = engine.assign(x)
        gradients = engine.assign_backward(x, out, lse, v, v[..., 0])
        x = x._replace(values=v)
        pooled = engine.pool(x, None)
        more = engine.pool_backward(x, pooled, u, u[..., 0], v[..., 0])
        return [x for x in (out, lse, *gradients, *pooled, *more) if x is not None]

    for clean, poisoned in zip(every_pass(0.0), every_pass(float("nan")), strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.slow
@everywhere
def test_operands_may_lie_in_memory_in_any_way(device: str) -> None:
    """Views are read where they are, and results come in the order of tokens and heads that the operands have."""
    case = make_case(Neighbourhood((13,), (7,), 2, 3, 1, 3), bias="table").to(torch.float32)
    case = moved(case, device)

    def token_major(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def every_other_channel(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=-1)[..., ::2]

    def turned(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT

    want = {operator: call(operator, case) for operator in OPERATORS}
    strided = replace(
        case,
        q=token_major(case.q),
        k=every_other_channel(case.k),
        v=token_major(case.v),
        u=turned(case.u),
        lse=turned(case.lse),
        bias=case.bias.flip(1).flip(1).transpose(0, 1).contiguous().transpose(0, 1),
        valid=torch.ones_like(case.lse[:, :1, :].bool()).expand(-1, 2, -1)[:, 0],
    )
    for operator in OPERATORS:
        leaves, plain_leaves = strided.leaves(), case.leaves()
        # A leaf must keep the layout of its view.
        leaves = {name: getattr(strided, name).detach().requires_grad_() for name in leaves}
        got = call(operator, strided.with_leaves(leaves))
        for mine, theirs in zip(got, want[operator], strict=True):
            assert_near(mine.cpu(), theirs.cpu(), 1e-6, operator)
        grads = gradients(tuple(x.cpu() for x in got), leaves)
        expected = gradients(tuple(x.cpu() for x in call(operator, case.with_leaves(plain_leaves))), plain_leaves)
        for name, grad in grads.items():
            assert_near(grad.cpu(), expected[name].cpu(), 1e-5, f"{operator} gradient to {name}")
    pooled = call("group", strided)[0]
    assert pooled.transpose(1, 2).is_contiguous()


@on_gpu
def test_memory_is_linear_in_tokens(device: str) -> None:
    """Neither logits nor anything else of tokens times window is allocated: gradients and normalisers only."""
    neighbourhood = Neighbourhood((256, 256), (128, 128), 2, 3, 1, 9)
    shape = (1, 4, neighbourhood.num_inputs, 32)
    q = torch.randn(1, 4, neighbourhood.num_groups, 32, device=device, requires_grad=True)
    k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    for _ in range(2):  # the first call of a class tries its candidates
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, _ = functional.grouping_attention(q, k, v, neighbourhood, backend="triton")
        torch.autograd.grad(out.sum(), (q, k, v))
        used = torch.cuda.max_memory_allocated() - before
    assert used < 4 * k.numel() * k.element_size()
