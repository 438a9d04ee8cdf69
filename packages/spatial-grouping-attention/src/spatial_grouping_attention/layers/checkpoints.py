"""Checkpoints of activations: when something is computed again, and the kind of them that loses gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from RoSE.tracing import is_traced
from torch.utils.checkpoint import CheckpointFunction, checkpoint


def recomputed(wanted: bool, function: Callable[..., Any], *operands: Any) -> Any:
    """Call a function, and once more in a backward pass that comes, if wanted: only the operands are kept for it.

    Not while TorchScript's tracer looks on: of checkpoints, those of torch 2.11 call a function that it cannot keep.
    """
    if wanted and torch.is_grad_enabled() and not is_traced():
        return checkpoint(function, *operands, use_reentrant=False)
    return function(*operands)


def refuse_reentrant_checkpoint() -> None:
    """Refuse to be the function of a reentrant checkpoint; called from a module's ``forward``.

    Such a checkpoint runs its function without a graph, and connects the tensors that it returns to the graph
    afterwards; of anything else that is returned, gradients are silently lost. Only the function itself is noticed:
    what is called within another one may well end in a tensor.

    Raises:
        RuntimeError: torch's own frames alone lie between the caller and such a checkpoint.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        if frame.f_code is CheckpointFunction.forward.__code__:
            raise RuntimeError(
                "checkpoint of a grouping layer must be called with use_reentrant=False, or left to the layer's own "
                "checkpoint=True: a reentrant checkpoint loses all gradients through a GroupingOutput; got "
                "use_reentrant=True"
            )
        frame = frame.f_back  # type: ignore[assignment]
