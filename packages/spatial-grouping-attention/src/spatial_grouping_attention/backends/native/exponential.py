"""The exponential of a vector.

``exp(x) = 2^n exp(r)`` with n the integer nearest to x / ln 2, so |r| <= ln(2)/2. The series of exp(r) is cut where its
next term is below a tenth of a rounding, ln 2 is subtracted in two parts, and 2^n is multiplied in two halves, so that
results below the smallest normal number are as exact as they can be and those beyond the largest are +inf. exp(-inf) is
0 and NaN stays NaN. The result is within 1.5 units of its last place in float32 and in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from .simd import fused, splatted


@dataclass(frozen=True)
class _Format:
    """What a floating type needs."""

    bits: int
    mantissa: int
    bias: int
    terms: int
    """Of the series, up to r ** terms."""
    ln2: tuple[float, float]
    """In two parts, the first of which has zeros enough at its end for every n to multiply it exactly."""
    lowest: float
    """Below this the result is 0."""
    most: float
    """Above this it is infinite."""


_FORMATS = {
    32: _Format(32, 23, 127, 7, (0.693359375, -2.12194440054690583e-4), -104.0, 89.0),
    64: _Format(64, 52, 1023, 13, (6.93147180369123816490e-01, 1.90821492927058770002e-10), -746.0, 710.0),
}


@intrinsic
def exp(typing: Any, vector: Any) -> Any:
    """``e ** x`` of every lane."""
    form = _FORMATS[vector.dtype.bitwidth]

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (x,) = arguments
        return _exp(builder, x, vector.lanes, form)

    return vector(vector), build


def _exp(builder: Any, x: Any, lanes: int, form: _Format) -> Any:
    integers = ir.VectorType(ir.IntType(form.bits), lanes)

    def constant(value: float) -> Any:
        return splatted(builder, ir.Constant(x.type.element, value), lanes)

    def whole(value: int) -> Any:
        return ir.Constant(integers, [value] * lanes)

    # Comparisons with NaN are false, so NaN stays.
    x = builder.select(builder.fcmp_ordered("<", x, constant(form.lowest)), constant(form.lowest), x)
    x = builder.select(builder.fcmp_ordered(">", x, constant(form.most)), constant(form.most), x)
    # Added to a number whose last place is 1, x / ln 2 is rounded to an integer, which then stands in the last bits.
    magic = constant(1.5 * 2.0**form.mantissa)
    shifted = fused(builder, x, constant(1 / math.log(2)), magic)
    n = builder.fsub(shifted, magic)
    exponent = builder.sub(builder.bitcast(shifted, integers), builder.bitcast(magic, integers))
    r = x
    for part in form.ln2:
        r = fused(builder, n, constant(-part), r)
    series = constant(1 / math.factorial(form.terms))
    for k in reversed(range(form.terms)):
        series = fused(builder, series, r, constant(1 / math.factorial(k)))
    half = builder.ashr(exponent, whole(1))
    for power in (half, builder.sub(exponent, half)):
        biased = builder.shl(builder.add(power, whole(form.bias)), whole(form.mantissa))
        series = builder.fmul(series, builder.bitcast(biased, x.type))
    return series
