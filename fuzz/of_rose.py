"""Targets: what RoSE offers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import RoSE
import torch
from drawing import (
    Arg,
    Draw,
    Verdict,
    choice,
    fixed,
    flag,
    origin,
    probability,
    real,
    shaped,
    spaced,
    whole,
    with_none,
)
from law import Call, require_form
from RoSE import Grid, functional
from RoSE.blocks import MLP, DropPath
from tensors import features, positions
from torch import Tensor, nn


def rotary_keywords(d: Draw, spatial_dims: int) -> dict[str, Arg]:
    """Some of the keywords of a rotary embedding."""
    every: dict[str, Arg] = {
        "learnable": flag(d.often()),
        "base_theta": real(d.pick(2.0, 100.0, 1e4), above=1.0),
        "rotary_ratio": real(d.pick(0.0, 0.3, 1.0), least=0.0, most=1.0),
        "init_jitter_std": real(0.02, least=0.0),
        "frequency_scaling": choice(d.pick("none", "linear", "sqrt", "adaptive")),
        "directions": choice(d.pick("mixed", "uniform")),
        "reference_spacing": spaced(d, spatial_dims, tensors=False),
        "rotary_partition": choice(d.pick("channels", "heads")),
        "interleaved": flag(d.often()),
        "spacing_transform": choice(d.pick("identity", "power", "log"), none=True),
        "dtype": fixed(d.pick(None, torch.float32)),
    }
    if d.often(30):
        every["wavelengths"] = with_none(Arg((1.0, 50.0), lambda _: []))
        del every["reference_spacing"]
    return {name: arg for name, arg in every.items() if d.often(30)}


def plain_keywords(d: Draw, spatial_dims: int) -> dict[str, Any]:
    """The same, for a module that is only the stage of a call."""
    return {name: arg.value for name, arg in rotary_keywords(d, spatial_dims).items()}


def sizes(d: Draw) -> dict[str, Arg]:
    """Channels, heads and axes."""
    heads = d.integer(1, 3)
    return {
        "dim": whole(heads * 2 * d.integer(1, 4), 1),
        "num_heads": whole(heads, 1),
        "spatial_dims": whole(d.integer(1, 3), 1),
    }


def _made(kind: type[nn.Module]) -> Any:
    def check(module: Any, args: Mapping[str, Any]) -> Any:
        assert isinstance(module, kind)
        return list(module.state_dict().values())

    return check


def embedding(d: Draw) -> Call:
    """``RoSE.RotarySpatialEmbedding``."""
    args = sizes(d)
    args |= rotary_keywords(d, args["spatial_dims"].value)
    return Call(RoSE.RotarySpatialEmbedding, args, _made(nn.Module))


def cross_attention(d: Draw) -> Call:
    """``RoSE.RoSEMultiHeadCrossAttention``."""
    args = sizes(d)
    args |= {"scale": real(0.5, above=0.0), "max_score_bytes": whole(2**30, 1, huge=Verdict.SERVE)}
    args |= rotary_keywords(d, args["spatial_dims"].value)
    return Call(RoSE.RoSEMultiHeadCrossAttention, args, _made(nn.Module))


def attention(d: Draw) -> Call:
    """``RoSE.RoSEMultiHeadAttention``."""
    args = sizes(d)
    args |= {
        "context_dim": with_none(whole(d.integer(1, 6), 1), Verdict.SERVE),
        "qkv_bias": flag(d.often()),
        "attn_dropout": probability(0.1),
        "proj_dropout": probability(0.1),
    }
    args |= rotary_keywords(d, args["spatial_dims"].value)
    return Call(RoSE.RoSEMultiHeadAttention, args, _made(nn.Module))


def block(d: Draw) -> Call:
    """``RoSE.MultiResolutionBlock``."""
    args = sizes(d)
    args |= {
        "mlp_ratio": real(2.0, above=0.0, wide=False),
        "mlp_bias": flag(d.often()),
        "mlp_dropout": probability(0.1),
        "qkv_bias": flag(d.often()),
        "attn_dropout": probability(0.1),
        "proj_dropout": probability(0.1),
        "drop_path": probability(0.1),
        "norm_eps": real(1e-6, least=0.0),
    }
    args |= rotary_keywords(d, args["spatial_dims"].value)
    return Call(RoSE.MultiResolutionBlock, args, _made(nn.Module))


def mlp(d: Draw) -> Call:
    """``RoSE.blocks.MLP``."""
    args = {"dim": whole(4, 1), "dropout": probability(0.1), "bias": flag(True)}
    return Call(MLP, args, _made(nn.Module))


def drop_path(d: Draw) -> Call:
    """``RoSE.blocks.DropPath``."""
    return Call(DropPath, {"rate": probability(0.1)}, _made(nn.Module))


def grid(d: Draw) -> Call:
    """``RoSE.Grid``."""
    ndim, batch = d.integer(1, 3), d.integer(1, 3)
    shape = d.shape(ndim)
    args = {
        "shape": Arg(shape, lambda v: [s for s in shaped(v).others(v) if s.what not in FREE_OF_TOKENS]),
        "spacing": spaced(d, ndim, batch),
        "origin": origin(d, ndim, batch),
    }
    for name in ("spacing", "origin"):  # either may be the only one that has a batch
        args[name] = _of_any_batch(args[name])

    def check(grid: Grid, args: Mapping[str, Any]) -> Tensor:
        assert grid.size == math.prod(shape)
        assert grid.ndim == ndim
        assert repr(grid.to("cpu")) == repr(grid)
        assert grid == grid.to("cpu")
        batches = () if grid.batch is None else (grid.batch,)
        return require_form("coordinates", grid.coordinates(), (*batches, grid.size, ndim), torch.float64)

    return Call(Grid, args, check)


FREE_OF_TOKENS = ("another size", "one axis more", "large", "enormous", "a list")


def _of_any_batch(arg: Arg) -> Arg:
    free = [s._replace(verdict=Verdict.EITHER) if s.what == "of another batch" else s for s in arg.others(arg.value)]
    return Arg(arg.value, lambda _: free)


def where(
    d: Draw, batch: int, prefix: str = "", ndim: int = 2, *, transforms: str | None = None
) -> tuple[dict[str, Arg], int]:
    """What a caller of a module that ``transforms`` spacings says of positions, and how many tokens that is."""
    shape = d.shape(ndim)
    tokens = math.prod(shape)
    way = d.pick("grid", "grid", "coordinates", "Grid", "list")
    if way == "grid":
        said = {f"{prefix}spacing": spaced(d, ndim, batch), f"{prefix}grid_shape": shaped(shape)}
    elif way == "coordinates":
        rows = (batch,) if batch and d.often() else ()
        points = 5 * d.tensor(*rows, tokens, ndim, dtype=d.pick(torch.float32, torch.float64))
        said = {f"{prefix}coordinates": placed(points)}
        if transforms:
            said[f"{prefix}spacing"] = spaced(d, ndim, batch)
    elif way == "Grid":
        said = {f"{prefix}coordinates": fixed(Grid(shape, spaced(d, ndim, batch).value, origin(d, ndim).value))}
    else:
        said = {f"{prefix}coordinates": fixed([Grid(shape, 2.0), d.tensor(3, ndim)])}
        tokens += 3
        if transforms:
            said[f"{prefix}spacing"] = fixed([None, d.real(0.5, 2.0)])
    return said, tokens


def placed(points: Tensor) -> Arg:
    """Positions, per sample or for all: of two dimensions more is a batch of one."""
    tied = "x" * points.dim()

    def others(value: Tensor) -> Any:
        swaps = positions(value, tied).others(value)
        return [s._replace(verdict=Verdict.EITHER) if s.what == "one dimension more" else s for s in swaps]

    return Arg(points, others)


def angles(d: Draw) -> Call:
    """``RoSE.functional.phases``."""
    heads, planes, ndim = d.integer(1, 3), d.integer(1, 4), d.integer(1, 3)
    args = {
        "coordinates": positions(5 * d.tensor(*d.shape(d.integer(0, 2)), d.integer(1, 5), ndim), ""),
        "freqs": positions(d.tensor(heads, planes, ndim), "..x"),
    }
    args["coordinates"] = _points_of_any_rank(args["coordinates"])

    def check(result: Tensor, args: Mapping[str, Any]) -> Tensor:
        shape = (*args["coordinates"].shape[:-1], *args["freqs"].shape[:2])
        return require_form("angles", result, shape, torch.float64)

    return Call(functional.phases, args, check)


def _points_of_any_rank(arg: Arg) -> Arg:
    def others(value: Tensor) -> Any:
        swaps = arg.others(value)
        return [s._replace(verdict=Verdict.SERVE) if s.what == "one dimension more" else s for s in swaps]

    return Arg(arg.value, others)


def cos_sin(d: Draw) -> Call:
    """``RoSE.functional.cos_sin``."""
    angles = positions(100 * d.tensor(*d.shape(3)), "")
    free = [
        s._replace(verdict=Verdict.SERVE) if s.what.startswith("one dimension") else s
        for s in angles.others(angles.value)
    ]
    dtype = d.pick(torch.float32, torch.float64)

    def check(result: Any, args: Mapping[str, Any]) -> Any:
        return [require_form("cosines", each, tuple(args["angles"].shape), dtype) for each in result]

    return Call(functional.cos_sin, {"angles": Arg(angles.value, lambda _: free), "dtype": fixed(dtype)}, check)


def turn(d: Draw) -> Call:
    """``RoSE.functional.rotate``."""
    heads, tokens, planes = d.integer(1, 3), d.integer(1, 4), d.integer(1, 3)
    angles = d.tensor(*d.pick((tokens, heads), (1, 1), (heads,), ()), planes)
    args = {
        "x": features(d.tensor(2, tokens, heads, 2 * planes + d.integer(0, 2)), ".xx."),
        "cos": features(angles.cos(), "." * (angles.dim() - 1) + "x"),
        "sin": features(angles.sin(), "x" * angles.dim()),
        "interleaved": flag(d.often()),
    }
    if angles.dim() < 3:  # sizes then meet others
        args["x"] = features(args["x"].value, "....")
    for name in ("cos", "sin", "x"):
        args[name] = that_may_broadcast(args[name])

    def check(result: Tensor, args: Mapping[str, Any]) -> Tensor:
        return require_form("result", result, tuple(args["x"].shape), args["x"].dtype)

    return Call(functional.rotate, args, check)


def that_may_broadcast(arg: Arg) -> Arg:
    """Sizes that are refused only where they meet others."""
    sized = ("axis", "one dimension")

    def others(value: Tensor) -> Any:
        return [s._replace(verdict=Verdict.EITHER) if s.what.startswith(sized) else s for s in arg.others(value)]

    return Arg(arg.value, others)


def augment(d: Draw) -> Call:
    """``RoSE.augment_coordinates``."""
    ndim = d.integer(1, 3)
    args = {
        "coordinates": _points_of_any_rank(positions(d.tensor(2, 4, ndim), "...")),
        "shift": with_none(spaced(d, ndim, tensors=False), Verdict.SERVE),
        "jitter": with_none(real(1.5, least=1.0), Verdict.SERVE),
        "rescale": with_none(real(2.0, least=1.0), Verdict.SERVE),
    }

    def check(result: Tensor, args: Mapping[str, Any]) -> Tensor:
        return require_form("coordinates", result, tuple(args["coordinates"].shape), args["coordinates"].dtype)

    return Call(RoSE.augment_coordinates, args, check)


TARGETS = {
    "RoSE.Grid": grid,
    "RoSE.RotarySpatialEmbedding": embedding,
    "RoSE.RoSEMultiHeadCrossAttention": cross_attention,
    "RoSE.RoSEMultiHeadAttention": attention,
    "RoSE.MultiResolutionBlock": block,
    "RoSE.blocks.MLP": mlp,
    "RoSE.blocks.DropPath": drop_path,
    "RoSE.functional.phases": angles,
    "RoSE.functional.cos_sin": cos_sin,
    "RoSE.functional.rotate": turn,
    "RoSE.augment_coordinates": augment,
}
