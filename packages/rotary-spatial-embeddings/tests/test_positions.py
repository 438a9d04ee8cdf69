"""Where tokens are: coordinates, batches, packed and nested sequences, and gradients to all of it."""

import pytest
import torch
from hypothesis import given
from RoSE import Grid, RoSEMultiHeadAttention, RotarySpatialEmbedding
from RoSE.functional import cos_sin, phases, rotate
from rose_cases import Case, cases, from_layout, to_layout


@given(cases(learnable=True))
def test_arbitrary_coordinates_shared_and_per_sample(case: Case) -> None:
    embedding = case.embedding()
    x = case.features(7, batch=3)
    where = torch.randn(3, 7, case.spatial_dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = embedding(x, coordinates=where)
    one_by_one = torch.cat([embedding(x[i : i + 1], coordinates=where[i]) for i in range(3)])
    torch.testing.assert_close(together, one_by_one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("partition", ["channels", "heads"])
@pytest.mark.parametrize("layout", ["bnd", pytest.param("bhnd", marks=pytest.mark.slow)])
def test_gradients_to_features_positions_and_frequencies(interleaved: bool, partition: str, layout: str) -> None:
    torch.manual_seed(0)
    embedding = RotarySpatialEmbedding(
        16, 2, 2, interleaved=interleaved, rotary_partition=partition, rotary_ratio=0.5, dtype=torch.float64
    )
    x = to_layout(torch.randn(2, 3, 16, dtype=torch.float64), 2, layout).requires_grad_()

    def call(x: torch.Tensor, where: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
        arguments = {"coordinates": where, "num_prefix_tokens": 1, "layout": layout}
        return torch.func.functional_call(embedding, {"freqs": freqs}, (x,), arguments)

    for shape in ((2, 2), (2, 2, 2)):
        where = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        inputs = (x, where, embedding.freqs.detach().clone().requires_grad_())
        assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, inputs)


def test_gradients_to_a_per_sample_spacing() -> None:
    embedding = RotarySpatialEmbedding(16, 2, 2, dtype=torch.float64)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    spacing = torch.rand(2, 2, dtype=torch.float64).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: embedding(x, s, (2, 3)), (spacing,))


@pytest.mark.parametrize("interleaved", [True, False])
def test_angle_gradients_equal_those_of_plain_arithmetic_for_large_inputs(interleaved: bool) -> None:
    """The reduction in pieces, on more elements than one piece holds, broadcast over batch and over heads."""
    torch.manual_seed(0)
    for angle_shape in ((600, 8, 16), (2, 600, 1, 16), (1, 1, 16), (16,)):
        x = torch.randn(2, 600, 8, 40, dtype=torch.float64, requires_grad=True)
        angles = torch.randn(angle_shape, dtype=torch.float64, requires_grad=True)
        weight = torch.randn_like(x)
        (rotate(x, *cos_sin(angles, torch.float64), interleaved=interleaved) * weight).sum().backward()
        got = x.grad, angles.grad
        x.grad = angles.grad = None
        pair = x[..., :32].unflatten(-1, (16, 2) if interleaved else (2, 16))
        first, second = pair.unbind(-1 if interleaved else -2)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1 if interleaved else -2)
        (torch.cat((turned.flatten(-2), x[..., 32:]), -1) * weight).sum().backward()
        torch.testing.assert_close(got, (x.grad, angles.grad))


@pytest.mark.parametrize("layout", ["bnd", "bnhd"])
def test_packed_sequences_are_the_sequences(layout: str) -> None:
    embedding = RotarySpatialEmbedding(32, 2, 2, dtype=torch.float64)
    grids = [Grid((2, 3), 0.5), Grid((4, 2), (1.0, 0.3), origin=2.0), Grid((1, 1))]
    sequences = [torch.randn(g.size, 32, dtype=torch.float64) for g in grids]
    where = torch.cat([g.coordinates() for g in grids])
    expected = torch.cat([embedding(s[None], coordinates=g)[0] for s, g in zip(sequences, grids, strict=True)])

    row = to_layout(torch.cat(sequences)[None], 2, layout)
    packed = from_layout(embedding(row, coordinates=where, layout=layout), layout)[0]
    torch.testing.assert_close(packed, expected)

    as_given = [s if layout == "bnd" else s.unflatten(-1, (2, 16)) for s in sequences]
    nested = torch.nested.nested_tensor(as_given, layout=torch.jagged)
    nested_where = torch.nested.nested_tensor([g.coordinates() for g in grids], layout=torch.jagged)
    for positions in (where, nested_where):
        turned = embedding(nested, coordinates=positions, layout=layout)
        assert turned.is_nested
        torch.testing.assert_close((turned + nested - nested).values().reshape(-1, 32), expected)
        pair = embedding.rotate_pair(nested, nested, coordinates=positions, layout=layout)
        torch.testing.assert_close(pair[1].values().reshape(-1, 32), expected)


