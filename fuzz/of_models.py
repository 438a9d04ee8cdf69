"""Targets: the networks, what they return, and what is made of that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from drawing import Arg, Draw, Swap, Verdict, choice, flag, probability, real, refused, spaced, whole, wholes, with_none
from law import Call, require_form
from spatial_grouping_attention.models import (
    GroupingViT,
    SetMatchingLoss,
    grouping_vit_nano,
    objects_of,
    panoptic_segments,
    plan,
)
from tensors import features, integers, mask
from torch import Tensor


def _per_stage(values: tuple[int, ...], least: int) -> Arg:
    def others(values: tuple[int, ...]) -> list[Swap]:
        return [
            refused("a number", values[0]),
            refused("a word", "ab"),
            refused("None", None),
            refused("nothing", ()),
            refused("one", values[:1]),
            refused("too small", (least - 1,) * len(values)),
            refused("floats", tuple(map(float, values))),
            refused("truth values", (True,) * len(values)),
            Swap("a list", list(values), Verdict.SERVE),
        ]

    return Arg(values, others)


def network(d: Draw) -> Call:
    """``models.GroupingViT``."""
    stages, ndim = d.integer(2, 3), d.integer(1, 3)
    heads = tuple(d.integer(1, 2) for _ in range(stages))
    dims = tuple(2 * heads[i] * heads[max(i - 1, 0)] for i in range(stages))
    args: dict[str, Arg] = {
        "spatial_dims": whole(ndim, 1, most=3),
        "in_channels": whole(d.integer(1, 2), 1),
        "num_classes": whole(d.integer(1, 3), 1),
        "dims": _per_stage(dims, 1),
        "depths": _per_stage(tuple(d.integer(0, 1) for _ in dims), 0),
        "num_heads": _per_stage(heads, 1),
    }
    more = {
        "mlp": choice(d.pick("linear", "conv")),
        "mlp_ratio": real(1.0, above=0.0, wide=False),
        "stem": choice(d.pick("patch", "conv")),
        "stem_stride": wholes(d.pick(1, 2), ndim, 1),
        "window": wholes(d.pick(1, 3), ndim, 1, odd=True, huge=Verdict.EITHER),
        "grouping": choice(d.pick("sparse", "dense"), none=True),
        "grouping_window": wholes(3, ndim, 1, odd=True, huge=Verdict.EITHER),
        "grouping_mlp_ratio": real(1.0, above=0.0, wide=False),
        "iters": whole(1, 0, huge=Verdict.EITHER),
        "compactness": with_none(real(2.0, above=0.0), Verdict.SERVE),
        "temperature": choice(d.pick("fixed", "learned")),
        "head": choice(d.pick("native", "panoptic", "bilinear", "fpn", "fused"), none=True),
        "head_width": with_none(whole(2, 1), Verdict.SERVE),
        "num_candidates": with_none(whole(2, 1, huge=Verdict.EITHER), Verdict.SERVE),
        "drop_path": probability(0.1),
        "checkpoint": flag(d.often()),
        "spacing": spaced(d, ndim, tensors=False),
        "backend": choice("auto"),
    }
    args |= {name: arg for name, arg in more.items() if d.often(30)}
    return Call(GroupingViT, args, lambda module, _: list(module.state_dict().values()))


def small_network(d: Draw, **keywords: Any) -> GroupingViT:
    """A network to be called, with every parameter in use."""
    ndim = d.integer(1, 3)
    torch.manual_seed(d.integer(0, 99))
    options: dict[str, Any] = {
        "dims": (4, 8),
        "depths": (d.integer(0, 1), 1),
        "num_heads": (1, 2),
        "stem": d.pick("patch", "conv"),
        "stem_stride": d.pick(1, 2),
        "mlp": d.pick("linear", "conv"),
        "window": 3,
        "iters": 1,
        "grouping": d.pick("sparse", "dense"),
        "head": d.pick("native", "panoptic", "bilinear", "fpn", "fused"),
        "downsample": "group",
        "checkpoint": d.often(20),
        **keywords,
    }
    network = GroupingViT(ndim, d.integer(1, 2), 3, **options)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "freqs" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def segment(d: Draw) -> Call:
    """``models.GroupingViT()``."""
    network = small_network(d)
    if d.often(20):
        network = grouping_vit_nano(network.spatial_dims, network.in_channels, 3, dims=(4, 4, 8), num_heads=(1, 1, 2))
    return _call(d, network)


def _call(d: Draw, network: GroupingViT) -> Call:
    ndim, batch = network.spatial_dims, d.integer(1, 2)
    size = d.shape(ndim, 6)
    args = {
        "image": features(d.tensor(batch, network.in_channels, *size), "xx" + "x" * ndim),
        "spacing": with_none(spaced(d, ndim, batch), Verdict.SERVE),
    }
    if d.often(40):
        args["valid"] = with_none(mask(d.booleans(batch, *size), "x" * (ndim + 1)), Verdict.SERVE)
    else:
        sized = tuple(f"axis {axis}" for axis in (0, *range(2, ndim + 2)))
        args["image"] = _free(args["image"], sized)

    def check(output: Any, args: Mapping[str, Any]) -> Any:
        batch, _, *size = args["image"].shape
        logits = require_form("logits", output.logits, (batch, 3, *size), args["image"].dtype)
        for rows, grid in zip(output.features, output.grids, strict=True):
            require_form("features", rows, (batch, math.prod(grid.shape), rows.shape[2]))
        if output.candidates is not None:
            shown = output.candidates.shape[1]
            require_form("mask_logits", output.mask_logits, (batch, shown, *size))
        return logits, output.features

    return Call(network, args, check, names=("size of the image",), module=network)


def _free(arg: Arg, what: tuple[str, ...]) -> Arg:
    return Arg(
        arg.value,
        lambda v: [s._replace(verdict=Verdict.EITHER) if s.what.startswith(what) else s for s in arg.others(v)],
    )


def _output(d: Draw) -> Any:
    network = small_network(d, head="panoptic", num_candidates=d.integer(1, 4))
    size, batch = d.shape(network.spatial_dims, 5), d.integer(1, 2)
    valid = d.booleans(batch, *size) if d.often(30) else None
    return network(d.tensor(batch, network.in_channels, *size), 1.0, valid)


def matching(d: Draw) -> Call:
    """``models.SetMatchingLoss``."""
    args = {
        "num_classes": whole(3, 1, huge=Verdict.SERVE),
        "class_weight": real(2.0, least=0.0),
        "mask_weight": real(2.0, least=0.0),
        "dice_weight": real(2.0, least=0.0),
        "no_object_weight": real(0.4, least=0.0),
        "reduce": with_none(Arg(None, lambda _: [refused("a word", "sum"), refused("a number", 1)]), Verdict.SERVE),
    }
    return Call(SetMatchingLoss, args, lambda *_: ())


def matched(d: Draw) -> Call:
    """``models.SetMatchingLoss()``."""
    output = _output(d)
    batch, size = output.logits.shape[0], tuple(output.logits.shape[2:])
    numbers = (3 * d.tensor(batch, *size).abs()).long()
    targets = [tuple(objects) for objects in objects_of(numbers, d.integer(0, 2))]
    labels, masks = targets[0]

    def first(labels: Any, masks: Any) -> list[Any]:
        return [(labels, masks), *targets[1:]]

    swaps = [
        refused("nothing", []),
        refused("one more", [*targets, targets[0]]),
        refused("None", None),
        refused("a number", 1),
        refused("objects", [object()] * batch),
        refused("labels alone", [labels] * batch),
        refused("float labels", first(labels.float(), masks)),
        refused("integer masks", first(labels, masks.long())),
        refused("of another size", first(labels, masks[..., None])),
        refused("one label more", first(torch.cat((labels, labels.new_zeros(1))), masks)),
        refused("a class too many", first(torch.full((len(labels) + 1,), 3), masks.new_zeros(len(labels) + 1, *size))),
        refused("a negative class", first(torch.full((1,), -1), masks.new_zeros(1, *size))),
        Swap("no objects", [(labels[:0], masks[:0])] * batch, Verdict.SERVE),
    ]
    args = {
        "output": Arg(output, lambda _: [refused("a tensor", output.logits), refused("None", None)]),
        "targets": Arg(targets, lambda _: swaps),
    }

    def check(losses: Any, args: Mapping[str, Any]) -> Any:
        return [require_form("loss", loss, ()) for loss in losses]

    if d.often(10):
        args["targets"] = Arg(targets, lambda _: [])
        return Call(
            SetMatchingLoss(d.pick(1, 2, 4)), args, check, names=("labels", "masks", "num_classes"), may_refuse=True
        )
    return Call(SetMatchingLoss(3), args, check, names=("labels", "masks"))


def objects(d: Draw) -> Call:
    """``models.objects_of``."""
    shape = (d.integer(1, 2), *d.shape(d.integer(1, 3)))
    instances = (3 * d.tensor(*shape).abs()).long()
    args = {
        "instances": _free(integers(instances, "." * len(shape)), ("axis", "one dimension")),
        "classes": whole(1, 0, huge=Verdict.EITHER),
    }
    if d.often():
        args["instances"] = integers(instances, "x" * len(shape))
        args["classes"] = integers((2 * d.tensor(*shape).abs()).long(), "x" * len(shape))
        args["classes"] = Arg(args["classes"].value, _pixel_classes(args["classes"]))

    def check(found: Any, args: Mapping[str, Any]) -> Any:
        for image, (labels, masks) in zip(args["instances"], found, strict=True):
            require_form("masks", masks, (len(labels), *image.shape), torch.bool)
        return ()

    return Call(objects_of, args, check)


def _pixel_classes(arg: Arg) -> Any:
    def others(value: Tensor) -> list[Swap]:
        return [s for s in arg.others(value) if s.what not in ("a number",)]

    return others


def segments(d: Draw) -> Call:
    """``models.panoptic_segments``."""
    output = _output(d)
    args = {
        "output": Arg(output, lambda _: [refused("a tensor", output.logits), refused("None", None)]),
        "min_score": real(d.pick(0.0, 0.5), least=0.0, most=1.0),
        "min_overlap": real(0.5, least=0.0, most=1.0),
        "min_size": with_none(whole(1, 0, huge=Verdict.EITHER), Verdict.SERVE),
    }
    if d.often(30):
        wrong = [
            refused("a class too many", [3]),
            refused("a word", "ab"),
            refused("a float", [1.0]),
            refused("a number", 1),
            refused("negative", [-1]),
        ]
        args["things"] = with_none(Arg([1, 2], lambda _: wrong), Verdict.SERVE)

    def check(found: Any, args: Mapping[str, Any]) -> Any:
        for image in found:
            require_form("instances", image.instances, tuple(output.logits.shape[2:]), torch.int64)
            require_form("classes", image.classes, (int(image.instances.max()) if image.instances.numel() else 0,))
        return [image.scores for image in found]

    return Call(panoptic_segments, args, check)


def masks(d: Draw) -> Call:
    """``models.SegmentationOutput.masks_of``."""
    output = _output(d)
    batch, size = output.logits.shape[0], tuple(output.logits.shape[2:])
    groups = torch.zeros(batch, d.integer(1, 3), dtype=torch.int64)

    def check(result: Tensor, args: Mapping[str, Any]) -> Any:
        return require_form("masks", result, (batch, args["groups"].shape[1], *size))

    return Call(output.masks_of, {"groups": integers(groups, "x.")}, check)


def members(d: Draw) -> Call:
    """``upsample`` and ``sum`` of the pixels' memberships."""
    output = _output(d)
    inside = output.memberships()
    batch, size, groups = output.logits.shape[0], tuple(output.logits.shape[2:]), output.features[-1].shape[1]
    up = d.often()
    value = d.tensor(batch, groups, 2) if up else d.tensor(batch, 2, *size)
    args = {"values": features(value, "xx." if up else "x." + "x" * len(size))}

    def check(result: Tensor, args: Mapping[str, Any]) -> Any:
        values = args["values"]
        shape = (batch, values.shape[-1], *size) if up else (batch, groups, values.shape[1])
        return require_form("result", result, shape)

    return Call(inside.upsample if up else inside.sum, args, check)


def planned(d: Draw) -> Call:
    """``models.plan``."""
    ndim = d.integer(1, 3)
    size = d.shape(ndim, 100)
    args = {
        "spacing": spaced(d, ndim, tensors=False),
        "size": Arg(
            size,
            lambda v: [
                refused("0", 0),
                refused("floats", (1.0,) * ndim),
                refused("None", None),
                refused("a word", "a"),
            ],
        ),
        "levels": whole(d.integer(1, 5), 1),
    }

    def check(result: Any, args: Mapping[str, Any]) -> Any:
        assert len(result.strides) == args["levels"]
        assert result.with_stem(0).strides == result.strides
        return ()

    return Call(plan, args, check)


TARGETS = {
    "models.GroupingViT": network,
    "models.GroupingViT()": segment,
    "models.SetMatchingLoss": matching,
    "models.SetMatchingLoss()": matched,
    "models.objects_of": objects,
    "models.panoptic_segments": segments,
    "models.SegmentationOutput.masks_of": masks,
    "models.PixelMemberships.upsample, .sum": members,
    "models.plan": planned,
}
