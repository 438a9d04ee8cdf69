"""Padding is nothing: samples padded with invalid tokens are the samples alone, whatever the padding holds."""

import math

import pytest
import torch
from grouping_cases import assert_near
from layer_cases import VARIANTS, make_layer, tokens
from spatial_grouping_attention import (
    GroupingOutput,
    Neighbourhood,
    SpatialGroupingAttention,
    WindowedSelfAttention,
    compose,
)
from spatial_grouping_attention.geometry import group_validity
from torch import Tensor

EVERY_VARIANT = tuple(VARIANTS)
# Sizes whose cells are whole or end in one with fewer tokens, so that no border cell owns more than the others.
ALONE = {1: (7,), 2: (6, 5), 3: (3, 5, 4)}
PADDED = {1: (12,), 2: (9, 11), 3: (6, 5, 7)}
BATCH = {1: [(7,), (12,), (2,)], 2: [(6, 5), (9, 11), (3, 8)], 3: [(3, 5, 4), (6, 2, 7), (4, 5, 1)]}


def padded(x: Tensor, shape: tuple[int, ...], larger: tuple[int, ...], fill: object) -> tuple[Tensor, Tensor]:
    """Tokens of a grid at the start of a larger one, and which tokens of that are real."""
    batch, _, channels = x.shape
    corner = (slice(None), *(slice(n) for n in shape))
    valid = torch.zeros(batch, *larger, dtype=torch.bool)
    valid[corner] = True
    out = torch.randn(batch, *larger, channels, dtype=x.dtype)
    out = 100 * out if fill == "random" else torch.full_like(out, fill)
    out[corner] = x.unflatten(1, shape)
    return out.flatten(1, -2), valid


