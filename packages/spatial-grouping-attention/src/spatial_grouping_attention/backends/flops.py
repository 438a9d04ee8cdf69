"""What the operators cost, told to torch's FLOP counter, which looks into no operator that it does not know.

Counted is what grouping is: two operations for each channel of each product between a token and a group that it sees,
whatever an engine computes besides (logits of pairs that a tile has and no window, a second pass).
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..geometry import Neighbourhood

_COUNTER = "torch.utils.flop_counter"


def announce() -> None:
    """Tell a counter that is counting, if there is one.

    Its module is not imported for that: it brings in triton. And as every counter starts with a copy of what is known,
    those are told that have already started.
    """
    if torch._C._len_torch_dispatch_stack() == 0 or _COUNTER not in sys.modules:
        return
    module = sys.modules[_COUNTER]
    formulas = _formulas()
    if not formulas.keys() <= module.flop_registry.keys():
        for operator, formula in formulas.items():
            module.register_flop_formula(operator)(formula)
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            for operator in formulas:
                counter.flop_registry.setdefault(operator, module.flop_registry[operator])


# Done while torch's compiler traces.
announce._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _formulas() -> dict[Any, Any]:
    operators = torch.ops.spatial_grouping_attention
    return {
        operators.assign: _forward,
        operators.pool: _forward,
        operators.assign_backward: _backward,
        operators.pool_backward: _backward,
    }


def _forward(name: str, q: Any, k: Any, values: Any, *rest: Any, **_: Any) -> int:
    """Logits and averages."""
    return 2 * _pairs(q, k, rest[4]) * int(q[3] + values[3])


def _backward(name: str, q: Any, k: Any, values: Any, *rest: Any, **_: Any) -> int:
    """Logits again, their gradient, and those of queries, keys and values."""
    return 2 * _pairs(q, k, rest[4]) * int(3 * q[3] + 2 * values[3])


def _pairs(q: Any, k: Any, geometry: list[int]) -> int:
    batch, heads, groups, _ = q
    seen = Neighbourhood.from_integers(geometry).num_pairs if geometry else groups * k[2]
    return int(batch * heads * seen)
