"""How the kernels are compiled: once for every floating type, and kept on disk for the next process.

Numba knows a kernel's cached code by the file that the kernel is written in, not by those of the functions that it
calls, and installers give all files of a wheel one date. So what a kernel is compiled from is said in its key: the
digest of all sources of this folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch
from numba.core import types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

from .structures import kind_of

_OPTIONS = {"nogil": True, "error_model": "numpy"}


def _digest() -> bytes:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


_SOURCES = _digest()


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """A file for every kernel and type, which says itself what it holds.

    Numba numbers its files, and says in another which is which. Two processes that compile for two types at once may
    then write to one, and a third that reads between two writes finds what an older version left there: code of
    another type or layout, which it would run.
    """

    def save(self, key: Any, data: Any) -> None:
        self._save_data(self._name(key), (self._source_stamp, key, data))

    def load(self, key: Any) -> Any:
        try:
            stamp, kept, data = self._load_data(self._name(key))
        except FileNotFoundError:
            return None
        return data if (stamp, kept) == (self._source_stamp, key) else None

    def _name(self, key: Any) -> str:
        # Of the sources there is no word here: what an older version left is written over.
        signature, machine, *_ = key
        told = hashlib.sha256(repr((self._version, signature, machine)).encode()).hexdigest()
        return f"{self._index_name.removesuffix('.nbi')}.{told[:16]}.nbc"


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache with the sources in its keys, which is silent where nothing can be written."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp())

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        return (*super()._index_key(signature, codegen), _SOURCES)

    def save_overload(self, signature: Any, data: Any) -> None:
        with contextlib.suppress(OSError):  # a full or forbidden disk: the next process compiles again
            super().save_overload(signature, data)

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(signature, target_context)
        except OSError:
            return None


class _AsWritten(JITCodeLibrary):  # type: ignore[misc]
    """Code that nobody optimises: whatever it is linked into is optimised as a whole."""

    def _optimize_final_module(self) -> None:
        """Leave it.

        Numba would optimise a function, then whatever calls it with the function in it, then the next: of functions
        that call each other four deep the innermost four times, half the time that all kernels take to compile.
        """


class _HelperCompiler(Compiler):  # type: ignore[misc]
    """Compiles what only kernels call."""

    def compile_extra(self, func: Callable[..., Any]) -> Any:
        self.state.library = _AsWritten(self.state.targetctx.codegen(), func.__qualname__)
        return super().compile_extra(func)


def compiled(kernel: Any, dtype: torch.dtype) -> Callable[..., int]:
    """A kernel for operands in float32 or float64, which takes addresses of bundles.

    Numba would look at the type of every argument at every call; here they follow from the annotations.
    """
    entry = _ENTRIES.get((kernel, dtype))
    if entry is None:
        hints = typing.get_type_hints(kernel.py_func)
        del hints["return"]
        signature = tuple(kind_of(hint, _TYPES[dtype]) for hint in hints.values())
        kernel.compile(signature)
        entry = _ENTRIES[kernel, dtype] = kernel.overloads[signature].entry_point
    return entry


_TYPES = {torch.float32: types.float32, torch.float64: types.float64}
_ENTRIES: dict[tuple[Any, torch.dtype], Callable[..., int]] = {}


def kernel(function: Callable[..., Any]) -> Any:
    """Compile what Python calls: without Python's lock, and cached where there is a place for it."""
    compiled: Any = numba.njit(**_OPTIONS)(function)
    with contextlib.suppress(RuntimeError):  # numba found no folder that it may write to
        compiled._cache = _Cache(function)
    return compiled


def helper(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile what kernels call."""
    # Without the means to be called from Python or C, which take longer to compile than most of these.
    alone = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": _HelperCompiler}
    compiled: Callable[..., Any] = numba.njit(**alone, **_OPTIONS)(function)
    return compiled
