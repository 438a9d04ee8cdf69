"""Targets: the layers that group, and self-attention in a window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from drawing import (
    Arg,
    Draw,
    Swap,
    Verdict,
    choice,
    flag,
    origin,
    probability,
    real,
    shaped,
    spaced,
    whole,
    wholes,
    with_none,
)
from law import Call, require_form
from of_rose import plain_keywords, rotary_keywords
from RoSE import Grid
from spatial_grouping_attention import (
    DeformableSpatialGroupingAttention,
    DenseSpatialGroupingAttention,
    SparseSpatialGroupingAttention,
    WindowedSelfAttention,
)
from tensors import features, mask
from torch import Tensor, nn

LAYERS = {
    "dense": DenseSpatialGroupingAttention,
    "sparse": SparseSpatialGroupingAttention,
    "deformable": DeformableSpatialGroupingAttention,
}


def _rotary(d: Draw, spatial_dims: int) -> dict[str, Arg]:
    return {name: arg for name, arg in rotary_keywords(d, spatial_dims).items() if name != "dtype"}


def make_layer(variant: str) -> Any:
    """The target that constructs a variant."""

    def construct(d: Draw) -> Call:
        heads, ndim = d.integer(1, 2), d.integer(1, 3)
        width = heads * 2 * d.integer(1, 3)
        args: dict[str, Arg] = {
            "feature_dims": whole(width, 1),
            "spatial_dims": whole(ndim, 1, most=3),
            "kernel_size": wholes(d.pick(1, 2, 3), ndim, 1),
            "num_heads": whole(heads, 1),
        }
        more = {
            "stride": with_none(wholes(d.pick(1, 2), ndim, 1, huge=Verdict.EITHER), Verdict.SERVE),
            "padding": with_none(wholes(1, ndim, 0, huge=Verdict.EITHER), Verdict.SERVE),
            "iters": whole(d.integer(0, 2), 0, huge=Verdict.EITHER),
            "mlp_ratio": real(1.5, above=0.0, wide=False),
            "out_dims": with_none(whole(heads * d.integer(1, 3), 1), Verdict.SERVE),
            "mlp_dropout": probability(0.1),
            "mlp_bias": flag(d.often()),
            "qkv_bias": flag(d.often()),
            "spacing": with_none(spaced(d, ndim, tensors=False), Verdict.SERVE),
            "relative_bias": flag(variant != "dense" and d.often()),
            "backend": choice("auto"),
            "drop_path": probability(0.1),
            "checkpoint": flag(d.often()),
            "temperature": choice(d.pick("fixed", "learned")),
            "norm_tokens": flag(d.often()),
            "compactness": with_none(real(2.0, above=0.0), Verdict.SERVE),
            "mlp_activation": Arg(
                nn.ReLU, lambda _: [Swap("a word", "relu", Verdict.REFUSE), Swap("a module", nn.ReLU(), Verdict.EITHER)]
            ),
        }
        if variant == "sparse":
            more["neighborhood_kernel"] = wholes(d.pick(1, 3), ndim, 1, odd=True)
            more["neighborhood_dilation"] = wholes(d.pick(1, 2), ndim, 1, huge=Verdict.EITHER)
        if variant == "deformable":
            more["num_points"] = with_none(whole(d.integer(1, 5), 1), Verdict.SERVE)
        args |= {name: arg for name, arg in more.items() if d.often(40)}
        args |= _without_clash(_rotary(d, ndim), args)
        return Call(LAYERS[variant], args, _has_parameters)

    return construct


def _without_clash(rotary: dict[str, Arg], args: dict[str, Arg]) -> dict[str, Arg]:
    """Rotary keywords that serve whatever the other arguments are."""
    return {name: arg for name, arg in rotary.items() if name not in args}


def _has_parameters(module: nn.Module, args: Mapping[str, Any]) -> list[Tensor]:
    return list(module.state_dict().values())


def small_layer(d: Draw, variant: str, ndim: int) -> Any:
    """A layer to be called."""
    heads = d.integer(1, 2)
    options: dict[str, Any] = {
        "kernel_size": d.pick(1, 2, 3),
        "padding": 1,
        "iters": d.integer(0, 2),
        "mlp_ratio": 1.0,
        "temperature": d.pick("fixed", "learned"),
        "norm_tokens": d.often(30),
        "compactness": d.pick(None, 1.0),
        "checkpoint": d.often(20),
        "relative_bias": variant != "dense" and d.often(30),
    }
    if variant == "deformable":
        options["num_points"] = d.pick(None, 2)
    torch.manual_seed(d.integer(0, 99))
    rotary = {**plain_keywords(d, ndim), "dtype": torch.float32}
    return LAYERS[variant](heads * 2 * d.integer(1, 3), ndim, num_heads=heads, **options, **rotary)


def call_layer(variant: str) -> Any:
    """The target that calls a variant."""

    def call(d: Draw) -> Call:
        ndim = d.integer(1, 3)
        shape = d.shape(ndim, 5)
        layer, batch, tokens = small_layer(d, variant, ndim), d.integer(1, 3), math.prod(shape)
        args = {"x": features(d.tensor(batch, tokens, layer.feature_dims), "xxx")}
        masked, valid = d.often(25), d.often(35)
        if d.often():
            args |= {
                "input_spacing": with_none(spaced(d, ndim, batch), Verdict.SERVE),
                "input_grid_shape": shaped(shape),
            }
            if d.often(30):
                args["input_origin"] = origin(d, ndim, batch)
        else:
            args["input_grid"] = _grid(d, shape)
        if masked:
            args["mask"] = with_none(mask(d.booleans(batch, *shape), "x" * (ndim + 1)), Verdict.SERVE)
            if ndim == 1:
                args["mask"] = with_none(mask(args["mask"].value, "xx"), Verdict.SERVE)
        if valid:
            rows = (tokens,) if d.often() else shape
            args["valid"] = with_none(_either_form(d.booleans(batch, *rows)), Verdict.SERVE)
        if not (masked or valid):
            args["x"] = features(args["x"].value, ".xx" if "input_grid" in args else "xxx")
            args["x"] = _free(args["x"], "axis 0")

        def check(out: Any, args: Mapping[str, Any]) -> Any:
            # Two swaps may fit one another: a row more and a grid of as many.
            (batch, tokens, _), groups = args["x"].shape, math.prod(out.out_grid_shape)
            x = require_form("x_out", out.x_out, (batch, groups, layer.out_dims), args["x"].dtype)
            up = out.assignment.upsample(torch.ones(batch, groups, 1))
            require_form("upsampled", up, (batch, tokens, 1))
            require_form(
                "positions", out.grid.coordinates(), (*(() if out.grid.batch is None else (batch,)), groups, ndim)
            )
            if out.valid is not None:
                require_form("valid", out.valid, (batch, groups), torch.bool)
            return x, up

        names = ("kernel_size", "spacing", "positions")
        return Call(layer, args, check, names=names, module=layer)

    return call


def _grid(d: Draw, shape: tuple[int, ...]) -> Arg:
    grid = Grid(shape, spaced(d, len(shape)).value, origin(d, len(shape)).value)
    wrong = {"a shape": shape, "a word": "grid", "another grid": Grid((*shape[:-1], shape[-1] + 1)), "a number": 1.0}
    return Arg(grid, lambda _: [Swap(what, w, Verdict.REFUSE) for what, w in wrong.items()])


def _either_form(value: Tensor) -> Arg:
    """On the grid or on the row of tokens."""
    arg = mask(value, "x" * value.dim())
    return _free(arg, "one dimension")  # where sizes are 1, one form is as good as another


def _free(arg: Arg, what: str) -> Arg:
    """Swaps that may as well be served."""
    return Arg(
        arg.value,
        lambda v: [s._replace(verdict=Verdict.EITHER) if s.what.startswith(what) else s for s in arg.others(v)],
    )


def window(d: Draw) -> Call:
    """``WindowedSelfAttention``."""
    heads, ndim = d.integer(1, 3), d.integer(1, 3)
    args: dict[str, Arg] = {
        "dim": whole(heads * 2 * d.integer(1, 3), 1),
        "num_heads": whole(heads, 1),
        "spatial_dims": whole(ndim, 1),
    }
    more = {
        "window": wholes(d.pick(1, 3), ndim, 1, odd=True),
        "dilation": wholes(d.pick(1, 2), ndim, 1, huge=Verdict.EITHER),
        "qkv_bias": flag(d.often()),
        "proj_dropout": probability(0.1),
        "spacing": spaced(d, ndim, tensors=False),
        "relative_bias": flag(d.often()),
        "temperature": choice(d.pick("fixed", "learned")),
        "compactness": with_none(real(2.0, above=0.0), Verdict.SERVE),
        "backend": choice("auto"),
    }
    args |= {name: arg for name, arg in more.items() if d.often(40)}
    if "window" in args:
        args["window"] = with_none(args["window"])
    return Call(WindowedSelfAttention, {**args, **_without_clash(_rotary(d, ndim), args)}, _has_parameters)


def in_window(d: Draw) -> Call:
    """``WindowedSelfAttention()``."""
    heads, ndim, batch = d.integer(1, 2), d.integer(1, 3), d.integer(1, 3)
    shape = d.shape(ndim)
    rotary = {**plain_keywords(d, ndim), "dtype": torch.float32}
    width = heads * 2 * d.integer(1, 3)
    options = {
        "window": d.pick(None, 1, 3),
        "compactness": d.pick(None, 1.0),
        "temperature": d.pick("fixed", "learned"),
    }
    layer = WindowedSelfAttention(width, heads, ndim, **options, **rotary)
    tokens = math.prod(shape)
    args = {"x": features(d.tensor(batch, tokens, width), "xxx")}
    if d.often():
        args |= {"spacing": with_none(spaced(d, ndim, batch), Verdict.SERVE), "grid_shape": shaped(shape)}
    else:
        args["grid"] = _grid(d, shape)
    if d.often(35):
        rows = (tokens,) if d.often() else shape
        args["valid"] = with_none(_either_form(d.booleans(batch, *rows)), Verdict.SERVE)
    else:
        args["x"] = _free(args["x"], "axis 0")

    def check(result: Tensor, args: Mapping[str, Any]) -> Tensor:
        return require_form("result", result, tuple(args["x"].shape), args["x"].dtype)

    return Call(layer, args, check, names=("positions",), module=layer)


TARGETS = {
    **{f"{LAYERS[variant].__name__}": make_layer(variant) for variant in LAYERS},
    **{f"{LAYERS[variant].__name__}()": call_layer(variant) for variant in LAYERS},
    "WindowedSelfAttention": window,
    "WindowedSelfAttention()": in_window,
}
