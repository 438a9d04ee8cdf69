"""Compile the rotation kernels of some calls for a GPU that is not there, and print what came of it as JSON.

Run by test_compiled_kernels.py in a process of its own, because triton decides when it is imported whether kernels are
compiled or interpreted. Calls go through the package's own launch code; only the launch itself is left out.
"""

import json
from typing import Any

import torch
import triton
from RoSE.kernels import launch
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class AbsentGPU:
    """What triton asks a driver for while it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)


COMPILED: dict[str, list[Any]] = {}
RUN = JITFunction.run


def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    compiled = RUN(kernel, *arguments, grid=grid, warmup=True, **options)
    known = COMPILED.setdefault(kernel.__name__, [])
    if not any(compiled is other for other in known):
        known.append(compiled)
    return compiled


def call(batch: int, heads: int, tokens: int, channels: int, prefix: int, *, token_major: bool, by_angle: bool) -> None:
    """Both kernels, with every gradient, on room that nothing is ever written to."""
    planes, axes = channels // 2, 2

    def room(size: int) -> torch.Tensor:
        if token_major:
            return torch.empty(batch, tokens, heads, size, dtype=torch.bfloat16).transpose(1, 2)
        return torch.empty(batch, heads, tokens, size, dtype=torch.bfloat16)

    q, k, q_out, k_out = (room(channels) for _ in range(4))
    freqs, shares = torch.empty(heads, planes, axes), dict.fromkeys(("dcos", "dsin", "dcoordinates", "dfreqs"))
    if by_angle:
        cos, sin, shares["dcos"], shares["dsin"] = (torch.empty(batch, heads, tokens, planes) for _ in range(4))
        angles = launch.given(cos, sin)
    else:
        blocks = -(-tokens // launch.block_of_tokens(channels))
        angles = launch.computed(torch.empty(batch, tokens - prefix, axes, dtype=torch.float64), freqs, prefix)
        shares["dcoordinates"] = torch.empty(batch, heads, tokens - prefix, axes)
        shares["dfreqs"] = torch.empty(batch, blocks, heads, planes, axes)
    launch.rotate(q, k, q_out, k_out, angles, True)
    launch.rotate_backward((q, k), (q, k), (q_out, k_out), shares, angles, True)


def main() -> None:
    triton.runtime.driver.set_active(AbsentGPU())
    JITFunction.run = compile_only
    for channels in (32, 24):
        for token_major in (True, False):
            for by_angle in (True, False):
                for batch, heads, tokens, prefix in (
                    (1, 2, 64, 0),
                    (3, 2, 65, 1),
                    (16, 4, 112, 16),
                    (1, 1, 49, 2),
                    (2, 3, 1, 0),
                ):
                    prefix = min(prefix, tokens - 1)
                    call(batch, heads, tokens, channels, prefix, token_major=token_major, by_angle=by_angle)
        if channels == 32:
            wide = {
                kernel: sum(".v4.b32" in line for one in found for line in one.asm["ptx"].splitlines())
                for kernel, found in COMPILED.items()
            }
    print(json.dumps({"times": {kernel: len(found) for kernel, found in COMPILED.items()}, "wide": wide}))


if __name__ == "__main__":
    main()
