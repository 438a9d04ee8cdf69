"""Targets: what a rotary embedding does with features and positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import RoSE
import torch
from drawing import Arg, Draw, Verdict, choice, fixed, whole, with_none
from law import Call, require_form
from of_rose import placed, plain_keywords, that_may_broadcast, where
from tensors import features
from torch import Tensor

LAYOUTS = ("bnd", "bnhd", "bhnd")


def _laid_out(d: Draw, layout: str, batch: int, tokens: int, heads: int, size: int) -> Tensor:
    shape = {
        "bnd": (batch, tokens, heads * size),
        "bnhd": (batch, tokens, heads, size),
        "bhnd": (batch, heads, tokens, size),
    }[layout]
    return d.tensor(*shape)


TIED = {"bnd": "xxx", "bnhd": "xxxx", "bhnd": "xxxx"}


def _any_batch(tied: str, said: Mapping[str, Arg]) -> str:
    """The batch is free where nothing is said per sample."""
    return "." + tied[1:] if said else tied


def rotate(d: Draw) -> Call:
    """``RoSE.RotarySpatialEmbedding()``."""
    heads, size, batch, prefix, ndim = (
        d.integer(1, 3),
        2 * d.integer(1, 4),
        d.integer(1, 3),
        d.integer(0, 2),
        d.integer(1, 3),
    )
    keywords = plain_keywords(d, ndim)
    module = RoSE.RotarySpatialEmbedding(heads * size, heads, ndim, **keywords)
    said, tokens = where(d, batch, ndim=ndim, transforms=keywords.get("spacing_transform"))
    layout = d.pick(*LAYOUTS)
    x = _laid_out(d, layout, batch, tokens + prefix, heads, size)
    args = {"x": features(x, _any_batch(TIED[layout], said)), **said, "layout": choice(layout)}
    if prefix or d.often():
        args["num_prefix_tokens"] = whole(prefix, 0, huge=Verdict.REFUSE)
    names = ("positions",)
    if d.often(30):
        args["k"] = with_none(
            features(_laid_out(d, layout, batch, tokens + prefix, heads, size), _any_batch(TIED[layout], said)),
            Verdict.SERVE,
        )
        names = ("positions", "q", "k")

    def check(result: Any, args: Mapping[str, Any]) -> Any:
        both = (result,) if args.get("k") is None else result
        given = [args["x"]] if args.get("k") is None else [args["x"], args["k"]]
        return [require_form("x", one, tuple(t.shape), t.dtype) for one, t in zip(both, given, strict=True)]

    return Call(module, args, check, names=names, module=module)


def rotate_pair(d: Draw) -> Call:
    """``RoSE.RotarySpatialEmbedding.rotate_pair``."""
    heads, size, batch = d.integer(1, 2), 2 * d.integer(1, 4), d.integer(1, 2)
    keywords = plain_keywords(d, 2)
    module = RoSE.RotarySpatialEmbedding(heads * size, heads, 2, **keywords)
    transforms = keywords.get("spacing_transform")
    said, tokens = where(d, batch, transforms=transforms)
    k_said, k_tokens = where(d, batch, "k_", transforms=transforms) if d.often() else ({}, tokens)
    args = {
        "q": features(d.tensor(batch, tokens, heads * size), ".xx"),
        "k": features(d.tensor(batch, k_tokens, heads * size), ".xx"),
        **said,
        **k_said,
    }

    def check(result: Any, args: Mapping[str, Any]) -> Any:
        return [require_form(n, t, tuple(args[n].shape), args[n].dtype) for n, t in zip("qk", result, strict=True)]

    names = ("positions", "x", "spacing", "grid_shape", "coordinates")
    return Call(module.rotate_pair, args, check, names=names, module=module)


def positioned(d: Draw) -> Call:
    """``RoSE.RotarySpatialEmbedding.positions``."""
    ndim = d.integer(1, 3)
    keywords = plain_keywords(d, ndim)
    module = RoSE.RotarySpatialEmbedding(4, 1, ndim, **keywords)
    said, tokens = where(d, 0, ndim=ndim, transforms=keywords.get("spacing_transform"))

    def check(result: Tensor, args: Mapping[str, Any]) -> Tensor:
        return require_form("positions", result, (*result.shape[:-2], tokens, ndim))

    return Call(module.positions, {"tokens": fixed(tokens), **said}, check, module=module)


def rotate_by_angles(d: Draw) -> Call:
    """``RoSE.RotarySpatialEmbedding.rotate``."""
    heads, size, tokens, layout = d.integer(1, 3), 2 * d.integer(1, 3), d.integer(1, 4), d.pick(*LAYOUTS)
    module = RoSE.RotarySpatialEmbedding(heads * size, heads, 2)
    cos, sin = module.angles(d.tensor(tokens, 2))
    args = {
        "x": that_may_broadcast(features(_laid_out(d, layout, 2, tokens, heads, size), TIED[layout])),
        "cos": that_may_broadcast(features(cos.detach(), "xxx")),
        "sin": that_may_broadcast(features(sin.detach(), "xxx")),
        "layout": choice(layout),
    }

    def check(result: Tensor, args: Mapping[str, Any]) -> Tensor:
        return require_form("x", result, tuple(args["x"].shape), args["x"].dtype)

    return Call(module.rotate, args, check, module=module)


def angles_of(d: Draw) -> Call:
    """``RoSE.RotarySpatialEmbedding.angles``."""
    module, prefix = RoSE.RotarySpatialEmbedding(8, 2, 2), d.integer(0, 2)
    args = {
        "positions": placed(d.tensor(*d.pick((), (2,)), 3, 2)),
        "num_prefix_tokens": whole(prefix, 0),
    }
    args["positions"] = Arg(args["positions"].value, _free_sizes(args["positions"]))

    def check(result: Any, args: Mapping[str, Any]) -> Any:
        *rows, tokens, _ = args["positions"].shape
        shape = (*rows, tokens + int(args["num_prefix_tokens"]), 2, 2)
        return [require_form("cosines", each, shape, torch.float32) for each in result]

    return Call(module.angles, args, check, names=("coordinates",), module=module)


def _free_sizes(arg: Arg) -> Any:
    """Positions of any number of tokens."""
    last = f"axis {arg.value.dim() - 1}"

    def others(value: Tensor) -> Any:
        free = [s.what.startswith("axis") and not s.what.startswith(last) for s in arg.others(value)]
        swaps = zip(arg.others(value), free, strict=True)
        return [s._replace(verdict=Verdict.EITHER) if may else s for s, may in swaps]

    return others


TARGETS = {
    "RoSE.RotarySpatialEmbedding()": rotate,
    "RoSE.RotarySpatialEmbedding.rotate_pair": rotate_pair,
    "RoSE.RotarySpatialEmbedding.positions": positioned,
    "RoSE.RotarySpatialEmbedding.angles": angles_of,
    "RoSE.RotarySpatialEmbedding.rotate": rotate_by_angles,
}
