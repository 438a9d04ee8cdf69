"""Assignments under test: of every variant in one to three dimensions, and chains of them."""

from __future__ import annotations

import torch
from layer_cases import SHAPES, VARIANTS, make_layer, tokens
from spatial_grouping_attention import Assignment, ComposedAssignment, compose

EVERY_VARIANT = tuple(VARIANTS)


def one(variant: str, ndim: int = 2, **options: object) -> Assignment:
    """A float64 assignment with a matrix that is far from uniform."""
    layer = make_layer(variant, ndim, relative_bias=variant == "sparse", **options).double()
    with torch.no_grad():
        layer.q_proj.weight.mul_(3)
    return layer(tokens(SHAPES[ndim]).double(), 0.5, SHAPES[ndim]).assignment


def chain(variants: tuple[str, ...] = ("sparse", "deformable", "dense")) -> ComposedAssignment:
    """Stacked stages, each grouping the groups of the one before."""
    x, shape, spacing, stages = tokens((9, 14)).double(), (9, 14), (0.5, 0.5), []
    for i, variant in enumerate(variants):
        output = make_layer(variant, seed=i).double()(x, spacing, shape)
        x, shape, spacing = output.x_out, output.out_grid_shape, (0.5, 0.5)
        stages.append(output.assignment)
    return compose(stages)


ASSIGNMENTS = {
    **{f"{variant} {ndim}-D": (one, variant, ndim) for variant in EVERY_VARIANT for ndim in (1, 2, 3)},
    "chain of three": (chain,),
    "chain of one": (chain, ("sparse",)),
    "chain of chains": (lambda: compose([compose(chain().stages[:2]), chain().stages[2]]),),
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
