"""Sharded over two processes: half-type models train as in one process, and wave vectors keep every bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from sharded_runs import RANKS, SLOW, WAYS, Model, batch, half_if_pure, optimiser, train, train_in_ranks
from torch import Tensor

Came = dict[str, dict[str, dict[str, Tensor]]]
every_way = pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow) if way in SLOW else way for way in WAYS]
)


@pytest.fixture(scope="module")
def came_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Came]:
    """What came of all slow ways, or of all others; they run when they are asked for."""

    @cache
    def run(slow: bool) -> Came:
        folder = tmp_path_factory.mktemp("ranks")
        ways = [way for way in WAYS if (way in SLOW) == slow]
        torch.multiprocessing.spawn(train_in_ranks, (str(folder), ways), nprocs=RANKS)
        return torch.load(folder / "came.pt")

    return run


@pytest.fixture
def came(way: str, came_of: Callable[[bool], Came]) -> Came:
    return came_of(way in SLOW)


def alone(mixed: bool) -> list[dict[str, Tensor]]:
    """States before and after the same two steps in one process, on the batches of all."""
    model = half_if_pure(Model(), mixed)
    optimizer = optimiser(model)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    for step in (0, 1):
        train(model, optimizer, batch(step).to(torch.float32 if mixed else torch.bfloat16))
    return [first, model.state_dict()]


@every_way
def test_training_in_two_processes_is_training_in_one(way: str, came: Came) -> None:
    first, last = alone(mixed=WAYS[way][0])
    assert came[way]["first"].keys() == first.keys()
    deciding = [name for name in first if "rotary" in name]
    assert any("freqs" in name for name in deciding)
    assert any("log_knee" in name for name in deciding)
    for name in first:
        began, ended = came[way]["first"][name], came[way]["last"][name]
        assert torch.equal(began, first[name]), name
        assert began.dtype == ended.dtype == first[name].dtype
        if name in deciding:
            assert ended.dtype == torch.float32
            step, right = ended - began, last[name] - first[name]
            assert right.norm() > 0, name
            # Gradients pass through bfloat16 features; those of one rank alone are off by a quarter and more.
            assert (step - right).norm() < 0.05 * right.norm(), (name, float((step - right).norm() / right.norm()))


@every_way
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(way: str, came: Came) -> None:
    for name, value in came[way]["last"].items():
        assert torch.equal(came[way]["resumed"][name], value), name
    plain = half_if_pure(Model(seed=2), mixed=WAYS[way][0])
    plain.load_state_dict(came[way]["last"])
