"""Targets: the operators on groups, the geometry beneath them, and memberships as something to use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from drawing import INF, Arg, Draw, Swap, Verdict, choice, fixed, flag, real, refused, shaped, wholes, with_none
from law import Call, require_form
from RoSE import Grid
from spatial_grouping_attention import (
    DeformableSpatialGroupingAttention,
    Neighbourhood,
    compose,
    functional,
    geometry,
)
from spatial_grouping_attention.assignment import Assignment, AttentionAssignment
from tensors import features, mask
from torch import Tensor

BACKENDS = ("auto", "reference", "tiled", "fused")


def relation(d: Draw, shape: tuple[int, ...] | None = None) -> Neighbourhood:
    """Some neighbourhood."""
    shape = d.shape(d.integer(1, 3), 5) if shape is None else shape
    kernel = tuple(d.pick(1, 2, 3) for _ in shape)
    stride = tuple(d.pick(1, 2, 3) for _ in shape)
    padding = tuple(k // 2 + d.pick(0, 0, 1) for k in kernel)
    groups = tuple((n + 2 * p - k) // s + 1 for n, p, k, s in zip(shape, padding, kernel, stride, strict=True))
    return Neighbourhood(shape, groups, stride, kernel, padding, d.pick(1, 3, 5), d.pick(1, 1, 2))


def _related(value: Neighbourhood) -> Arg:
    other = Neighbourhood(
        (*value.input_shape, 3), (*value.output_shape, 3), (*value.stride, 1), (*value.kernel_size, 1),
        (*value.padding, 0), (*value.window, 1), (*value.dilation, 1),
    )  # fmt: skip
    wrong = {"a shape": value.input_shape, "a word": "sparse", "another": other, "integers": value.integers()}
    return Arg(value, lambda _: [refused(what, w) for what, w in wrong.items()])


def _operands(d: Draw, names: str) -> dict[str, Arg]:
    """Arguments of an operator whose tensors are called ``names``: of groups ``q`` and ``u``, of tokens the others."""
    neighbourhood = relation(d) if d.often(70) else None
    tokens, groups = (neighbourhood.num_inputs, neighbourhood.num_groups) if neighbourhood else d.shape(2, 6)
    batch, heads, size = d.integer(1, 3), d.integer(1, 3), d.integer(1, 5)
    rows = {"q": groups, "u": groups, "k": tokens, "v": tokens}
    args = {}
    for name in names:
        if name == "l":
            args["lse"] = features(d.tensor(batch, heads, tokens), "xxx")
        else:
            width, tied = (size, "xxxx") if name in "qk" else (d.integer(1, 4), "xxx.")
            args[name] = features(d.tensor(batch, heads, rows[name], width), tied)
    if neighbourhood:
        args["neighbourhood"] = _related(neighbourhood)
        if d.often(25):
            args["compactness"] = with_none(features(d.tensor(heads).abs(), "x"), Verdict.SERVE)
    if d.often(25):
        args["scale"] = _scale()
    if d.often(25):
        args["pair_bias"] = _pairs(d, (batch, heads, tokens, groups))
    elif d.often(25) and neighbourhood:
        window = tuple(axis.window for axis in neighbourhood.axes)
        args["bias"] = with_none(features(d.tensor(heads, *window), "x" * (len(window) + 1)), Verdict.SERVE)
        args["bias"] = _that_may_be_pairs(args["bias"])
    if d.often(30):
        args["valid"] = with_none(mask(d.booleans(batch, tokens), "xx"), Verdict.SERVE)
    if d.often(30):
        args["valid_groups"] = with_none(mask(d.booleans(batch, groups), "xx"), Verdict.SERVE)
    if not {"neighbourhood", "pair_bias", "valid_groups", "u"} & args.keys():
        args["q"] = features(args["q"].value, "xx.x")  # nobody else says how many groups there are
    return args


def _scale() -> Arg:
    whole_range = real(0.5)
    return with_none(Arg(0.5, lambda v: [*whole_range.others(v), refused("0", 0.0)]), Verdict.SERVE)


def _pairs(d: Draw, pairs: tuple[int, ...]) -> Arg:
    value = d.tensor(*(d.pick(n, n, 1) for n in pairs))

    def others(value: Tensor) -> list[Swap]:
        return [
            s._replace(verdict=Verdict.EITHER) if s.what.startswith("axis") else s
            for s in features(value, "xxxx").others(value)
        ]

    return with_none(Arg(value, others), Verdict.SERVE)


def _that_may_be_pairs(arg: Arg) -> Arg:
    """Another shape is taken for one value for every pair where it could be that."""
    broad = ("axis", "one dimension")
    return Arg(
        arg.value,
        lambda v: [s._replace(verdict=Verdict.EITHER) if s.what.startswith(broad) else s for s in arg.others(v)],
    )


def _with_backend(d: Draw, args: dict[str, Arg]) -> dict[str, Arg]:
    if d.often():
        args["backend"] = choice(d.pick(*BACKENDS))
        if args["backend"].value in ("tiled", "fused"):  # which do not serve all
            args["backend"] = Arg(args["backend"].value, lambda v: [Swap("itself", v, Verdict.EITHER)])
    return args


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == INF, 0.0)


def group(d: Draw) -> Call:
    """``functional.grouping_attention``."""
    return _with_normalisers(d, functional.grouping_attention, "q", "v")


def assign(d: Draw) -> Call:
    """``functional.assign``."""
    return _with_normalisers(d, functional.assign, "k", "u")


def _with_normalisers(d: Draw, function: Any, rows: str, values: str) -> Call:
    """An operator whose result has the rows of one operand and the channels of another."""
    args = _with_backend(d, _operands(d, "qk" + values))

    def check(result: Any, args: Mapping[str, Any]) -> Any:
        form = (*args[rows].shape[:3], args[values].shape[3])
        out = require_form("out", result[0], form, args[values].dtype)
        return out, _finite(require_form("lse", result[1], tuple(args["k"].shape[:3])))

    return _hard_pressed(Call(function, args, check))


def pool(d: Draw) -> Call:
    """``functional.pool``."""
    args = _with_backend(d, _operands(d, "qkvl"))

    def check(result: Any, args: Mapping[str, Any]) -> Any:
        return require_form("out", result, (*args["q"].shape[:3], args["v"].shape[3]), args["v"].dtype)

    return _hard_pressed(Call(functional.pool, args, check))


def _hard_pressed(call: Call) -> Call:
    """A backend that was asked for by name may say that it cannot."""
    backend = call.args.get("backend")
    if backend is not None and backend.value in ("tiled", "fused"):
        call.may_refuse = True
    return call


def select(d: Draw) -> Call:
    """``functional.select``."""
    args = {
        name: arg for name, arg in _operands(d, "qk").items() if name not in ("k", "scale", "valid", "valid_groups")
    }
    args["backend"] = choice("auto")
    del args["backend"]
    args["q"] = features(args["q"].value, "....")
    for name in ("pair_bias", "bias", "compactness", "neighbourhood"):  # only looked at
        if name in args:
            args[name] = fixed(args[name].value)

    def check(result: Any, args: Mapping[str, Any]) -> Any:
        assert str(result)
        return ()

    return Call(functional.select, args, check)


def neighbourhood(d: Draw) -> Call:
    """``Neighbourhood``."""
    drawn = relation(d)
    ndim = drawn.ndim
    geometry_of = {"stride": 1, "kernel_size": 1, "padding": 0}
    args = {
        "input_shape": _sized(drawn.input_shape),
        "output_shape": _sized(drawn.output_shape),
        **{name: _tied_ints(getattr(drawn, name), ndim, least) for name, least in geometry_of.items()},
        "window": wholes(drawn.window, ndim, 1, huge=Verdict.EITHER, odd=True),
        "dilation": wholes(drawn.dilation, ndim, 1, huge=Verdict.EITHER),
    }

    def check(result: Neighbourhood, args: Mapping[str, Any]) -> Any:
        pairs = (result.num_inputs, result.num_groups)
        seen = require_form("mask", result.mask(), pairs, torch.bool)
        assert int(seen.sum()) == result.num_pairs
        assert Neighbourhood.from_integers(result.integers()) == result
        require_form("window_index", result.window_index(), pairs, torch.int64)
        require_form("cells", result.cells(), (result.num_inputs, result.ndim), torch.int64)
        places = require_form("places", result.places(), (result.num_inputs, result.ndim), torch.float32)
        return places, require_form("squared_distances", result.squared_distances(), pairs, torch.float32)

    return Call(Neighbourhood, args, check)


def _sized(value: tuple[int, ...]) -> Arg:
    either = ("another size", "a list", "NumPy's")
    return Arg(
        value, lambda v: [s._replace(verdict=Verdict.EITHER) if s.what in either else s for s in shaped(v).others(v)]
    )


def _tied_ints(value: tuple[int, ...], ndim: int, least: int) -> Arg:
    """Ints that output_shape follows from: another one is mostly refused for that."""
    served = ("NumPy's", "a list")
    return Arg(
        value,
        lambda v: [
            s._replace(verdict=Verdict.EITHER) if s.what in served else s
            for s in wholes(v, ndim, least, huge=Verdict.EITHER).others(v)
        ],
    )


def assignment(d: Draw) -> tuple[Assignment, int]:
    """Memberships of a small grouping, and the size of its batch."""
    between = relation(d)
    batch, heads = d.integer(1, 3), d.integer(1, 3)
    if d.often(30):
        layer = DeformableSpatialGroupingAttention(2 * heads, between.ndim, 3, heads, 1, 1, iters=0)
        x = d.tensor(batch, between.num_inputs, 2 * heads)
        return layer(x, 1.0, between.input_shape).assignment.detach(), batch
    valid = d.booleans(batch, between.num_inputs) if d.often(30) else None
    groups = None if valid is None else geometry.group_validity(valid, between)
    q, k = d.tensor(batch, heads, between.num_groups, 4), d.tensor(batch, heads, between.num_inputs, 4)
    return AttentionAssignment(q, k, between, 0.5, None, valid, groups), batch


def carried(d: Draw) -> Call:
    """``upsample``, ``sum`` and ``pool``."""
    members, batch = assignment(d)
    name = d.pick("upsample", "sum", "pool")
    down = name != "upsample"
    rows = members.num_inputs if down else members.num_groups
    per_head, hard = d.often(30), d.often(30)
    shape = (batch, members.num_heads, rows, 3) if per_head and d.often() else (batch, rows, 3)
    args = {
        "values": features(d.tensor(*shape), "x" * (len(shape) - 1) + "."),
        "per_head": flag(per_head),
        "hard": flag(hard),
        "nested": flag(hard and d.often()),
    }

    def check(result: Tensor, args: Mapping[str, Any]) -> Any:
        heads = (members.num_heads,) if args["per_head"] else ()
        rows = members.num_groups if down else members.num_inputs
        values = args["values"]
        return require_form(name, result, (batch, *heads, rows, values.shape[-1]), values.dtype)

    return Call(getattr(members, name), args, check)


def looked_at(d: Draw) -> Call:
    """``matrix``, ``labels``, ``usage`` and ``boundaries``, which take flags alone."""
    members, batch = assignment(d)
    name, heads = d.pick("matrix", "labels", "usage", "boundaries"), members.num_heads
    flags = {"matrix": ("per_head",), "labels": ("per_head", "nested")}.get(name, ("nested",))
    args = {each: flag(d.often()) for each in flags}

    def check(result: Any, args: Mapping[str, Any]) -> Any:
        of_heads = (heads,) if args.get("per_head") else ()
        tokens, groups = members.num_inputs, members.num_groups
        if name == "matrix":
            return require_form("matrix", result, (batch, *of_heads, tokens, groups), torch.float32)
        if name == "labels":
            return require_form("labels", result, (batch, *of_heads, tokens), torch.int64)
        if name == "boundaries":
            return require_form("boundaries", result, (batch, *members.input_shape), torch.bool)
        require_form("unused", result.unused, (batch,), torch.int64)
        return require_form("mass", result.mass, (batch, groups), torch.float32)

    return Call(getattr(members, name), args, check)


def composed(d: Draw) -> Call:
    """``compose``."""
    members, batch = assignment(d)
    further = relation(d, members.output_shape)
    q, k = d.tensor(batch, 1, further.num_groups, 4), d.tensor(batch, 1, further.num_inputs, 4)
    stages = [members, AttentionAssignment(q, k, further, 1.0)]
    misfit = [stages[1], stages[0]] if further.output_shape != members.input_shape else [stages[0], 1]
    args = {
        "assignments": Arg(
            stages,
            lambda _: [
                refused("nothing", []),
                refused("one alone", members),
                refused("words", ["a", "b"]),
                refused("None", None),
                refused("a number", 3),
                refused("in another order", misfit),
                Swap("a tuple", tuple(stages), Verdict.SERVE),
                Swap("a generator", iter(stages), Verdict.EITHER),
            ],
        )
    }

    def check(chain: Any, args: Mapping[str, Any]) -> Any:
        values = torch.ones(batch, chain.num_groups, 2)
        shape = (batch, chain.num_inputs, 2)
        require_form("labels", chain.labels(), shape[:2], torch.int64)
        require_form("nested labels", chain.labels(nested=True), shape[:2], torch.int64)
        return require_form("upsampled", chain.upsample(values), shape), chain.usage().mass

    return Call(compose, args, check)


def coarser(d: Draw) -> Call:
    """``geometry.coarsen``."""
    drawn = relation(d)
    args = {
        "grid": fixed(Grid(drawn.input_shape, d.real(0.5, 2.0))),
        "kernel_size": fixed(drawn.kernel_size),
        "stride": fixed(drawn.stride),
        "padding": fixed(drawn.padding),
    }

    def check(coarse: Grid, args: Mapping[str, Any]) -> Any:
        assert coarse.shape == drawn.output_shape
        return require_form("coordinates", coarse.coordinates(), (math.prod(coarse.shape), drawn.ndim))

    return Call(geometry.coarsen, args, check)


def validity(d: Draw) -> Call:
    """``geometry.group_validity``."""
    between, batch = relation(d), d.integer(1, 3)
    args = {"valid": fixed(d.booleans(batch, between.num_inputs)), "neighbourhood": fixed(between)}

    def check(result: Tensor, args: Mapping[str, Any]) -> Any:
        return require_form("valid groups", result, (batch, between.num_groups), torch.bool)

    return Call(geometry.group_validity, args, check)


TARGETS = {
    "functional.grouping_attention": group,
    "functional.assign": assign,
    "functional.pool": pool,
    "functional.select": select,
    "Neighbourhood": neighbourhood,
    "geometry.coarsen": coarser,
    "geometry.group_validity": validity,
    "Assignment.upsample, .sum, .pool": carried,
    "Assignment.matrix, .labels, .usage, .boundaries": looked_at,
    "compose": composed,
}
