"""Whole numbers in a form that triton does not compile kernels for.

Triton compiles a kernel again where a whole number becomes 1, or begins or ceases to be a multiple of 16. For strides
that would mean compiling in the middle of a training on images of many sizes, and ``do_not_specialize`` does not reach
numbers inside of tuples. So they travel doubled, with an odd number added: never 1, never even.
"""

from __future__ import annotations

from typing import TypeVar

import triton
import triton.language as tl

# Large enough that no sealed number is 1, small enough that those of up to 2**29 fit 32 bits.
ODD = tl.constexpr(2**30 + 1)

T = TypeVar("T", int, tuple[int, ...])


def seal(number: T) -> T:
    """A number, or a tuple of numbers, above -2**29, as kernels take them."""
    odd: int = ODD.value
    if isinstance(number, tuple):
        return tuple(2 * n + odd for n in number)
    return 2 * number + odd


@triton.jit
def opened(number):
    """The number that was sealed."""
    return (number - ODD) >> 1


@triton.jit
def opened_stride(number, ALIGNED: tl.constexpr):
    """The same of a stride, which may be known to be a multiple of 16: rows are then loaded in wide pieces."""
    stride = (number - ODD) >> 1
    if ALIGNED:
        stride = tl.multiple_of(stride, 16)
    return stride