# Torch's attention for jagged tensors builds one of its older nested tensors, which announce themselves.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_sequences_attend_each_to_itself() -> None:
    attention = RoSEMultiHeadAttention(32, 2, 2)
    grids = [Grid((2, 3), 0.5), Grid((4, 2), 0.3)]
    sequences = [torch.randn(g.size, 32) for g in grids]
    nested = torch.nested.nested_tensor(sequences, layout=torch.jagged, requires_grad=True)
    where = torch.cat([g.coordinates() for g in grids])
    out = attention(nested, coordinates=where)
    expected = [attention(s[None], coordinates=g)[0] for s, g in zip(sequences, grids, strict=True)]
    torch.testing.assert_close(out.values(), torch.cat(expected), rtol=1e-4, atol=1e-5)
    out.values().sum().backward()
    assert attention.rotary.freqs.grad.abs().sum() > 0


def test_forward_uses_positions_as_they_are() -> None:
    embedding = RotarySpatialEmbedding(16, 1, 1, learnable=False, dtype=torch.float64)
    x = torch.randn(1, 1, 16, dtype=torch.float64)
    angles = phases(torch.tensor([[3.0]], dtype=torch.float64), embedding.freqs)
    expected = rotate(x.view(1, 1, 1, 16), *cos_sin(angles, torch.float64)).flatten(2)
    torch.testing.assert_close(embedding(x, coordinates=torch.tensor([[3.0]], dtype=torch.float64)), expected)
    assert torch.equal(embedding(x, 5.0, (1,)), x)  # the only point of a grid lies at its origin, 0


def test_one_dimension_needs_no_shape() -> None:
    embedding = RotarySpatialEmbedding(16, 1, 1)
    x = torch.randn(2, 5, 16)
    assert torch.equal(embedding(x), embedding(x, 1.0, (5,)))
    assert torch.equal(embedding(x, 0.5), embedding(x, (0.5,), 5))


@pytest.mark.filterwarnings("ignore:a spacing_transform:RoSE.frames.FrameWarning")  # which is another test's
@pytest.mark.parametrize("spacing_transform", [None, "log"])
def test_grids_and_points_may_lie_one_behind_the_other(spacing_transform: str | None) -> None:
    embedding = RotarySpatialEmbedding(16, 2, 2, spacing_transform=spacing_transform, dtype=torch.float64)
    if spacing_transform is not None:
        with torch.no_grad():
            embedding.spacing_transform.log_knee.add_(0.5)
    per_sample = torch.tensor([[0.5, 0.7], [0.3, 0.2]], dtype=torch.float64)
    grids = [Grid((2, 3), 0.5), Grid((2, 2), per_sample, origin=1.0)]
    points = torch.randn(3, 2, dtype=torch.float64)
    steps = None if spacing_transform is None else 0.4
    x = torch.randn(2, 14, 16, dtype=torch.float64)
    together = embedding(x, None if steps is None else [None, None, steps], coordinates=[*grids, points],
                         num_prefix_tokens=1)  # fmt: skip
    apart = [
        x[:, :1],
        embedding(x[:, 1:7], coordinates=grids[0]),
        embedding(x[:, 7:11], coordinates=grids[1]),
        embedding(x[:, 11:], steps, coordinates=points),
    ]
    torch.testing.assert_close(together, torch.cat(apart, 1), rtol=1e-12, atol=1e-12)
    for wrong, words in (
        ({"coordinates": grids}, "one position for each of the 14 tokens; got 10"),
        ({"coordinates": [*grids, points], "grid_shape": (2, 7)}, "grid_shape must be left out"),
        ({"coordinates": [*grids, points], "spacing": 1.0}, "spacing must be a list with one entry for each of the 3"),
    ):
        with pytest.raises(ValueError, match=words):
            embedding(x, **wrong)


def test_what_is_given_per_sample_has_the_batch_size() -> None:
    embedding, attention = RotarySpatialEmbedding(16, 2, 2), RoSEMultiHeadAttention(16, 2, 2)
    x = torch.randn(2, 6, 16)
    for one in ({"spacing": torch.ones(1, 2), "grid_shape": (2, 3)}, {"coordinates": torch.zeros(1, 6, 2)},
                {"coordinates": Grid((2, 3), 1.0, torch.zeros(1, 2))}):  # fmt: skip
        for module in (embedding, attention):
            with pytest.raises(ValueError, match="must have the batch size 2; got 1"):
                module(x, **one)
        assert embedding(x[:1], **one).shape == (1, 6, 16)
