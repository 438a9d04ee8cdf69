"""The law: a call is served as its documentation says, or refused in words that name an argument.

Never anything else: no other exception (out of memory is one), no warning that is not meant, no result of another shape
than documented, no NaN or infinity out of sensible numbers, forward or backward.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from drawing import Arg, Draw, Swap, Verdict
from RoSE import AliasingWarning
from RoSE.frames import FrameWarning
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Torch's own words where features and parameters have different types; modules leave that to it.
OF_TORCH = re.compile(
    r"same dtype|should be the same|same type|mixed dtype|dtypes? .* match|expected (scalar )?dtype|type as"
)
# What Python itself says of arguments.
OF_PYTHON = re.compile(r"unexpected keyword argument|missing \d+ required|positional argument")
RULE = re.compile(r"\b(must|needs?|takes?|cannot)\b.*(; got |:)", re.DOTALL)


class FaultError(AssertionError):
    """The law is broken."""


@dataclass
class Call:
    """A call that fits, and what it returns."""

    function: Callable[..., Any]
    args: dict[str, Arg]
    check: Callable[[Any, Mapping[str, Any]], Any]
    """Raises where a result is not what the documentation says of these arguments; returns what must be finite."""
    names: tuple[str, ...] = ()
    """What messages may name besides the arguments."""
    calm: bool = True
    """Whether sensible numbers must come to finite ones."""
    may_refuse: bool = False
    """Whether what fits may be refused as well."""
    module: nn.Module | None = field(default=None, repr=False)


def judge(call: Call, d: Draw, report: Callable[[str], None]) -> Verdict:
    """Swap some arguments, make the call, and hold it to the law; what it came to."""
    args = {name: arg.value for name, arg in call.args.items()}
    swaps = _swapped(call, d, args)
    verdict = max((s.verdict for s in swaps.values()), default=Verdict.SERVE)
    if len(swaps) > 1 and verdict is Verdict.REFUSE:
        verdict = Verdict.EITHER  # two wrongs may agree with each other
    words = _in_words(call, args, swaps)
    report(words)
    sane = call.calm and all(s.sane for s in swaps.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for meant in (AliasingWarning, FrameWarning):
            warnings.simplefilter("ignore", meant)
        try:
            result = call.function(**args)
        except (TypeError, ValueError) as problem:
            if verdict is Verdict.SERVE and not call.may_refuse:
                raise FaultError(f"refused what fits: {words}") from problem
            if not _is_worded(str(problem), call, args):
                raise FaultError(f"refused without naming a rule and an argument: {words}") from problem
            return Verdict.REFUSE
        except Exception as problem:
            if verdict is not Verdict.SERVE and _is_torchs(problem, args):
                return Verdict.REFUSE
            raise FaultError(f"raised {type(problem).__name__}: {words}") from problem
        if verdict is Verdict.REFUSE:
            raise FaultError(f"took what must be refused, and gave {_seen(result)}: {words}")
        try:
            finite = call.check(result, args)
            if sane:
                _require_finite(finite, args, call.module)
        except Exception as problem:
            raise FaultError(f"served, but {problem}: {words}") from problem
    return Verdict.SERVE


def _swapped(call: Call, d: Draw, args: dict[str, Any]) -> dict[str, Swap]:
    """Put something else in the place of no argument, of one, or of two; ``args`` is changed."""
    swaps: dict[str, Swap] = {}
    open_to = [name for name, arg in call.args.items() if arg.others(arg.value)]
    for _ in range(d.pick(0, 1, 1, 1, 1, 2) if open_to else 0):
        name = d.pick(*open_to)
        swap = d.pick(*call.args[name].others(call.args[name].value))
        swaps[name] = swap
        args[name] = swap.value
    return swaps


def _is_worded(message: str, call: Call, args: Mapping[str, Any]) -> bool:
    """Whether a message gives a rule and names what broke it."""
    if OF_PYTHON.search(message):
        return True
    names = {*args, *call.names, *inspect.signature(call.function).parameters}
    return bool(RULE.search(message)) and any(re.search(rf"\b{re.escape(name)}\b", message) for name in names)


def _is_torchs(problem: Exception, args: Mapping[str, Any]) -> bool:
    """Whether torch says that types differ, and they do."""
    types = {t.dtype for t in pytree.tree_leaves(dict(args)) if isinstance(t, Tensor) and t.is_floating_point()}
    return isinstance(problem, RuntimeError) and types != {torch.float32} and bool(OF_TORCH.search(str(problem)))


def _require_finite(results: Any, args: Mapping[str, Any], module: nn.Module | None) -> None:
    tensors = [t for t in pytree.tree_leaves(results) if isinstance(t, Tensor) and t.is_floating_point()]
    for tensor in tensors:
        if not bool(tensor.isfinite().all()):
            raise FaultError("gives NaN or infinity")
    learned = [t for t in tensors if t.requires_grad]
    if not learned:
        return
    leaves = [t for t in pytree.tree_leaves(dict(args)) if isinstance(t, Tensor) and t.requires_grad and t.is_leaf]
    leaves += list(module.parameters()) if module is not None else []
    if leaves:
        # Of the order of 1, however large results are.
        total = torch.stack([_in_units_of_itself(t).square().sum() for t in learned]).sum()
        for grad in torch.autograd.grad(total, leaves, allow_unused=True):
            if grad is not None and not bool(grad.isfinite().all()):
                raise FaultError("has a gradient of NaN or infinity")


def _in_units_of_itself(tensor: Tensor) -> Tensor:
    wide = tensor.double()
    return wide / wide.detach().abs().amax().clamp(min=1.0) if wide.numel() else wide


def _in_words(call: Call, args: Mapping[str, Any], swaps: Mapping[str, Swap]) -> str:
    function = getattr(call.function, "__qualname__", None) or type(call.function).__name__
    changed = ", ".join(f"{name}: {swap.what}" for name, swap in swaps.items()) or "nothing"
    return f"{function}({', '.join(f'{name}={_seen(value)}' for name, value in args.items())}) with {changed} swapped"


def _seen(value: Any) -> str:
    if isinstance(value, Tensor) and value.is_nested:
        return f"<nested {str(value.dtype).removeprefix('torch.')} {value.layout}>"
    if isinstance(value, Tensor):
        return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_seen, value))})"
    return repr(value) if len(repr(value)) < 200 else f"<{type(value).__name__}>"


def require_form(name: str, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Return a result if it is a tensor of this shape and type."""
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != tuple(shape):
        raise FaultError(f"{name} should have shape {tuple(shape)}, and is {_seen(tensor)}")
    if dtype is not None and tensor.dtype != dtype:
        raise FaultError(f"{name} should be {dtype}, and is {tensor.dtype}")
    return tensor
