import pytest
from RoSE import RotarySpatialEmbedding
from rose_cases import DIRECTIONS


@pytest.fixture
def plot_frequencies():
    matplotlib = pytest.importorskip("matplotlib", reason="pictures are drawn where matplotlib is installed")
    matplotlib.use("Agg")
    from RoSE.plotting import plot_frequencies

    yield plot_frequencies
    matplotlib.pyplot.close("all")


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
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_frequencies(RotarySpatialEmbedding(64, 4, rotary_ratio=0.0))
    with pytest.raises(ValueError, match="spatial axes 0 to 1"):
        plot_frequencies(RotarySpatialEmbedding(64, 4), axes=(0, 2))
