"""The Triton kernels against the definition of grouping, forward and in every gradient.

Every check runs in two places: in triton's interpreter on a CPU (mark ``triton``, TRITON_INTERPRET=1 in the
environment) on shapes as small as the features allow, and on a GPU (mark ``gpu``), there also in half types and on
grids of many tiles.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from grouping_cases import (
    Case,
    assert_near,
    gradients,
    make_case,
    natural_sizes,
    neighbourhoods,
    oracle_assign,
    oracle_group,
    oracle_pool,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_calls import OPERATORS, operands
from operator_calls import call as call_operator
from RoSE.kernels.selfcheck import SelfCheck
from spatial_grouping_attention import Neighbourhood, functional
from spatial_grouping_attention.backends import Backend, Problem, registered, selection
from spatial_grouping_attention.backends import triton as engine
from torch import Tensor
from torch.library import opcheck

INTERPRETER = pytest.param("cpu", marks=pytest.mark.triton)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
everywhere = pytest.mark.parametrize("device", [INTERPRETER, GPU])
on_gpu = pytest.mark.parametrize("device", [GPU])
in_interpreter = pytest.mark.parametrize("device", [INTERPRETER])

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def moved(case: Case, device: str) -> Case:
    tensors = {name: x.to(device) for name, x in vars(case).items() if isinstance(x, Tensor)}
    return replace(case, **tensors)


def call(operator: str, case: Case) -> tuple[Tensor, ...]:
    return call_operator(operator, case, "triton")


def oracle(operator: str, case: Case) -> tuple[Tensor, ...]:
    return {"assign": oracle_assign, "pool": lambda c: oracle_pool(c)[:1], "group": oracle_group}[operator](case)


def check(
    case: Case,
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    operators: tuple[str, ...] = OPERATORS,
    slack: float = 1.0,
) -> None:
    """Operators and all their gradients agree with the oracle on the very numbers of ``dtype``."""
    case = case.to(dtype)
    exact = case.to(torch.float64)
    sizes, tolerance = natural_sizes(exact), TOLERANCE[dtype] * slack
    for operator in operators:
        leaves, exact_leaves = moved(case, device).leaves(), exact.leaves()
        got = call(operator, moved(case, device).with_leaves(leaves))
        want = oracle(operator, exact.with_leaves(exact_leaves))
        for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            assert mine.dtype == (dtype if i == 0 else torch.float32)
            size = sizes["out" if i == 0 else "log"]
            assert_near(mine.cpu(), theirs, tolerance, f"{operator} result {i}", size=size)
        got_grads = gradients(tuple(x.cpu() for x in got), leaves)
        for name, want_grad in gradients(want, exact_leaves).items():
            assert got_grads[name].dtype == dtype or name == "lse"
            what = f"{operator} gradient to {name}"
            assert_near(got_grads[name].cpu(), want_grad, tolerance, what, size=sizes[name])


FEATURES = {
    "1-D": (Neighbourhood((21,), (11,), 2, 3, 1, 3), {"head_size": 16, "value_size": 16}),
    "1-D, odd sizes, bias, mask": (
        Neighbourhood((37,), (19,), 2, 3, 1, 5),
        {"head_size": 5, "value_size": 19, "bias": "table", "valid": "some", "batch": 2, "heads": 2, "scale": 0.7},
    ),
    "1-D, dilated, border blocks, bias": (Neighbourhood((29,), (8,), 3, 7, 0, 3, 2), {"bias": "table"}),
    "1-D, more phases than groups": (Neighbourhood((9,), (3,), 3, 3, 0, 5, 4), {"bias": "table"}),
    "1-D, stride 1, window of everything": (Neighbourhood((7,), (7,), 1, 1, 0, 15), {}),
    "1-D, stride larger than kernel": (Neighbourhood((41,), (5,), 9, 2, 0, 3), {"head_size": 24}),
    "1-D, groups beyond the input": (Neighbourhood((4,), (8,), 2, 2, 6, 3), {"valid": "some"}),
    "2-D": (Neighbourhood((10, 12), (5, 6), 2, 3, 1, 3), {"bias": "table", "valid": "some"}),
    "2-D, dilated and anisotropic": (
        Neighbourhood((9, 13), (3, 3), (2, 3), (4, 7), (0, 1), (3, 5), (2, 1)),
        {"bias": "table"},
    ),
    "3-D": (Neighbourhood((4, 5, 6), (2, 3, 3), 2, 3, 1, 3), {"bias": "table", "valid": "some"}),
    "3-D, several steps of groups": (Neighbourhood((1, 5, 9), (1, 5, 9), 1, 1, 0, 9), {}),
    "nobody is valid in one sample": (
        Neighbourhood((9,), (5,), 2, 3, 1, 3),
        {"valid": "none in one sample", "batch": 2},
    ),
    "1-D, some groups": (Neighbourhood((21,), (11,), 2, 3, 1, 3), {"valid_groups": "some", "bias": "table"}),
    "2-D, some tokens and groups": (
        Neighbourhood((9, 7), (5, 4), 2, 3, 1, 3, (2, 1)),
        {"valid": "some", "valid_groups": "some", "batch": 2, "heads": 2},
    ),
    "3-D, some groups": (Neighbourhood((4, 5, 6), (2, 3, 3), 2, 3, 1, 3), {"valid_groups": "some"}),
    "no group is valid in one sample": (
        Neighbourhood((9,), (5,), 2, 3, 1, 3),
        {"valid_groups": "none in one sample", "batch": 2},
    ),
}


@everywhere
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, device: str) -> None:
    neighbourhood, options = FEATURES[feature]
    check(make_case(neighbourhood, **{"batch": 1, "heads": 1, **options}), device)


@pytest.mark.parametrize(
    ("device", "examples"),
    [pytest.param("cpu", 12, marks=pytest.mark.triton), pytest.param("cuda", 200, marks=pytest.mark.gpu)],
)
def test_any_geometry(device: str, examples: int) -> None:
    @settings(max_examples=examples, database=None)
    @given(neighbourhoods(), *(st.sampled_from((None, "some")),) * 2, st.integers(0, 2**16))
    def law(neighbourhood: Neighbourhood, valid: str | None, valid_groups: str | None, seed: int) -> None:
        masks = {"valid": valid, "valid_groups": valid_groups}
        case = make_case(neighbourhood, batch=1, heads=1, bias="table", **masks, seed=seed)
        check(case, device, operators=("assign", "group"))

    law()


@everywhere
def test_large_logits_starve_groups_but_averages_stay_exact(device: str) -> None:
    """Memberships of starved groups are as small as exp(-300), far below what float32 can hold."""
    case = make_case(Neighbourhood((17,), (9,), 2, 3, 1, 3), batch=1, heads=1, strength=30.0)
    check(case, device, slack=30.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@everywhere
def test_half_types(dtype: torch.dtype, device: str) -> None:
    case = make_case(Neighbourhood((11,), (6,), 2, 3, 1, 3), batch=1, heads=2, bias="table", head_size=16)
    check(case, device, dtype)


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


@everywhere
def test_what_excluded_tokens_and_groups_hold_is_never_read(device: str) -> None:
    """The passes themselves, without what zeroes such rows before them."""
    neighbourhood = Neighbourhood((9, 7), (5, 4), 2, 3, 1, 3)
    case = moved(make_case(neighbourhood, bias="table", valid="some", valid_groups="some").to(torch.float32), device)
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
        return [out, lse, *gradients[:4], *pooled[:3], *more]

    for clean, poisoned in zip(every_pass(0.0), every_pass(float("nan")), strict=True):
        assert torch.equal(clean, poisoned)


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
        mine = gradients(tuple(x.cpu() for x in got), leaves)
        theirs = gradients(tuple(x.cpu() for x in call(operator, case.with_leaves(plain_leaves))), plain_leaves)
        for name, grad in mine.items():
            assert_near(grad.cpu(), theirs[name].cpu(), 1e-5, f"{operator} gradient to {name}")
    pooled = call("group", strided)[0]
    assert pooled.transpose(1, 2).is_contiguous()


@in_interpreter
@pytest.mark.parametrize(("tile", "rows"), [((1, 8, 8), 64), ((1, 8, 16), 16), ((1, 2, 8), 16), ((1, 16, 4), 32)])
def test_cutting_the_work_changes_nothing(
    tile: tuple[int, int, int], rows: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of a GPU's candidates, and tiles that neither divide nor are divided by the stride."""
    from spatial_grouping_attention.backends.triton import plan

    monkeypatch.setitem(plan.INTERPRETED_TILES, 2, tile)
    monkeypatch.setattr(plan, "INTERPRETED_ROWS", rows)
    monkeypatch.setattr(plan, "_CHOSEN", {})
    case = make_case(Neighbourhood((13, 11), (5, 6), (3, 2), 3, 1, 3), batch=1, heads=1, bias="table")
    check(case, device, operators=("assign", "group"))


