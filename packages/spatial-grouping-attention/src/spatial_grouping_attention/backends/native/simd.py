"""Vectors of numbers as a type of numba's: registers that a loop keeps, loads and stores of a whole vector at once.

A compiler that must find the vectors in scalar loops finds them where sums may be reordered and sizes are known, which
is neither true here. So kernels say them: a :class:`Vector` holds 64 bytes, 16 float32 or 8 float64, which LLVM cuts to
whatever registers a processor has. Memory is a :class:`Pointer`, which Python gives as an address, and the index of an
element: kernels own no memory, and an address costs a call less than an array does. Nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.core.datamodel import models
from numba.extending import NativeValue, intrinsic, register_model, unbox

BYTES = 64
"""Of a vector: the widest registers of today's processors."""


class Vector(types.Type):  # type: ignore[misc]
    """``lanes`` numbers of a floating type."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.lanes = BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Vector({dtype}, {self.lanes})")


class Pointer(types.Type):  # type: ignore[misc]
    """The address of numbers of one type."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Pointer({dtype})")


@register_model(Pointer)
class _PointerModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Pointer) -> None:
        super().__init__(manager, kind, _element_type(kind.dtype).as_pointer())


@unbox(Pointer)
def _unbox_pointer(kind: Pointer, value: Any, c: Any) -> Any:
    address = c.pyapi.long_as_voidptr(value)
    return NativeValue(c.builder.bitcast(address, c.context.get_value_type(kind)), c.pyapi.c_api_error())


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, _vector_type(kind))


def _element_type(dtype: Any) -> Any:
    if isinstance(dtype, types.Integer):
        return ir.IntType(dtype.bitwidth)
    return ir.FloatType() if dtype.bitwidth == 32 else ir.DoubleType()


def _vector_type(kind: Vector) -> Any:
    return ir.VectorType(_element_type(kind.dtype), kind.lanes)


def splatted(builder: Any, value: Any, lanes: int) -> Any:
    """A vector of one number."""
    kind = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.IntType(32)(0))
    nowhere = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), nowhere)


def _place(builder: Any, pointer: Any, index: Any, kind: Vector) -> Any:
    return builder.bitcast(builder.gep(pointer, [index]), _vector_type(kind).as_pointer())


@intrinsic
def given(typing: Any, pointer: Any) -> Any:
    """Whether there is anything."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.icmp_unsigned("!=", builder.ptrtoint(arguments[0], ir.IntType(64)), ir.IntType(64)(0))

    return types.boolean(pointer), build


@intrinsic
def lanes(typing: Any, pointer: Any) -> Any:
    """How many numbers make a vector."""
    count = Vector(pointer.dtype).lanes

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.IntType(64)(count)

    return types.int64(pointer), build


@intrinsic
def load(typing: Any, pointer: Any, index: Any) -> Any:
    """The vector that starts at an element."""
    kind = Vector(pointer.dtype)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, index = arguments
        return builder.load(_place(builder, pointer, index, kind), align=kind.dtype.bitwidth // 8)

    return kind(pointer, types.int64), build


@intrinsic
def store(typing: Any, pointer: Any, index: Any, vector: Any) -> Any:
    """Write a vector to the elements from an index on."""
    if vector != Vector(pointer.dtype):
        raise TypeError(f"cannot store {vector} at {pointer}")

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, index, value = arguments
        builder.store(value, _place(builder, pointer, index, vector), align=vector.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, vector), build


@intrinsic
def get(typing: Any, pointer: Any, index: Any) -> Any:
    """One element."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.gep(*_listed(arguments)))

    return pointer.dtype(pointer, types.int64), build


@intrinsic
def put(typing: Any, pointer: Any, index: Any, value: Any) -> Any:
    """Write one element, cast to its type."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = context.cast(builder, arguments[2], value, pointer.dtype)
        builder.store(element, builder.gep(*_listed(arguments[:2])))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, value), build


def _listed(arguments: Any) -> tuple[Any, list[Any]]:
    pointer, index = arguments
    return pointer, [index]


@intrinsic
def prefetch(typing: Any, pointer: Any, index: Any) -> Any:
    """Ask for the memory around an element."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, whole = ir.IntType(8).as_pointer(), ir.IntType(32)
        place = builder.bitcast(builder.gep(*_listed(arguments)), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, whole, whole, whole])
        function = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, whole(0), whole(3), whole(1)])  # to read, to be kept, data
        return context.get_dummy_value()

    return types.void(pointer, types.int64), build


@intrinsic
def number(typing: Any, pointer: Any, value: Any) -> Any:
    """A value in the type of what is pointed to: sums that start from a literal would be float64."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[1], value, pointer.dtype)

    return pointer.dtype(pointer, value), build


@intrinsic
def splat(typing: Any, number: Any) -> Any:
    """A vector of one number."""
    kind = Vector(number)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return splatted(builder, arguments[0], kind.lanes)

    return kind(number), build


def _binary(name: str, description: str, operation: Callable[[Any, Any, Any], Any]) -> Any:
    """An operation on two vectors, lane by lane."""

    def typed(typing: Any, a: Any, b: Any) -> Any:
        if not isinstance(a, Vector) or a != b:
            raise TypeError(f"{name} takes two vectors of a kind; got {a} and {b}")

        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return operation(builder, *arguments)

        return a(a, b), build

    typed.__name__, typed.__doc__ = name, description
    return intrinsic(typed)


def largest_of(builder: Any, a: Any, b: Any) -> Any:
    """The larger one, lane by lane: one instruction, and the second where either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


add = _binary("add", "a + b.", lambda builder, a, b: builder.fadd(a, b))
sub = _binary("sub", "a - b.", lambda builder, a, b: builder.fsub(a, b))
mul = _binary("mul", "a * b.", lambda builder, a, b: builder.fmul(a, b))
largest = _binary("largest", "The larger one; the second where either is NaN.", largest_of)


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, in one rounding where the processor can."""
    suffix = "f32" if isinstance(a.type.element, ir.FloatType) else "f64"
    name = f"llvm.fmuladd.v{a.type.count}{suffix}"
    function = get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of vectors; ``a`` may be one number for all lanes."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, *others = arguments
        factor = first if isinstance(a, Vector) else splatted(builder, first, b.lanes)
        return fused(builder, factor, *others)

    return b(a if isinstance(a, Vector) else b.dtype, b, c), build


def _reduction(name: str, description: str, operation: Callable[[Any, Any, Any], Any]) -> Any:
    """All lanes into one number: halves are combined until one lane is left, in the same order everywhere."""

    def typed(typing: Any, vector: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            (value,) = arguments
            count = vector.lanes
            while count > 1:
                count //= 2
                halves = []
                for half in range(2):
                    order = ir.Constant(
                        ir.VectorType(ir.IntType(32), count), list(range(half * count, (half + 1) * count))
                    )
                    halves.append(builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), order))
                value = operation(builder, *halves)
            return builder.extract_element(value, ir.IntType(32)(0))

        return vector.dtype(vector), build

    typed.__name__, typed.__doc__ = name, description
    return intrinsic(typed)


total = _reduction("total", "The sum of all lanes.", lambda builder, a, b: builder.fadd(a, b))
highest = _reduction("highest", "The largest lane; NaN lanes may be passed over.", largest_of)
