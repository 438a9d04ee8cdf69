"""What torch says of itself while its compiler traces, which differs by version."""

from collections.abc import Callable, Iterator

import pytest
import torch
from RoSE import RoSEMultiHeadAttention, tracing
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls what it has deprecated

QUESTIONS = (tracing.is_exporting, tracing.is_forward_mode, tracing.is_transformed)


@pytest.fixture(autouse=True)
def nothing_compiled_before_or_after() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Answers(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor([question() for question in QUESTIONS])


def derivative(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What a function returns while its derivative is taken."""
    return lambda x: torch.func.jvp(function, (x,), (x,))[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_answers_are_those_of_the_moment(compiled: bool) -> None:
    for ask, answers in (
        (Answers(), [0, 0, 0]),
        (lambda x: torch.vmap(Answers())(x[None])[0], [0, 0, 1]),
        (derivative(Answers()), [0, 1, 1]),
    ):
        call = torch.compile(ask, fullgraph=True, backend="eager") if compiled else ask
        assert call(torch.zeros(3)).tolist() == answers


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_says_so(strict: bool) -> None:
    program = torch.export.export(Answers(), (torch.zeros(3),), strict=strict)
    assert program.module()(torch.zeros(3)).tolist() == [1, 0, 0]


def test_an_older_exporter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert tracing.is_exporting()


# Of torch 2.11, that is in tests-lowest: later compilers know when they are asked.
@torch.no_grad()
def test_a_compiled_module_refuses_the_mask_that_it_refuses_otherwise() -> None:
    module, x = RoSEMultiHeadAttention(8, 2, 2), torch.ones(4, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool)
    for call in (module, torch.compile(module, backend="eager")):
        with pytest.raises(ValueError, match="attn_mask must have 4 dimensions"):
            call(x, 1.0, (2, 2), attn_mask=mask)