def cut(rows: Tensor, larger: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Rows (B, N, ...) of a larger grid -> of the grid at its start."""
    return rows.unflatten(1, larger)[(slice(None), *(slice(n) for n in shape))].flatten(1, len(shape))


def groups_of(layer: SpatialGroupingAttention, shape: tuple[int, ...]) -> tuple[int, ...]:
    return layer.neighbourhood(shape).output_shape


def weighted(x: Tensor, seed: int) -> Tensor:
    """A sum in which no two entries count alike."""
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (weights.to(x.dtype) * x).sum()


def outcome(layer: SpatialGroupingAttention, x: Tensor, shape, larger, valid: Tensor | None) -> dict[str, Tensor]:
    """Everything that a layer says of the real tokens and groups, and the gradients of that."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    output = layer(x, (1.0, 0.5, 1.5)[: len(shape)], larger, valid=valid)
    few, many = groups_of(layer, shape), groups_of(layer, larger)
    values = torch.randn(x.shape[0], math.prod(few), 3, generator=torch.Generator().manual_seed(8), dtype=x.dtype)
    if valid is not None:
        values, _ = padded(values, few, many, math.nan)
    given = x.detach()[..., :3]
    found = {
        "x_out": cut(output.x_out, many, few),
        "labels": cut(located(output.assignment.labels(), many, few), larger, shape),
        "upsampled": cut(output.assignment.upsample(values), larger, shape),
        "pooled": cut(output.assignment.pool(given), many, few),
        "hard": cut(output.assignment.upsample(values, hard=True), larger, shape),
        "hard pooled": cut(output.assignment.pool(given, hard=True), many, few),
        "boundaries": cut(output.assignment.boundaries().flatten(1), larger, shape),
        "mass": cut(output.assignment.usage().mass, many, few),
        "unused": output.assignment.usage().unused,
    }
    sum(weighted(found[name], i) for i, name in enumerate(("x_out", "upsampled", "pooled"))).backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {**found, **gradients, "x": cut(x.grad, larger, shape)}


def located(labels: Tensor, many: tuple[int, ...], few: tuple[int, ...]) -> Tensor:
    """Labels numbered over a larger grid of groups -> over the grid at its start; -1 stays."""
    index = torch.stack(torch.unravel_index(labels.clamp(min=0), many), -1)
    flat = torch.zeros_like(labels)
    for axis, size in enumerate(few):
        flat = flat * size + index[..., axis]
    return flat.where(labels >= 0, labels)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        if want[name].is_floating_point():
            assert_near(got[name], want[name], 1e-9, name)
        else:
            assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("fill", [0.0, "random", math.nan, math.inf])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_a_padded_sample_is_the_sample_alone(variant: str, ndim: int, fill: object) -> None:
    options = {"relative_bias": variant != "dense", "temperature": "learned", "norm_tokens": True, "compactness": 1.0}
    layer = make_layer(variant, ndim, **options).double()
    shape, larger = ALONE[ndim], PADDED[ndim]
    x = tokens(shape).double()
    want = outcome(layer, x, shape, shape, None)
    wide, valid = padded(x, shape, larger, fill)
    assert_same(outcome(layer, wide, shape, larger, valid), want)
    assert_same(outcome(layer, wide, shape, larger, valid.flatten(1)), want)


@pytest.mark.parametrize("fresh", [False, True], ids=["trained", "fresh"])
@pytest.mark.parametrize("options", [{"kernel_size": 5, "stride": 3}, {"kernel_size": 3, "stride": 1}], ids=str)
@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_other_strides_and_points_on_whole_steps(variant: str, options: dict[str, int], fresh: bool) -> None:
    """A fresh deformable layer has its points on groups, some of them on the last valid one: their gradients too."""
    layer = make_layer(variant, **options).double()
    if fresh and variant == "deformable":
        layer.offsets.reset_parameters()
    shape, larger = (8, 5), (11, 10)
    x = tokens(shape).double()
    wide, valid = padded(x, shape, larger, math.nan)
    assert_same(outcome(layer, wide, shape, larger, valid), outcome(layer, x, shape, shape, None))


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_a_batch_of_different_sizes_is_the_samples_one_by_one(variant: str, ndim: int) -> None:
    layer = make_layer(variant, ndim).double()
    shapes, spacings = BATCH[ndim], torch.rand(3, ndim, dtype=torch.float64) + 0.5
    larger = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    samples = [tokens(shape, batch=1, seed=i).double() for i, shape in enumerate(shapes)]
    both = [padded(x, shape, larger, math.nan) for x, shape in zip(samples, shapes, strict=True)]
    x, valid = (torch.cat(parts) for parts in zip(*both, strict=True))
    together = layer(x, spacings, larger, valid=valid)
    many = groups_of(layer, larger)
    labels = together.assignment.labels()
    for i, (shape, sample) in enumerate(zip(shapes, samples, strict=True)):
        few, alone = groups_of(layer, shape), layer(sample, spacings[i], shape)
        assert_near(cut(together.x_out[i : i + 1], many, few), alone.x_out, 1e-9)
        mine = cut(located(labels[i : i + 1], many, few), larger, shape)
        assert torch.equal(mine, alone.assignment.labels())
        assert together.valid[i].sum() == math.prod(few)
        assert cut(together.valid[i : i + 1], many, few).all()
        assert_nothing_of_padding(together, valid, i)


def assert_nothing_of_padding(output: GroupingOutput, valid: Tensor, sample: int) -> None:
    """Invalid tokens and groups have no share, no value and no label."""
    real, real_groups = valid.flatten(1)[sample], output.valid[sample]
    matrix = output.assignment.matrix()[sample]
    assert output.x_out[sample, ~real_groups].eq(0).all()
    assert matrix[~real].eq(0).all()
    assert matrix[:, ~real_groups].eq(0).all()
    assert_near(matrix[real].sum(-1), torch.ones(int(real.sum())), 1e-6)
    labels = output.assignment.labels()[sample]
    assert torch.equal(labels < 0, ~real)
    assert real_groups[labels[real]].all()
    of_groups = torch.ones_like(output.x_out).masked_fill(~output.valid.unsqueeze(-1), math.nan)
    of_tokens = of_groups.new_ones(*valid.flatten(1).shape, 1).masked_fill(~valid.flatten(1).unsqueeze(-1), math.nan)
    for hard in (False, True):
        assert_near(output.assignment.upsample(of_groups, hard=hard)[sample, :, 0], real.double(), 1e-6)
        for down in (output.assignment.pool(of_tokens, hard=hard), output.assignment.sum(of_tokens, hard=hard)):
            assert down[sample].isfinite().all()
            assert down[sample, ~real_groups].eq(0).all()


def test_stages_hand_validity_on_and_chains_know_it() -> None:
    first, second = (make_layer(name, seed=i).double() for i, name in enumerate(("sparse", "deformable")))
    shape, larger = (8, 6), (12, 9)
    x = tokens(shape).double()
    wide, valid = padded(x, shape, larger, math.nan)
    chains = []
    for start, size, real in ((x, shape, None), (wide, larger, valid)):
        fine = first(start, 1.0, size, valid=real)
        coarse = second(fine.x_out, input_grid=fine.grid, valid=fine.valid)
        chains.append((compose([fine.assignment, coarse.assignment]), coarse))
    (alone, want), (chain, got) = chains
    few, many = want.out_grid_shape, got.out_grid_shape
    assert_near(cut(got.x_out, many, few), want.x_out, 1e-9)
    values = torch.randn(2, alone.num_groups, 2, dtype=torch.float64)
    spread = chain.upsample(padded(values, few, many, math.nan)[0])
    assert_near(cut(spread, larger, shape), alone.upsample(values), 1e-9)
    assert chain.valid is valid.flatten(1) or torch.equal(chain.valid, valid.flatten(1))
    assert torch.equal(chain.valid_groups, got.valid)
    for nested in (False, True):
        mine = chain.labels(nested=nested)
        assert torch.equal(mine < 0, ~valid.flatten(1))
        assert torch.equal(cut(located(mine, many, few), larger, shape), alone.labels(nested=nested))
    assert torch.equal(chain.usage().unused, alone.usage().unused)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_any_tokens_may_be_invalid(variant: str) -> None:
    """Not only at the end, and all of a sample: nothing is NaN, forward or backward, and what is left is whole."""
    layer = make_layer(variant)
    valid = torch.rand(3, 6, 9, generator=torch.Generator().manual_seed(2)) < 0.6
    valid[1] = False
    x = tokens((6, 9), batch=3).masked_fill(~valid.flatten(1).unsqueeze(-1), math.nan).requires_grad_()
    output = layer(x, 1.0, (6, 9), valid=valid)
    for sample in range(3):
        assert_nothing_of_padding(output, valid, sample)
    assert not output.valid[1].any()
    assert output.assignment.usage().unused[1] == 0
    up = output.assignment.upsample(output.x_out)
    (output.x_out.square().sum() + up.square().sum()).backward()
    assert x.grad.isfinite().all()
    assert x.grad[~valid.flatten(1)].eq(0).all()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_all_valid_is_no_validity_and_masks_are_for_real_tokens(variant: str) -> None:
    layer, x = make_layer(variant).double(), tokens((6, 9)).double()
    every = torch.ones(2, 6, 9, dtype=torch.bool)
    want, got = layer(x, 1.0, (6, 9)), layer(x, 1.0, valid=every)
    assert want.valid is None
    assert got.valid.all()
    assert_near(got.x_out, want.x_out, 1e-9)
    assert_near(got.assignment.matrix(), want.assignment.matrix(), 1e-9)
    mask, valid = torch.rand(2, 2, 6, 9, generator=torch.Generator().manual_seed(5)) < 0.5
    masked = layer(x, 1.0, (6, 9), mask & valid, valid=valid)
    assert_near(layer(x, 1.0, (6, 9), mask, valid=valid).x_out, masked.x_out, 1e-12)
    assert (masked.x_out - layer(x, 1.0, (6, 9), valid=valid).x_out).abs().max() > 1e-2


@pytest.mark.parametrize("fill", ["random", math.nan])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 3, "relative_bias": True, "temperature": "learned", "compactness": 1.0},
        {"window": None},
        {"window": None, "compactness": 1.0},
        {"window": 3, "dilation": 2},
    ],
    ids=str,
)
def test_windowed_self_attention(options: dict[str, object], ndim: int, fill: object) -> None:
    torch.manual_seed(0)
    layer = WindowedSelfAttention(8, 2, ndim, **options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    shape, larger = ALONE[ndim], PADDED[ndim]
    x = tokens(shape).double()
    wide, valid = padded(x, shape, larger, fill)
    results = []
    for given, size, real in ((x, shape, None), (wide, larger, valid)):
        layer.zero_grad()
        given = given.detach().requires_grad_()
        out = layer(given, 0.5, size, valid=real)
        kept = cut(out, size, shape)
        weighted(kept, 3).backward()
        grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
        results.append({"out": kept, "x": cut(given.grad, size, shape), **grads})
        if real is not None:
            assert out[~real.flatten(1)].eq(0).all()
            assert given.grad[~real.flatten(1)].eq(0).all()
    assert_same(results[1], results[0])


def test_windowed_self_attention_of_a_batch_of_different_sizes() -> None:
    layer = WindowedSelfAttention(8, 2, 2, window=3).double()
    shapes, spacings = BATCH[2], torch.rand(3, 2, dtype=torch.float64) + 0.5
    larger = (9, 11)
    samples = [tokens(shape, batch=1, seed=i).double() for i, shape in enumerate(shapes)]
    both = [padded(x, shape, larger, math.nan) for x, shape in zip(samples, shapes, strict=True)]
    x, valid = (torch.cat(parts) for parts in zip(*both, strict=True))
    together = layer(x, spacings, valid=valid)
    for i, (shape, sample) in enumerate(zip(shapes, samples, strict=True)):
        assert_near(cut(together[i : i + 1], larger, shape), layer(sample, spacings[i], shape), 1e-9)


@pytest.mark.parametrize(
    "neighbourhood",
    [
        Neighbourhood((7,), (4,), 2, 3, 1, 3),
        Neighbourhood((4,), (10,), 1, 1, 3, 1),
        Neighbourhood((9, 6), (2, 3), (4, 2), (5, 2), (1, 0), 1),
        Neighbourhood((3, 4, 5), (2, 4, 2), (2, 1, 3), 3, 1, 3),
        Neighbourhood((1, 6), (1, 3), (1, 2), (1, 3), (0, 1), 3),
    ],
    ids=str,
)
def test_groups_are_valid_where_their_own_cell_owns_a_valid_token(neighbourhood: Neighbourhood) -> None:
    valid = torch.rand(4, neighbourhood.num_inputs, generator=torch.Generator().manual_seed(1)) < 0.3
    valid[0], valid[1] = True, False
    want = torch.zeros(4, *neighbourhood.output_shape, dtype=torch.bool)
    for sample, token in valid.nonzero().tolist():
        want[(sample, *neighbourhood.cells()[token].tolist())] = True
    assert torch.equal(group_validity(valid, neighbourhood), want.flatten(1))
    assert group_validity(valid.to("meta"), neighbourhood).is_meta
