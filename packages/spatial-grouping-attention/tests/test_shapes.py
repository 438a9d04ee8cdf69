"""Shapes and types of what comes out, written as annotations that are checked at every call."""

import pytest
import torch
from beartype import beartype
from jaxtyping import Bool, Float, Float32, Int64, jaxtyped
from layer_cases import VARIANTS
from spatial_grouping_attention import Assignment, Neighbourhood, compose, functional
from spatial_grouping_attention.models import GroupingViT
from torch import Tensor

# Axes that could be taken for one another differ in size.
BATCH, HEADS, FINE, COARSE = 3, 2, (4, 10), (2, 5)
N_IN, N_OUT = 40, 10
SEEN = Neighbourhood(FINE, COARSE, 2, 3, 1, 3)

checked = jaxtyped(typechecker=beartype)


@checked
def group(
    q: Float[Tensor, "b h groups d"], k: Float[Tensor, "b h tokens d"], v: Float[Tensor, "b h tokens dv"], backend: str
) -> tuple[Float[Tensor, "b h groups dv"], Float32[Tensor, "b h tokens"]]:
    return functional.grouping_attention(q, k, v, SEEN, backend=backend)


@checked
def assign(
    q: Float[Tensor, "b h groups d"], k: Float[Tensor, "b h tokens d"], u: Float[Tensor, "b h groups du"], backend: str
) -> tuple[Float[Tensor, "b h tokens du"], Float32[Tensor, "b h tokens"]]:
    return functional.assign(q, k, u, SEEN, backend=backend)


@checked
def pool(
    q: Float[Tensor, "b h groups d"],
    k: Float[Tensor, "b h tokens d"],
    v: Float[Tensor, "b h tokens dv"],
    lse: Float32[Tensor, "b h tokens"],
    backend: str,
) -> Float[Tensor, "b h groups dv"]:
    return functional.pool(q, k, v, lse, SEEN, backend=backend)


@checked
def upsample(assignment: Assignment, values: Float[Tensor, "b groups c"]) -> Float[Tensor, "b tokens=40 c"]:
    return assignment.upsample(values)


@checked
def average(assignment: Assignment, values: Float[Tensor, "b tokens=40 c"]) -> Float[Tensor, "b groups c"]:
    return assignment.pool(values)


@checked
def matrices(assignment: Assignment) -> tuple[Float[Tensor, "b 40 10"], Float[Tensor, "b h 40 10"]]:
    return assignment.matrix(), assignment.matrix(per_head=True)


@checked
def labels(assignment: Assignment) -> tuple[Int64[Tensor, "b 40"], Int64[Tensor, "b h 40"], Bool[Tensor, "b 4 10"]]:
    return assignment.labels(), assignment.labels(per_head=True), assignment.boundaries()


@checked
def usage(assignment: Assignment) -> tuple[Float[Tensor, "b 10"], Int64[Tensor, " b"]]:
    return assignment.usage()


@checked
def segment(model: GroupingViT, image: Float[Tensor, "b channels *size"]) -> Float[Tensor, "b classes=7 *size"]:
    return model(image).logits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_operators(backend: str, dtype: torch.dtype) -> None:
    q, k = (torch.randn(BATCH, HEADS, n, 8, dtype=dtype) for n in (N_OUT, N_IN))
    v, u = (torch.randn(BATCH, HEADS, n, 6, dtype=dtype) for n in (N_IN, N_OUT))
    assert group(q, k, v, backend)[0].dtype == dtype
    carried, lse = assign(q, k, u, backend)
    assert carried.dtype == dtype
    assert pool(q, k, v, lse, backend).dtype == dtype


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_and_assignments(variant: str) -> None:
    layer = VARIANTS[variant](8, 2, kernel_size=3, stride=2, num_heads=HEADS, out_dims=12)

    @checked
    def layer_of(x: Float[Tensor, "b tokens channels"]) -> Float[Tensor, "b groups=10 out=12"]:
        return layer(x, 0.5, FINE).x_out

    x = torch.randn(BATCH, N_IN, 8)
    layer_of(x)
    assignment = layer(x, 0.5, FINE).assignment
    upsample(assignment, torch.randn(BATCH, N_OUT, 5))
    average(assignment, torch.randn(BATCH, N_IN, 5))
    matrices(assignment)
    labels(assignment)
    usage(assignment)
    upsample(compose([assignment]), torch.randn(BATCH, N_OUT, 5))


@pytest.mark.parametrize("head", ["native", "panoptic", "fused", "bilinear", "fpn"])
@pytest.mark.parametrize("size", [(9,), (9, 6), (5, 6, 9)], ids=len)
def test_networks(head: str, size: tuple[int, ...]) -> None:
    settings = {"dims": (8, 16), "depths": (1, 1), "num_heads": (2, 2), "stem_stride": 2, "window": 3}
    downsample = "conv" if head in ("bilinear", "fpn") else "group"
    model = GroupingViT(len(size), 2, 7, head=head, downsample=downsample, **settings)
    segment(model, torch.randn(BATCH, 2, *size))
