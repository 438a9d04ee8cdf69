"""Bundles of :mod:`.bundles` in memory: a kernel is given the address of its words and loads what it needs.

Passed by value, a bundle of fifty words would be copied at every call that is not inlined. Loads are marked as
invariant, so the compiler may keep what it loaded.
"""

from __future__ import annotations

import typing
from array import array
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate
from numba.extending import NativeValue, infer_getattr, intrinsic, register_model, unbox

from .bundles import Bytes, Floats, Integers, Triple
from .simd import Pointer

_WORD = ir.IntType(64)


class Structure(types.Type):  # type: ignore[misc]
    """A bundle of a class in memory, with numbers in a floating type."""

    def __init__(self, bundle: type, dtype: Any) -> None:
        self.bundle, self.dtype = bundle, dtype
        self.fields: dict[str, tuple[int, Any]] = {}
        """Word at which a field starts, and its type."""
        self.words = 0
        for name, hint in typing.get_type_hints(bundle).items():
            kind = kind_of(hint, dtype)
            self.fields[name] = (self.words, kind)
            self.words += _words(kind)
        super().__init__(name=f"Structure({bundle.__module__}.{bundle.__qualname__}, {dtype})")


def kind_of(hint: Any, dtype: Any) -> Any:
    """Numba's type for what is annotated so."""
    simple = {int: types.int64, bool: types.boolean, Triple: types.UniTuple(types.int64, 3)}
    if hint in simple:
        return simple[hint]
    pointees = {Floats: dtype, Integers: types.int64, Bytes: types.uint8}
    return Pointer(pointees[hint]) if hint in pointees else Structure(hint, dtype)


def _words(kind: Any) -> int:
    if isinstance(kind, Structure):
        return int(kind.words)
    return len(kind) if isinstance(kind, types.UniTuple) else 1


def in_memory(bundle: tuple[Any, ...]) -> array[int]:
    """The words of a bundle, or of several in a tuple; they must live as long as a kernel runs."""
    words: list[int] = []
    _flatten(bundle, words)
    return array("q", words)


def address(words: array[int]) -> int:
    """Where they are."""
    return words.buffer_info()[0]


def _flatten(bundle: tuple[Any, ...], words: list[int]) -> None:
    for part in bundle:
        if isinstance(part, tuple):
            _flatten(part, words)
        else:
            words.append(part)


@register_model(Structure)
class _StructureModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Structure) -> None:
        super().__init__(manager, kind, _WORD.as_pointer())


@unbox(Structure)
def _unbox_structure(kind: Structure, value: Any, c: Any) -> Any:
    pointer = c.pyapi.long_as_voidptr(value)
    return NativeValue(c.builder.bitcast(pointer, _WORD.as_pointer()), c.pyapi.c_api_error())


@infer_getattr
class _StructureAttributes(AttributeTemplate):  # type: ignore[misc]
    key = Structure

    def generic_resolve(self, kind: Structure, name: str) -> Any:
        return kind.fields[name][1] if name in kind.fields else None


@lower_getattr_generic(Structure)
def _load_field(context: Any, builder: Any, kind: Structure, pointer: Any, name: str) -> Any:
    word, field = kind.fields[name]
    if isinstance(field, Structure):
        return builder.gep(pointer, [_WORD(word)])
    words = [_load_word(builder, pointer, word + i) for i in range(_words(field))]
    if isinstance(field, types.UniTuple):
        return context.make_tuple(builder, field, words)
    if isinstance(field, Pointer):
        return builder.inttoptr(words[0], context.get_value_type(field))
    return words[0] if field == types.int64 else builder.icmp_unsigned("!=", words[0], _WORD(0))


@intrinsic
def nth(typing_: Any, bundle: Any, index: Any) -> Any:
    """One of several bundles that follow each other in memory."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = arguments
        return builder.gep(pointer, [builder.mul(number, _WORD(bundle.words))])

    return bundle(bundle, types.int64), build


def _load_word(builder: Any, pointer: Any, word: int) -> Any:
    loaded = builder.load(builder.gep(pointer, [_WORD(word)]))
    loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
    return loaded
