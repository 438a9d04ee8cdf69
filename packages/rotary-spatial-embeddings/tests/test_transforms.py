import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from RoSE import (
    AliasingWarning,
    Grid,
    MultiResolutionBlock,
    RoSEMultiHeadAttention,
    RoSEMultiHeadCrossAttention,
    RotarySpatialEmbedding,
)
from RoSE.frames import FrameWarning
from RoSE.transforms import LogSpacing, PowerSpacing

FORMS = {"power": PowerSpacing, "log": LogSpacing}
logs = st.floats(-2, 2)


@given(st.sampled_from(sorted(FORMS)), logs, logs, st.lists(st.floats(-12, 12), min_size=2, max_size=2, unique=True))
def test_positive_increasing_with_finite_gradients(
    form: str, gain: float, shape: float, exponents: list[float]
) -> None:
    transform = FORMS[form]((0.5,))
    with torch.no_grad():
        for parameter, value in zip(transform.parameters(), (gain, shape), strict=True):
            parameter.fill_(value)
    spacing = torch.tensor([[10.0**e] for e in sorted(exponents)], dtype=torch.float64, requires_grad=True)
    changed = transform(spacing) * spacing
    assert (changed > 0).all()
    assert changed.isfinite().all()
    if exponents[0] - exponents[1] > 1e-3 or exponents[1] - exponents[0] > 1e-3:
        assert changed[1] > changed[0]
    changed.sum().backward()
    assert spacing.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in transform.parameters())


