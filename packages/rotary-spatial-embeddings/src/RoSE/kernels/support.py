"""What the kernels can serve."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_CHANNELS = 512
MOST_DIMENSIONS = 4

# Compute capability of the oldest GPUs that work in bfloat16.
OLDEST_GPU = (8, 0)

# Triton decides this when a kernel is defined, so it must not change once kernels have been imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def refusals(device: torch.device, dtype: torch.dtype, channels: int) -> list[str]:
    """Reasons why the kernels cannot turn features; empty where they can.

    They are asked for a device and a dtype; whether a kernel that can be launched also computes the right thing is
    for :class:`RoSE.kernels.selfcheck.SelfCheck` to say.

    Args:
        device: of all operands.
        dtype: of the features.
        channels: of a head.
    """
    reasons = list(_refusals_of_device(device, dtype))
    if channels > MOST_CHANNELS:
        reasons.append(f"the kernels take heads of up to {MOST_CHANNELS} channels; got {channels}")
    return reasons


def _refusals_of_device(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    reasons = []
    if not _is_installed():
        reasons.append("triton is not installed")
    if device.type not in (("cpu", "cuda") if _INTERPRETED else ("cuda",)):
        reasons.append(
            f"the kernels need tensors on cuda (or TRITON_INTERPRET=1 for tests on a cpu); got {device.type}"
        )
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        oldest = ".".join(map(str, OLDEST_GPU))
        reasons.append(f"the kernels need a GPU of compute capability {oldest} or newer")
    if dtype not in DTYPES:
        reasons.append(f"the kernels take float32, bfloat16 and float16; got {dtype}")
    return tuple(reasons)


# Found while torch's compiler traces, and a constant to it.
_refusals_of_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
