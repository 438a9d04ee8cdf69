"""The operators under test, called with the arguments of a case of grouping_cases."""

from __future__ import annotations

import math

import torch
from grouping_cases import Case
from spatial_grouping_attention import backends, functional
from spatial_grouping_attention.backends import Operands

OPERATORS = ("assign", "pool", "group")


def operands(case: Case, values: torch.Tensor) -> Operands:
    """A case as the bundle that engines take."""
    scale = 1.0 / math.sqrt(case.q.shape[-1]) if case.scale is None else case.scale
    rest = case.bias, case.valid, case.valid_groups, case.pair_bias, case.compactness
    return Operands(case.q, case.k, values, case.neighbourhood, scale, *rest)


def assign(case: Case, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return functional.assign(case.q, case.k, case.u, case.neighbourhood, backend=backend, **case.options)


def pool(case: Case, backend: str) -> torch.Tensor:
    return functional.pool(case.q, case.k, case.v, case.lse, case.neighbourhood, backend=backend, **case.options)


def group(case: Case, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, log_mass): grouping_attention, with the masses that assignments need besides."""
    pooled = backends.group(operands(case, case.v), backend)
    return pooled.out, pooled.lse, pooled.log_mass


def call(operator: str, case: Case, backend: str) -> tuple[torch.Tensor, ...]:
    """The results of an operator by its name."""
    if operator == "pool":
        return (pool(case, backend),)
    return {"assign": assign, "group": group}[operator](case, backend)
