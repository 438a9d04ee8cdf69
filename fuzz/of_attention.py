"""Targets: what RoSE's attention modules do with tokens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import RoSE
import torch
from drawing import Arg, Draw, Swap, Verdict, flag, probability, refused, whole, with_none
from law import Call, require_form
from of_rose import plain_keywords, where
from RoSE import Grid
from tensors import features, mask, positions
from torch import Tensor

SAID_OF_KEYS = ("positions", "x", "q", "k", "spacing", "grid_shape", "coordinates", "valid", "k_valid")


def scores(d: Draw) -> Call:
    """Bare scores of queries and keys."""
    module, args, _ = _sides(d)
    heads = module.num_heads

    def check(result: Tensor, args: Mapping[str, Any]) -> Any:
        shape = (args["q"].shape[0], heads, args["q"].shape[1], args["k"].shape[1])
        require_form("scores", result, shape, args["q"].dtype)
        return result if args.get("k_valid") is None and args.get("valid") is None else ()

    return Call(module, args, check, names=SAID_OF_KEYS, module=module)


def attend(d: Draw) -> Call:
    """The whole attention of queries to keys."""
    module, args, batch = _sides(d)
    keys, heads = args["k"].value.shape[1], module.num_heads
    args["v"] = features(d.tensor(batch, keys, heads * d.integer(1, 3)), "xxx" if heads > 1 else "xx.")
    args["v"] = _width_of_heads(args["v"], heads)
    if d.often(30):
        args["dropout_p"] = probability(0.1)
    if d.often(30):
        args["attn_mask"] = _pairs_mask(d, batch, heads, args["q"].value.shape[1], keys)

    def check(result: Tensor, args: Mapping[str, Any]) -> Any:
        return require_form("result", result, (*args["q"].shape[:2], args["v"].shape[2]), args["q"].dtype)

    return Call(module.attend, args, check, names=SAID_OF_KEYS, module=module)


def _width_of_heads(arg: Arg, heads: int) -> Arg:
    """Any width that heads divide, 0 too."""

    def others(value: Tensor) -> Any:
        return [s._replace(verdict=Verdict.EITHER) if s.what == "axis 2 empty" else s for s in arg.others(value)]

    return Arg(arg.value, others)


def _sides(d: Draw) -> tuple[Any, dict[str, Arg], int]:
    heads, size, batch = d.integer(1, 3), 2 * d.integer(1, 3), d.integer(1, 3)
    rotary = plain_keywords(d, 2)
    transforms = rotary.get("spacing_transform")
    module = RoSE.RoSEMultiHeadCrossAttention(heads * size, heads, 2, **rotary)
    said, tokens = where(d, batch, transforms=transforms)
    k_said, k_tokens = where(d, batch, "k_", transforms=transforms) if d.often() else ({}, tokens)
    prefix = d.integer(0, 2)
    args = {
        "q": features(d.tensor(batch, tokens + prefix, heads * size), "xxx"),
        "k": features(d.tensor(batch, k_tokens + prefix, heads * size), "xxx"),
        **said,
        **k_said,
        "num_prefix_tokens": whole(prefix, 0, huge=Verdict.REFUSE),
    }
    if d.often(30):
        args["valid"] = with_none(mask(d.booleans(batch, tokens + prefix), "xx"), Verdict.SERVE)
    if d.often(30):
        args["k_valid"] = with_none(mask(d.booleans(batch, k_tokens + prefix), "xx"), Verdict.SERVE)
    return module, args, batch


def _pairs_mask(d: Draw, batch: int, heads: int, queries: int, keys: int) -> Arg:
    """A mask of four dimensions, any of which may be 1."""
    shape = tuple(d.pick(n, n, 1) for n in (batch, heads, queries, keys))
    value = d.booleans(*shape)
    value[..., 0] = True  # a query that sees no key has no softmax where nothing is said of validity

    def others(value: Tensor) -> Any:
        broad = ("axis", "one dimension", "integers", "floats", "none")
        return [
            s._replace(verdict=Verdict.EITHER, sane=False) if s.what.startswith(broad) and s.what != "integers" else s
            for s in mask(value, "xxxx").others(value)
        ]

    return with_none(Arg(value, others), Verdict.SERVE)


def attention(d: Draw) -> Call:
    """Attention with projections, to itself or to a context."""
    heads, size, batch = d.integer(1, 3), 2 * d.integer(1, 3), d.integer(1, 3)
    keywords = {"context_dim": d.integer(1, 5)} if d.often(40) else {}
    rotary = plain_keywords(d, 2)
    transforms = rotary.get("spacing_transform")
    module = RoSE.RoSEMultiHeadAttention(heads * size, heads, 2, **keywords, **rotary)
    said, tokens = where(d, batch, transforms=transforms)
    args = {"x": features(d.tensor(batch, tokens, heads * size), ".xx"), **said}
    if keywords:
        k_said, k_tokens = where(d, batch, "k_", transforms=transforms)
        args |= k_said
        args["context"] = features(d.tensor(batch, k_tokens, keywords["context_dim"]), "xxx")
        args["x"] = features(args["x"].value, "xxx")
    if d.often(30):
        args["valid"] = with_none(mask(d.booleans(batch, tokens), "xx"), Verdict.EITHER)
        args["x"] = features(args["x"].value, "xxx")
    if d.often(30) and not keywords:
        args["is_causal"] = flag(d.often())

    def check(result: Tensor, args: Mapping[str, Any]) -> Any:
        return require_form("result", result, tuple(args["x"].shape), args["x"].dtype)

    return Call(module, args, check, names=SAID_OF_KEYS, module=module)


def packed(d: Draw) -> Call:
    """Sequences of different lengths, in one nested tensor."""
    heads, size = d.integer(1, 3), 2 * d.integer(1, 3)
    lengths = [d.integer(1, 4) for _ in range(d.integer(1, 3))]
    rotary = {**plain_keywords(d, 2), "spacing_transform": None}
    module = RoSE.RotarySpatialEmbedding(heads * size, heads, 2, **rotary)
    # Any: torch's stubs do not know what a nested tensor has besides.
    x: Any = torch.nested.nested_tensor([d.tensor(n, heads * size) for n in lengths], layout=torch.jagged)
    others = torch.nested.nested_tensor([d.tensor(n + 1, heads * size) for n in lengths], layout=torch.jagged)
    swaps = [
        refused("dense", x.values()),
        refused("a list of tensors", list(x.unbind())),
        refused("other lengths", others),
        refused("another width", torch.nested.nested_tensor([d.tensor(n, 3) for n in lengths], layout=torch.jagged)),
        refused("in the old layout", _in_the_old_layout(d, lengths, heads * size)),
        Swap(
            "with gaps",
            torch.nested.nested_tensor_from_jagged(x.values().t().contiguous().t(), x.offsets()),
            Verdict.SERVE,
        ),
        Swap("double precision", x.double(), Verdict.SERVE),
        refused("integers", torch.nested.nested_tensor_from_jagged(x.values().long(), x.offsets())),
    ]
    args = {
        "x": Arg(x, lambda _: swaps),
        "coordinates": positions(d.tensor(sum(lengths), 2), "xx"),
        "num_prefix_tokens": Arg(0, lambda _: [refused("one", 1), refused("a word", "1")]),
    }
    if d.often(30):
        args["layout"] = Arg("bnd", lambda _: [refused("heads first", "bhnd")])

    def check(result: Any, args: Mapping[str, Any]) -> Any:
        assert torch.equal(result.offsets(), args["x"].offsets())
        return require_form("values", result.values(), tuple(args["x"].values().shape), args["x"].dtype)

    return Call(module, args, check, names=("positions", "nested features"))


def _in_the_old_layout(d: Draw, lengths: list[int], width: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it a prototype
        return torch.nested.nested_tensor([d.tensor(n, width) for n in lengths], layout=torch.strided)


def block(d: Draw) -> Call:
    """Several grids that attend to one another."""
    heads, size, batch, count = d.integer(1, 2), 2 * d.integer(1, 3), d.integer(1, 2), d.integer(1, 3)
    module = RoSE.MultiResolutionBlock(heads * size, heads, 2, mlp_ratio=1.0, **plain_keywords(d, 2))
    shapes = [d.shape(2, 3) for _ in range(count)]
    leading = d.often(30)
    parts = [d.tensor(batch, a * b, heads * size) for a, b in shapes]
    if leading:
        parts.insert(0, d.tensor(batch, d.integer(0, 2), heads * size))
    args = {"x": _parts(parts), "leading_tokens": flag(leading)}
    if d.often():
        args["spacing"] = with_none(_one_each([d.real(0.5, 2.0) for _ in shapes]), Verdict.SERVE)
        args["grid_shape"] = _one_each(shapes)
    else:
        args["coordinates"] = _one_each([Grid(shape, d.real(0.5, 2.0)) for shape in shapes])
    if d.often(30):
        valid = [d.booleans(batch, a * b) for a, b in shapes]
        args["valid"] = with_none(_one_each(valid), Verdict.SERVE)

    def check(result: Any, args: Mapping[str, Any]) -> Any:
        return [require_form("x", out, tuple(x.shape), x.dtype) for out, x in zip(result, args["x"], strict=True)]

    return Call(module, args, check, names=("coordinates", "grid_shape", "spacing", "valid"), module=module)


def _parts(parts: list[Tensor]) -> Arg:
    last = parts[-1]
    return Arg(
        parts,
        lambda _: [
            refused("nothing", []),
            refused("a word", "x"),
            refused("None", None),
            refused("a number", 1.0),
            refused("one part more", [*parts, last]),
            refused("a generator", iter(parts)),
            refused("arrays", [p.numpy() for p in parts]),
            refused("another type in one", [*parts[:-1], last.long()]),
            refused("one dimension less in one", [*parts[:-1], last[0]]),
            refused("another width in one", [*parts[:-1], last[..., :1]]),
            refused("a token more in one", [*parts[:-1], torch.cat((last, last[:, :1]), 1)]),
        ],
    )


def _one_each(values: list[Any]) -> Arg:
    return Arg(
        values,
        lambda _: [
            refused("one more", [*values, values[0]]),
            refused("nothing", []),
            refused("a word", "x"),
            refused("words", ["x"] * len(values)),
            refused("a dict", dict(enumerate(values))),
            refused("objects", [object()] * len(values)),
        ],
    )


TARGETS = {
    "RoSE.RoSEMultiHeadCrossAttention()": scores,
    "RoSE.RoSEMultiHeadCrossAttention.attend": attend,
    "RoSE.RoSEMultiHeadAttention()": attention,
    "RoSE.RotarySpatialEmbedding() of nested tensors": packed,
    "RoSE.MultiResolutionBlock()": block,
}
