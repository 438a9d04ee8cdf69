"""Pictures of the groups: one panel per stage, on images and on slices of volumes."""

import sys

import pytest
import torch
from layer_cases import make_layer, tokens
from spatial_grouping_attention import Assignment, compose, plotting
from spatial_grouping_attention.plotting import plot_groups


def stages(shape: tuple[int, ...]) -> list[Assignment]:
    x, spacing, assignments = tokens(shape, batch=1), (1.0,) * len(shape), []
    for variant in ("sparse", "dense"):
        output = make_layer(variant, len(shape))(x, spacing, shape)
        x, shape = output.x_out, output.out_grid_shape
        assignments.append(output.assignment)
    return assignments


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'spatial-grouping-attention\[plot\]'"):
        plot_groups(torch.rand(8, 8), stages((8, 8)))


@pytest.mark.parametrize(
    ("image", "shape", "options"),
    [
        ((8, 9), (8, 9), {}),
        ((3, 32, 36), (8, 9), {"titles": ["fine", "coarse"]}),
        ((1, 8, 9), (8, 9), {"sample": 0}),
        ((5, 8, 6), (5, 8, 6), {}),
        ((1, 5, 8, 6), (5, 8, 6), {"axis": 2, "index": 0}),
    ],
)
def test_one_panel_for_the_image_and_one_per_stage(
    image: tuple[int, ...], shape: tuple[int, ...], options: dict[str, object]
) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    figure = plot_groups(torch.rand(image), stages(shape), **options)
    panels = figure.get_axes()
    assert len(panels) == 3
    assert all(panel.get_images() for panel in panels)
    titles = [panel.get_title() for panel in panels[1:]]
    assert titles == options.get("titles", [f"{a.num_groups} groups" for a in stages(shape)])
    # Stages are drawn over the image, not instead of it, with borders that are not in the image.
    arrays = [panel.get_images()[0].get_array() for panel in panels]
    assert len({array.shape for array in arrays}) == 1
    assert all((array.sum(-1) == 0).any() for array in arrays[1:])


@pytest.mark.parametrize("nested", [{}, {"nested": False}, {"nested": True}], ids=str)
def test_segments_are_the_labels_of_the_chain(nested: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    monkeypatch.setattr(plotting, "PANEL_PIXELS", 18)  # a pixel a token
    assignments = stages((16, 18))
    figure = plot_groups(1 + torch.rand(16, 18), assignments, **nested)
    borders = [compose(assignments[:n]).boundaries(**nested)[0] for n in (1, 2)]
    for panel, want in zip(figure.get_axes()[1:], borders, strict=True):
        drawn = torch.from_numpy(panel.get_images()[0].get_array().data).sum(-1) == 0
        assert torch.equal(drawn, want)
    other = compose(assignments).boundaries(nested=not nested.get("nested", False))[0]
    assert not torch.equal(borders[1], other)


def test_images_of_another_kind_are_refused() -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    for shape in ((8,), (2, 8, 8), (3, 8, 8, 8)):
        with pytest.raises(ValueError, match=r"image must be a 2-D grid, with 1 or 3 channels in front or none; got"):
            plot_groups(torch.rand(shape), stages((8, 8)))
    with pytest.raises(ValueError, match=r"axes.* must be one of 2, 3; got 1"):
        plot_groups(torch.rand(8), stages((8,)))


def test_stages_and_titles_that_do_not_fit_are_refused() -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    image, assignments = torch.rand(8, 8), stages((8, 8))
    with pytest.raises(TypeError, match="must be a sequence of Assignments; got AttentionAssignment"):
        plot_groups(image, assignments[0])
    with pytest.raises(ValueError, match="must hold at least one Assignment; got none"):
        plot_groups(image, [])
    with pytest.raises(ValueError, match="titles must be one for each of the 2 stages; got 1"):
        plot_groups(image, assignments, titles=["one"])


def test_padding_that_is_no_number_is_black() -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    image = torch.rand(8, 8)
    image[0] = torch.nan
    drawn = plot_groups(image, stages((8, 8))).get_axes()[0].get_images()[0].get_array()
    assert (drawn[: drawn.shape[0] // 8] == 0).all()
    assert drawn.max() == 1
