"""The Triton engine inside torch: operators, compilers, what is refused, and the check before it is trusted."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from grouping_cases import Case, assert_near, make_case
from layer_cases import mostly_slow
from operator_calls import operands
from RoSE.kernels.selfcheck import SelfCheck
from spatial_grouping_attention import Neighbourhood, functional
from spatial_grouping_attention.backends import Backend, Problem, registered, selection
from spatial_grouping_attention.backends import triton as engine
from torch import Tensor
from torch.library import opcheck
from triton_cases import OPERANDS, call, everywhere, moved


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
    plain = replace(case, bias=None, compactness=None, valid=None, valid_groups=None)
    opcheck(registered._pool, (*arguments(plain, case.v), case.lse), test_utils=checks)
    opcheck(registered._assign, arguments(case, case.u), test_utils=checks)


@pytest.mark.slow
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
    options = {**case.options, "backend": "triton"}
    out, lse = functional.grouping_attention(case.q, case.k, case.v, case.neighbourhood, **options)
    up, _ = functional.assign(case.q, case.k, out, case.neighbourhood, **options)
    return out, up, out.square().sum() + up.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()


# aot_eager traces forward and backward as Inductor does, and needs no compiler.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls what torch has deprecated
@pytest.mark.slow
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
        results.append((out, up, *(leaves[name].grad for name in ("q", "k", "v", "bias", "compactness"))))
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
    assert functional.select(OPERANDS.q, OPERANDS.neighbourhood).backend != Backend.TRITON
    assert functional.select(OPERANDS.q, OPERANDS.neighbourhood, backend="triton").backend == Backend.TRITON


@pytest.mark.slow
@everywhere
def test_the_kernels_pass_their_self_check(device: str) -> None:
    """What decides whether "auto" takes them; a failure would warn."""
    assert SelfCheck("the kernels", selection._check_triton, "'tiled'").passed(torch.device(device))


@everywhere
@pytest.mark.parametrize("gradient", mostly_slow("q", "k", "values", "bias", "compactness"))
def test_the_self_check_notices_a_wrong_gradient(gradient: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spatial_grouping_attention.backends.triton import check as self_check

    backward = engine.assign_backward

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