@pytest.mark.triton
def test_a_class_of_calls_is_timed_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    from spatial_grouping_attention.backends.triton import plan

    quick, slow, too_large = (plan.Plan((1, 1, n), 16, 4, 1) for n in (64, 128, 256))
    monkeypatch.setattr(plan, "_CHOSEN", {})
    durations = {quick: 1.0, slow: 2.0, too_large: float("inf")}
    timed: list[plan.Plan] = []
    launched: list[plan.Plan] = []

    def time(run: object, candidate: plan.Plan) -> float:
        timed.append(candidate)
        return durations[candidate]

    monkeypatch.setattr(plan, "_time", time)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        plan.choose("a class", lambda: [slow, too_large, quick], launched.append)
    assert timed == [slow, too_large, quick]
    assert launched == [quick, quick]
    # While a graph is captured nothing may be tried out, and nothing is remembered.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    plan.choose("another", lambda: [slow, quick], launched.append)
    assert launched[-1] == slow
    assert len(timed) == 3


@pytest.mark.triton
def test_no_candidate_has_tiles_beyond_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small grids compile one candidate, large ones all that fit into registers."""
    from spatial_grouping_attention.backends.triton import plan
    from spatial_grouping_attention.backends.triton.layout import layout_of

    monkeypatch.setattr(plan, "INTERPRETED", False)
    small, large = (layout_of(Neighbourhood((2 * n,) * 2, (n,) * 2, 2, 3, 1, 3)) for n in (3, 64))
    for plans, tiles in ((plan.token_plans, plan.TOKEN_TILES[2]), (plan.group_plans, plan.GROUP_TILES[2])):
        assert [candidate.tile for candidate in plans(small, 32)] == [tiles[0][0]]
        assert [(candidate.tile, candidate.num_warps) for candidate in plans(large, 32)] == list(tiles)


LARGER = {
    "1-D": Neighbourhood((1003,), (502,), 2, 3, 1, 5),
    "1-D dilated": Neighbourhood((997,), (997,), 1, 1, 0, 3, 4),
    "2-D": Neighbourhood((61, 67), (31, 34), 2, 3, 1, 3),
    "2-D stride 4": Neighbourhood((61, 67), (16, 17), 4, 7, 3, 3),
    "2-D anisotropic": Neighbourhood((40, 63), (40, 16), (1, 4), (3, 7), (1, 3), (5, 3), (2, 1)),
    "3-D": Neighbourhood((12, 19, 21), (12, 10, 11), (1, 2, 2), (3, 5, 5), (1, 2, 2), 3),
    "3-D wide": Neighbourhood((9, 14, 16), (9, 7, 8), (1, 2, 2), 3, 1, 9),
}


@on_gpu
@pytest.mark.parametrize("head_size", [16, 24, 32, 64, 80, 128])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_head_sizes(dtype: torch.dtype, head_size: int, device: str) -> None:
    masks = {"valid": "some", "valid_groups": "some"}
    case = make_case(LARGER["2-D"], batch=1, head_size=head_size, value_size=head_size, bias="table", **masks)
    check(case, device, dtype)


@on_gpu
@pytest.mark.parametrize("geometry", LARGER)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_larger_grids(dtype: torch.dtype, geometry: str, device: str) -> None:
    masks = {"valid": "some", "valid_groups": "some"}
    check(make_case(LARGER[geometry], batch=1, heads=3, bias="table", **masks, head_size=32), device, dtype)


@on_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_results_do_not_depend_on_the_order_of_programs(dtype: torch.dtype, device: str) -> None:
    case = moved(make_case(LARGER["2-D"], bias="table", head_size=32).to(dtype), device)
    runs = []
    for _ in range(3):
        leaves = case.leaves()
        got = call("group", case.with_leaves(leaves))
        runs.append([*got, *gradients(tuple(x.cpu() for x in got), leaves).values()])
    for first, other in zip(runs[0] * 2, runs[1] + runs[2], strict=True):
        assert torch.equal(first, other)


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


OPERANDS = make_case(
    Neighbourhood((20,), (10,), 2, 3, 1, 3),
    batch=1,
    heads=2,
    bias="table",
    valid="some",
    valid_groups="some",
    head_size=4,
    value_size=3,
).to(torch.float32)


def arguments(case: Case, values: Tensor) -> tuple[object, ...]:
    """What the registered operators take in front."""
    return ("triton", *registered._spread(operands(case, values)))


@everywhere
def test_operators_keep_their_contract_with_torch(device: str) -> None:
    """Schema, registration of autograd, and fake tensors with the shapes, dtypes and strides of real ones."""
    case = moved(OPERANDS, device)
    case = case.with_leaves(case.leaves())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    token_major = case.v.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    opcheck(registered._pool, (*arguments(case, token_major), None), test_utils=checks)
    plain = replace(case, bias=None, valid=None, valid_groups=None)
    opcheck(registered._pool, (*arguments(plain, case.v), case.lse), test_utils=checks)
    opcheck(registered._assign, arguments(case, case.u), test_utils=checks)


@everywhere
def test_backward_operators_keep_their_contract_with_torch(device: str) -> None:
    case = moved(OPERANDS, device)
    of_tokens, of_groups = arguments(case, case.v), arguments(case, case.u)
    out, log_mass, lse, expected_q = registered._pool(*of_tokens, None)
    checks = ("test_schema", "test_faketensor")
    for grad_lse in (None, torch.randn_like(lse)):
        more = (out, log_mass, lse, expected_q, torch.randn_like(out), torch.randn_like(log_mass), grad_lse)
        opcheck(registered._pool_backward, (*of_tokens, *more), test_utils=checks)
    up, lse = registered._assign(*of_groups)
    more = (up, lse, torch.randn_like(up), torch.randn_like(lse))
    opcheck(registered._assign_backward, (*of_groups, *more), test_utils=checks)


def step(case: Case) -> tuple[Tensor, ...]:
    """A grouping, its values carried back up, and a number to differentiate."""
    options = {"bias": case.bias, "valid": case.valid, "valid_groups": case.valid_groups, "backend": "triton"}
    out, lse = functional.grouping_attention(case.q, case.k, case.v, case.neighbourhood, **options)
    up, _ = functional.assign(case.q, case.k, out, case.neighbourhood, **options)
    return out, up, out.square().sum() + up.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()


# aot_eager traces forward and backward as Inductor does, and needs no compiler.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls what torch has deprecated
@pytest.mark.parametrize(
    ("device", "compiler"),
    [
        pytest.param("cpu", "aot_eager", marks=pytest.mark.triton),
        pytest.param("cuda", "inductor", marks=pytest.mark.gpu),
    ],
)
def test_compiled_whole_is_the_same_forward_and_backward(device: str, compiler: str) -> None:
    case = moved(OPERANDS, device)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        leaves = case.leaves()
        out, up, total = function(case.with_leaves(leaves))
        total.backward()
        results.append((out, up, *(leaves[name].grad for name in ("q", "k", "v", "bias"))))
    for i, (eager, compiled) in enumerate(zip(*results, strict=True)):
        assert_near(compiled.cpu(), eager.cpu(), 1e-5, f"result {i}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@everywhere
def test_exported_with_any_batch_size(device: str) -> None:
    class Grouping(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return functional.grouping_attention(q, k, v, OPERANDS.neighbourhood, backend="triton")[0]

    def operands(batch: int) -> tuple[Tensor, ...]:
        case = make_case(OPERANDS.neighbourhood, batch=batch, heads=1, head_size=4, value_size=3).to(torch.float32)
        case = moved(case, device)
        return case.q, case.k, case.v

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Grouping(), operands(2), dynamic_shapes=({0: batch},) * 3)
    assert_near(program.module()(*operands(3)).cpu(), Grouping()(*operands(3)).cpu(), 1e-6)


@everywhere
def test_differentiating_twice_is_refused(device: str) -> None:
    case = moved(OPERANDS, device)
    leaves = case.leaves()
    out = call("group", case.with_leaves(leaves))[0]
    (first,) = torch.autograd.grad(out.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


PROBLEM = Problem(torch.device("cpu"), torch.float32, 32, OPERANDS.neighbourhood, None)


@pytest.mark.triton
def test_what_cannot_be_served_is_refused_with_every_reason() -> None:
    assert engine.refusals(PROBLEM) == []
    assert engine.refusals(replace(PROBLEM, bias="table", dtype=torch.bfloat16, head_size=128)) == []
    four_axes = Neighbourhood((2, 2, 2, 2), (1, 1, 1, 1), 2, 2, 0, 1)
    every = engine.refusals(Problem(torch.device("meta"), torch.float64, 129, four_axes, "full"))
    for reason, words in zip(every, ("meta", "float64", "129", "4", "every pair"), strict=True):
        assert words in reason
    case = OPERANDS.to(torch.float64)
    with pytest.raises(ValueError, match=r"backend='triton' cannot serve this call:\n  - .*float64"):
        call("group", case)
    with pytest.raises(ValueError, match="needs a neighbourhood"):
        functional.assign(OPERANDS.q, OPERANDS.k, OPERANDS.u, backend="triton")


@pytest.mark.triton
def test_the_interpreter_is_never_chosen_unasked() -> None:
    assert functional.select(OPERANDS.q, OPERANDS.neighbourhood).backend == Backend.TILED
    assert functional.select(OPERANDS.q, OPERANDS.neighbourhood, backend="triton").backend == Backend.TRITON


@everywhere
def test_the_kernels_pass_their_self_check(device: str) -> None:
    """What decides whether "auto" takes them; a failure would warn."""
    assert SelfCheck("the kernels", selection._check_triton, "'tiled'").passed(torch.device(device))


@everywhere
@pytest.mark.parametrize("gradient", ["q", "k", "values", "bias"])
def test_the_self_check_notices_a_wrong_gradient(gradient: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spatial_grouping_attention.backends.triton import check as self_check

    backward = self_check.assign_backward

    def wrong(*arguments: object) -> object:
        gradients = backward(*arguments)
        return gradients._replace(**{gradient: 1.01 * getattr(gradients, gradient)})

    monkeypatch.setattr(self_check, "assign_backward", wrong)
    with pytest.raises(ArithmeticError, match=f"assign: the gradient of {gradient} in torch.float32 is off"):
        self_check.agrees(torch.device(device))


@pytest.mark.triton
@pytest.mark.parametrize("interpreter", ["0", "1"])
def test_importing_the_package_and_asking_does_not_import_triton(interpreter: str) -> None:
    code = """
import sys, torch
import spatial_grouping_attention as sga
neighbourhood = sga.Neighbourhood((4,), (2,), 2, 3, 1, 3)
print(sga.functional.select(torch.randn(1, 1, 2, 4), neighbourhood))
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
"""
    environment = {**os.environ, "TRITON_INTERPRET": interpreter}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    ).stdout
    assert ("triton needs tensors on cuda" in answer) == (interpreter == "0")
