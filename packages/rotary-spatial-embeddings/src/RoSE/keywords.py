"""The keywords of :class:`RoSE.RotarySpatialEmbedding`, for constructors that pass them on.

A layer that owns an embedding takes its keywords as ``**rotary: Unpack[RotaryKeywords]``, which type checkers
understand, and is decorated with :func:`spell_out_rotary_keywords`, which shows them to people (``help``, editors)
and refuses what the embedding does not know in the layer's own name. Names, defaults and annotations are read from
the embedding's signature.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict, TypeVar

from torch import nn

from .embedding import RotarySpatialEmbedding

Module = TypeVar("Module", bound=nn.Module)


class RotaryKeywords(TypedDict, total=False):
    """Keyword arguments of :class:`RoSE.RotarySpatialEmbedding`, documented there."""

    learnable: bool
    base_theta: float
    rotary_ratio: float
    init_jitter_std: float
    frequency_scaling: str
    directions: str
    reference_spacing: float | Iterable[float]
    wavelengths: tuple[float, float] | None
    rotary_partition: str
    interleaved: bool
    spacing_transform: str | None


def spell_out_rotary_keywords(cls: type[Module], *, without: Sequence[str] = ()) -> type[Module]:
    """Class decorator: replace ``**rotary`` in the constructor's signature by the keywords it stands for.

    Args:
        cls: The class.
        without: Keywords that it does not take, because it decides them itself.

    Raises:
        TypeError: (from the constructor) A keyword that neither the class nor the embedding has.
    """
    init = cls.__init__
    signature = inspect.signature(init)
    known = {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    rotary = {name: p for name, p in _rotary_parameters().items() if name not in (*known, *without)}
    # Factory keywords stand last in every constructor.
    last = [known[name] for name in ("device", "dtype") if name in known]
    spelled = [*(p for p in known.values() if p not in last), *rotary.values(), *last]

    @functools.wraps(init)
    def constructor(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known and name not in rotary:
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        init(self, *args, **kwargs)

    types = typing.get_type_hints(RotarySpatialEmbedding.__init__)
    own = {name: note for name, note in init.__annotations__.items() if name in known or name == "return"}
    constructor.__annotations__ = own | {name: types[name] for name in rotary}
    constructor.__signature__ = signature.replace(parameters=spelled)  # type: ignore[attr-defined]
    cls.__init__ = constructor  # type: ignore[method-assign]
    return cls


def _rotary_parameters() -> dict[str, inspect.Parameter]:
    """The embedding's keyword-only parameters, without torch's factory keywords, which every module has."""
    parameters = inspect.signature(RotarySpatialEmbedding).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and name not in ("device", "dtype")}
