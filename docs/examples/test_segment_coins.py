"""The demonstration runs on an image of one's own, and its measures are right."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import torch
from coins_data import Crops, Scene, coins
from coins_metrics import boundary, boundary_f_score, score
from coins_models import Coarse, GroupingNetwork, StridedNetwork, count, hat
from coins_plot import windows
from coins_training import predict
from RoSE import Grid
from segment_coins import main
from skimage import io


def square(shift: int, size: int = 40) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[10:30, 10 + shift : 30 + shift] = True
    return mask


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A noisy colour image of a bright square on each half, and its labels 3 and 7."""
    labels = np.vstack([square(0), square(2)]).astype(np.uint8) * 4 + 3
    noise = np.random.default_rng(0).normal(0, 8, labels.shape)
    image = (labels * 25 + noise).clip(0, 255).astype(np.uint8)
    paths = tmp_path / "image.png", tmp_path / "labels.tif"
    io.imsave(paths[0], np.stack([image] * 3, -1), check_contrast=False)
    io.imsave(paths[1], labels, check_contrast=False)
    return paths


def test_whole_program_on_own_files(files, tmp_path, capsys):
    picture = tmp_path / "out.png"
    image, labels = map(str, files)
    quick = ["--steps", "2", "--batch", "1", "--crop", "32", "--threads", str(torch.get_num_threads())]
    scores = main([*quick, "--image", image, "--labels", labels, "--spacing", "0.5", "0.25", "--output", str(picture)])
    assert io.imread(picture).shape[2] == 4
    assert len(scores) == 4
    assert all(0 <= s.mean_iou <= 1 for s in scores.values())
    printed = capsys.readouterr().out
    assert "spacing 0.5 x 0.25" in printed
    assert all(name in printed for name in [*scores, "class 3", "class 7", "BF@1px"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--crop", "8"], "--crop must be at least 16"),
        (["--spacing", "0", "1"], "--spacing must be two positive numbers"),
        (["--image", "x.png"], "--image and --labels go together"),
    ],
)
def test_options_that_make_no_sense(extra, message, capsys):
    with pytest.raises(SystemExit):
        main(extra)
    assert message in capsys.readouterr().err


def test_files_that_do_not_fit(files, tmp_path):
    image, labels = files
    other = tmp_path / "other.png"
    io.imsave(other, np.zeros((20, 20), np.uint8), check_contrast=False)
    with pytest.raises(SystemExit, match="same size"):
        main(["--image", str(image), "--labels", str(other)])
    with pytest.raises(SystemExit, match="at least 16 pixels"):
        main(["--image", str(image), "--labels", str(labels), "--train-fraction", "0.9"])


def test_coins_need_no_download_and_the_parts_share_nothing():
    scene = coins()
    seen, unseen = scene.split(0.5)
    assert set(np.unique(seen.labels)) == set(np.unique(unseen.labels)) == {0, 1, 2}
    assert np.array_equal(np.vstack([seen.image, unseen.image]), scene.image)
    # No coin is cut: both rows at the seam are table.
    assert not seen.labels[-1].any()
    assert not unseen.labels[0].any()


def test_crops_are_reproducible_and_keep_image_and_labels_together():
    labels = np.random.default_rng(0).integers(0, 2, (40, 50))
    scene = Scene(labels.astype(np.float32), labels, ("no", "yes"), (1.0, 1.0), "", "")
    first, again, other = (Crops(scene, 16, seed).batch(3) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    for image, label in zip(*first, strict=True):
        assert image[0][label == 1].min() > image[0][label == 0].max()


def test_perfect_prediction_scores_one():
    labels = square(0).astype(int) + square(3)
    s = score(labels, labels, 3)
    assert s.iou == s.boundary == (1.0, 1.0, 1.0)


def test_iou_by_hand():
    s = score(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]]), 3)
    assert s.iou[:2] == (1 / 2, 2 / 3)
    assert np.isnan(s.iou[2])
    assert s.mean_iou == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_boundary_score_forgives_one_pixel_and_not_three():
    assert boundary_f_score(square(1), square(0)) == 1.0
    # 18 pixels of the upper and of the lower side still touch the other square's, and one next to each.
    assert boundary_f_score(square(3), square(0)) == 2 * (18 + 1) / 76
    assert boundary_f_score(square(3), square(0), tolerance=3) == 1.0
    assert boundary_f_score(square(0), np.zeros((40, 40), bool)) == 0.0
    assert np.isnan(boundary_f_score(np.ones((4, 4), bool), np.ones((4, 4), bool)))


def test_edge_of_the_image_is_no_boundary():
    mask = np.zeros((6, 6), bool)
    mask[:, :3] = True
    assert np.argwhere(boundary(mask)).tolist() == [[row, 2] for row in range(6)]


def test_networks_have_the_same_size_and_place_their_tokens_alike():
    grouping = GroupingNetwork(3, (0.5, 0.25))
    strided = StridedNetwork(grouping)
    assert count(strided) == pytest.approx(count(grouping), rel=0.02)
    image = torch.rand(2, 1, 24, 37)
    ours, theirs = grouping(image), strided(image)
    assert ours.grid == theirs.grid
    assert ours.grid.spacing == (4.0, 2.0)
    assert ours.native().shape == ours.bilinear().shape == theirs.bilinear().shape == (2, 3, 24, 37)
    with pytest.raises(ValueError, match="not groups"):
        theirs.native()


def test_interpolation_is_exact_for_a_ramp_and_constant_outside():
    fine, coarse = Grid(9, 0.5), Grid(2, 2.0, 1.0)
    ramp = hat(fine, coarse) @ torch.tensor([1.0, 3.0])
    assert torch.allclose(ramp, torch.arange(9).mul(0.5).clamp(1, 3))


def test_bilinear_agrees_with_torch_where_grids_are_centred():
    logits = torch.randn(1, 3 * 4, 2)
    coarse = Coarse(logits, Grid((3, 4), 8.0, 3.5), Grid((24, 32)))
    image = logits.transpose(1, 2).unflatten(2, (3, 4))
    expected = torch.nn.functional.interpolate(image, scale_factor=8, mode="bilinear")
    assert torch.allclose(coarse.bilinear(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (17, 40), (31, 33)])
def test_windows_cover_everything(shape):
    seen = np.zeros(shape, int)
    for place in windows(shape, (16, 16)):
        seen[place] += 1
        assert seen[place].shape == (16, 16)
    assert seen.min() >= 1


def test_prediction_is_the_likeliest_class_of_every_pixel():
    image = np.random.default_rng(0).random((20, 50), dtype=np.float32)
    labels = predict(torch.nn.Identity(), lambda x: torch.cat([0.5 - x, x - 0.5], 1), image)
    assert np.array_equal(labels, image > 0.5)