@pytest.mark.parametrize("form", sorted(FORMS))
def test_forms_are_their_formulas(form: str) -> None:
    transform = FORMS[form]((0.5, 2.0)).double()
    torch.manual_seed(0)
    for parameter in transform.parameters():
        torch.nn.init.normal_(parameter)
    s, r = torch.tensor([0.3, 7.0], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    gain, shape = (p.exp() for p in transform.parameters())
    expected = (
        gain * r * (s / r) ** shape
        if form == "power"
        else gain * r * torch.log(1 + s / (shape * r)) / torch.log(1 + 1 / shape)
    )
    torch.testing.assert_close(transform(s) * s, expected)
    assert torch.autograd.gradcheck(transform, (s.requires_grad_(),))


def test_both_start_by_keeping_the_reference_spacing() -> None:
    for form in FORMS.values():
        reference = torch.tensor([0.5, 2.0], dtype=torch.float64)
        torch.testing.assert_close(form((0.5, 2.0))(reference), torch.ones(2, dtype=torch.float64))


def test_identity_adds_no_parameters_and_power_starts_as_identity() -> None:
    x = torch.randn(2, 6, 32)
    torch.manual_seed(0)
    plain = RotarySpatialEmbedding(32, 2, 2)
    for form in (None, "identity", "power"):
        torch.manual_seed(0)
        embedding = RotarySpatialEmbedding(32, 2, 2, spacing_transform=form)
        torch.testing.assert_close(embedding(x, (0.5, 2.0), (2, 3)), plain(x, (0.5, 2.0), (2, 3)))
        assert len(list(embedding.parameters())) == (3 if form == "power" else 1)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_grids_and_coordinates_are_scaled_alike_and_all_parameters_learn(form: str) -> None:
    embedding = RotarySpatialEmbedding(32, 2, 2, spacing_transform=form)
    with torch.no_grad():
        for parameter in embedding.spacing_transform.parameters():
            parameter.add_(torch.tensor([0.3, -0.2]))
    x = torch.randn(2, 6, 32)
    spacing = torch.tensor([[0.5, 2.0], [1.0, 0.1]], dtype=torch.float64)
    index = torch.cartesian_prod(torch.arange(2), torch.arange(3)).double()
    by_grid = embedding(x, spacing, (2, 3))
    by_points = embedding(x, spacing, coordinates=index * spacing[:, None])
    torch.testing.assert_close(by_grid, by_points)
    (by_grid * torch.randn_like(by_grid)).sum().backward()
    assert all(p.grad is not None and (p.grad != 0).all() for p in embedding.spacing_transform.parameters())
    with pytest.raises(ValueError, match="needs the spacing"):
        embedding(x, coordinates=index)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_nothing_is_nan_or_infinite_at_any_extreme(form: str) -> None:
    extremes = (-1e4, -800.0, -90.0, -40.0, 0.0, 40.0, 90.0, 800.0, 1e4)
    spacing = torch.tensor([1e-300, 1e-30, 1e-3, 1.0, 1e3, 1e30, 1e300], dtype=torch.float64)[:, None]
    for gain in extremes:
        for shape in extremes:
            transform, s = FORMS[form]((1.0,)), spacing.clone().requires_grad_()
            with torch.no_grad():
                for parameter, value in zip(transform.parameters(), (gain, shape), strict=True):
                    parameter.fill_(value)
            factor = transform(s)
            assert (factor > 0).all()
            assert factor.isfinite().all()
            assert ((factor * s).diff(dim=0) > 0).all()
            factor.log().sum().backward()
            assert all(p.grad.isfinite().all() for p in transform.parameters())
            assert s.grad.isfinite().all()


POINTS = torch.rand(6, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    "arguments",
    [
        {"spacing": 0.5, "grid_shape": (2, 3)},
        {"spacing": torch.tensor([[0.5, 1.0], [0.7, 0.3]]), "grid_shape": (2, 3)},
        {"coordinates": Grid((2, 3), 0.5, 1.0)},
        {"coordinates": POINTS, "spacing": 0.5},
        {"coordinates": POINTS, "spacing": torch.tensor([[0.5, 1.0], [0.7, 0.3]])},
        {"coordinates": [Grid((2, 2), 0.5), POINTS[:2]], "spacing": [None, (0.5, 0.5)]},
    ],
)
def test_all_forms_accept_the_same_arguments(arguments: dict[str, object]) -> None:
    x = torch.randn(2, 6, 32)
    for form in ("identity", "power", "log"):
        assert RotarySpatialEmbedding(32, 2, 2, spacing_transform=form)(x, **arguments).shape == x.shape
    with pytest.raises((ValueError, TypeError), match=r"spacing(\[0\])? must be"):
        RotarySpatialEmbedding(32, 2, 2, spacing_transform="identity")(x, -1.0, coordinates=POINTS)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_aliasing_warning_looks_at_transformed_spacings(form: str, as_tensor: bool) -> None:
    def embedding(gain: float) -> RotarySpatialEmbedding:
        module = RotarySpatialEmbedding(32, 2, 2, spacing_transform=form, learnable=False, directions="axial")
        with torch.no_grad():
            module.spacing_transform.log_gain.fill_(gain)
        return module

    x = torch.randn(1, 6, 32)
    fine, coarse = ((torch.tensor([s, s]) if as_tensor else s) for s in (1.0, 20.0))
    embedding(-4.0)(x, coarse, (2, 3))  # which would alias as it is
    with pytest.warns(AliasingWarning, match=r"spacing after its transform \d.* raise reference_spacing or give"):
        embedding(4.0)(x, fine, (2, 3))


CROSS = RoSEMultiHeadCrossAttention
MEETINGS = {
    "pair": (RotarySpatialEmbedding, lambda m, x, a, b: m.rotate_pair(x, x, a, (2, 3), b)),
    "list": (RotarySpatialEmbedding, lambda m, x, a, b: m(x, coordinates=[Grid((1, 3), a), Grid((1, 3), b)])),
    "points": (RotarySpatialEmbedding, lambda m, x, a, b: m(x, [a, b], coordinates=[POINTS[:3], POINTS[3:]])),
    "scores": (CROSS, lambda m, x, a, b: m(x, x, a, (2, 3), b)),
    "attend": (CROSS, lambda m, x, a, b: m.attend(x, x, x, a, (2, 3), b)),
    "attention": (RoSEMultiHeadAttention, lambda m, x, a, b: m(x, a, (2, 3), b)),
    "grids": (CROSS, lambda m, x, a, b: m(x, x, coordinates=Grid((2, 3), a), k_coordinates=Grid((2, 3), b))),
    "block": (MultiResolutionBlock, lambda m, x, a, b: m([x, x], [a, b], [(2, 3)] * 2)),
}
STEPS = {
    "numbers": (0.5, 0.7, 0.5),
    "tensors": (torch.tensor([0.5, 0.7]), torch.tensor([0.5, 0.8]), torch.tensor([0.5, 0.7])),
    "per sample": (torch.ones(2, 2), torch.tensor([[1.0, 1.0], [1.0, 0.5]]), (1.0, 1.0)),
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("meeting", MEETINGS)
@pytest.mark.parametrize("form", [None, "identity", "power", "log"])
def test_tokens_of_different_spacings_behind_a_transform_are_warned_of(
    form: str | None, meeting: str, steps: str
) -> None:
    make, call = MEETINGS[meeting]
    module, x = make(32, 2, 2, spacing_transform=form), torch.randn(2, 6, 32)
    here, elsewhere, same = STEPS[steps]
    if meeting == "points" and form is None:
        return  # where a spacing beside points is refused
    call(module, x, here, same)
    if form in FORMS:
        with pytest.warns(FrameWarning, match="share no physical frame; use spacing_transform=None") as caught:
            call(module, x, here, elsewhere)
        assert [w.filename for w in caught] == [__file__]
    call(module, x, here, elsewhere)  # once
