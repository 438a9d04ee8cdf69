import sys

import pytest
from RoSE import RotarySpatialEmbedding
from rose_cases import DIRECTIONS


@pytest.fixture
def plot_frequencies():
    pytest.importorskip("matplotlib", reason="pictures are drawn where matplotlib is installed")
    from RoSE.plotting import plot_frequencies

    return plot_frequencies


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_draws_every_kind_of_embedding(plot_frequencies, spatial_dims: int, directions: str, tmp_path) -> None:
    embedding = RotarySpatialEmbedding(64, 4, spatial_dims, directions=directions, reference_spacing=0.5)
    figure = plot_frequencies(embedding)
    bands, vectors, similarity = figure.axes
    assert len(bands.lines) == 4
    assert len(vectors.lines) >= 4 + embedding.freqs.shape[0]
    assert len(similarity.lines) == spatial_dims
    assert similarity.lines[0].get_ydata()[0] == pytest.approx(1)
    drawn = {round(x, 3) for line in bands.lines for x in line.get_xdata()}
    assert min(drawn) < 2 * 3.15 * 0.5 * 1.1
    figure.savefig(tmp_path / "picture.png")


def test_refuses_what_cannot_be_drawn(plot_frequencies) -> None:
    with pytest.raises(ValueError, match="something to draw"):
        plot_frequencies(RotarySpatialEmbedding(64, 4, rotary_ratio=0.0))
    with pytest.raises(ValueError, match="spatial axes 0 to 1"):
        plot_frequencies(RotarySpatialEmbedding(64, 4), axes=(0, 2))


def test_no_figure_stays_open(plot_frequencies) -> None:
    from matplotlib import pyplot

    plot_frequencies(RotarySpatialEmbedding(64, 4))
    assert pyplot.get_fignums() == []


def test_what_is_missing_is_named(plot_frequencies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plot_frequencies needs matplotlib: pip install 'rotary-spatial-embeddings"):
        plot_frequencies(RotarySpatialEmbedding(64, 4))
