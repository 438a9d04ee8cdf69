"""Notice the kind of checkpoint that loses gradients."""

from __future__ import annotations

import sys

import torch
from torch.utils.checkpoint import CheckpointFunction


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
