"""The parts of the experiments, and that all of them run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))

import evidence
import evidence_tables as tables
import main as program
import masks
import spacing
from images import Picture, averaged, resampled, resized
from networks import NETWORKS, Otsu
from positions import (
    FREQUENCIES,
    PHYSICAL,
    POSITIONS,
    RESAMPLED,
    Resampled,
    drawn_together,
    drift,
    wave_vectors,
)  # fmt: skip
from reporting import blocks_of
from runs import Run, complete, known, write
from scores import segment_scores
from segmentation.instances import separate
from segmentation.metrics import instance_scores
from shapes import FAMILIES, picture
from training import Batch, vary

pytestmark = [pytest.mark.training, pytest.mark.filterwarnings("ignore::RoSE.AliasingWarning")]
RUNS = [Run("masks", "colours", "U-Net", seed, 1) for seed in range(4)]


def score(run: Run, data: Path | None) -> dict:
    return {"scores": {"seed": run.seed}}


def never(run: Run, data: Path | None) -> dict:
    raise AssertionError(f"{run.name} is done again")


def fails_at_two(run: Run, data: Path | None) -> dict:
    if run.seed == 2:
        raise KeyboardInterrupt
    return score(run, data)


def test_what_is_done_stays_done(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        complete(RUNS, fails_at_two, None, tmp_path)
    assert set(known(tmp_path)) == set(RUNS[:2])
    assert complete(RUNS[:2], never, None, tmp_path).keys() == set(RUNS[:2])
    results = complete(RUNS, score, None, tmp_path)
    assert [results[run]["scores"]["seed"] for run in RUNS] == [0, 1, 2, 3]
    assert len((tmp_path / "masks.jsonl").read_text().splitlines()) == 4


def test_what_is_shown_is_kept_beside_the_results(tmp_path: Path) -> None:
    write(tmp_path, RUNS[1], {"scores": {}, "shown": {"classes": np.eye(3)}})
    assert known(tmp_path) == {RUNS[1]: {"scores": {}}}
    assert np.array_equal(np.load(tmp_path / "masks-colours-u-net-1-1.npz")["classes"], np.eye(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scene_is_the_same_at_every_spacing(family: str) -> None:
    fine, coarse = (picture(family, np.random.default_rng(3), spacing) for spacing in (0.5, 1.5))
    assert fine.image.shape == ((1, 96, 96) if family == "radii" else (1, 192, 192))
    assert coarse.image.shape == ((1, 96, 96) if family == "radii" else (1, 64, 64))
    # The middle of a coarse pixel is that of the second of three fine ones.
    n = fine.labels.shape[0] // 3
    same = (fine.labels[1::3, 1::3] == coarse.labels[:n, :n]).float().mean()
    assert same > 0.999
    again = picture(family, np.random.default_rng(3), 0.5)
    assert torch.equal(again.image, fine.image)


def test_all_classes_are_made_and_radii_are_of_one_kind_in_an_image() -> None:
    for family in FAMILIES:
        rng = np.random.default_rng(0)
        found = [set(np.unique(picture(family, rng).labels)) for _ in range(6)]
        if family == "radii":
            assert {tuple(sorted(f)) for f in found} == {(0, 1), (0, 2)}
        else:
            assert set().union(*found) == {0, 1, 2}


def test_cells_that_are_classified_without_error_are_found_without_error() -> None:
    (one,) = [picture("touching cells", np.random.default_rng(0))]
    assert one.objects is not None
    assert one.objects.max() > 10
    assert not one.objects[one.labels == 0].any()
    assert one.objects[one.labels == 1].all()
    scores = instance_scores([separate(torch.nn.functional.one_hot(one.labels).movedim(-1, 0))], [one.objects])
    assert scores["AP@0.75"] == 1.0


def test_thicker_slices_are_means_and_cover_as_much() -> None:
    image = torch.arange(7 * 4 * 5.0).view(1, 7, 4, 5)
    thick = averaged(Picture("x", image, image[0].long(), (1.0, 2.0, 3.0)), 3, axis=0)
    assert thick.spacing == (3.0, 2.0, 3.0)
    assert torch.equal(thick.image[0, 1], image[0, 3:6].mean(0))
    assert torch.equal(thick.labels[1], image[0, 3].long())  # of three that differ, the least
    two = torch.tensor([0, 1, 1, 1, 2, 2, 2, 1]).view(8, 1)
    assert averaged(Picture("x", two[None].float(), two, (1.0, 1.0)), 4, axis=0).labels.flatten().tolist() == [1, 2]


def test_resampling_keeps_the_extent() -> None:
    other = resampled(Picture("x", torch.randn(1, 60, 30), torch.zeros(60, 30), (0.5, 1.0)), (1.0, 1.0))
    assert other.image.shape == (1, 30, 30)
    assert other.spacing == (1.0, 1.0)


def test_a_zoom_keeps_the_extent_and_its_labels_in_place() -> None:
    labels = (torch.arange(60).view(1, 60, 1) // 20).expand(2, 60, 60)
    other = resized(Batch(labels[:, None].float(), labels, (0.1, 0.2)), 30)
    assert other.images.shape == (2, 1, 30, 30)
    assert other.spacing == (0.2, 0.4)
    assert torch.equal(other.labels, labels[:, ::2, ::2])
    assert (other.images[:, 0] - other.labels).abs().max() < 0.6


def test_a_threshold_finds_what_is_bright() -> None:
    image = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1) + 3 * torch.eye(8)
    assert torch.equal(Otsu()(image, (1.0, 1.0)).argmax(1), torch.eye(8).long().expand(2, 8, 8))


def test_labels_move_with_their_image() -> None:
    labels = torch.arange(3 * 16 * 16).view(3, 16, 16)[0]
    image = labels[None].float()
    for seed in range(8):
        varied, moved = vary(image, labels, (1.0, 1.0), np.random.default_rng(seed))
        order = torch.argsort(moved.flatten())
        values = varied.flatten()[order]
        assert (values[1:] > values[:-1]).all()


def test_segments_are_scored_as_one_would_by_hand() -> None:
    real = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    assert segment_scores(real + 5, real) == (1.0, 0.0)
    # One segment of all: half of it is right, and either half spills into the other.
    assert segment_scores(np.zeros_like(real), real) == (0.5, 1.0)
    segments = np.array([[0, 0, 0, 1], [0, 0, 0, 1]])  # 4 + 2 of the first segment
    assert segment_scores(segments, real) == (0.75, 0.5)


@pytest.mark.parametrize("method", [*NETWORKS, *POSITIONS, *PHYSICAL, *RESAMPLED])
@pytest.mark.parametrize("dims", [2, 3])
def test_methods_give_logits_of_any_size_and_equal_numbers_of_parameters(method: str, dims: int) -> None:
    network = {**NETWORKS, **POSITIONS, **PHYSICAL, **RESAMPLED}[method](dims, (0.5,) * dims)
    size = (20, 17, 11)[-dims:]
    assert network(torch.randn(1, 1, *size), (0.7,) * dims).shape == (1, 3, *size)
    parameters = sum(p.numel() for p in network.parameters())
    middle = {2: 430_000, 3: 567_000}[dims]
    assert abs(parameters / middle - 1) < 0.15, parameters


def test_networks_that_resample_see_one_spacing() -> None:
    seen = []

    class Network(torch.nn.Module):
        def forward(self, image: torch.Tensor, spacing: tuple[float, ...]) -> torch.Tensor:
            seen.append((*image.shape[2:], *spacing))
            return image

    image = torch.linspace(0, 1, 40)[None, None, :, None].repeat(1, 1, 1, 20)
    logits = Resampled(Network(), (1.0, 1.0))(image, (0.5, 2.0))
    assert seen == [(20, 40, 1.0, 1.0)]
    assert logits.shape == image.shape
    assert (logits - image).abs().max() < 0.03


@pytest.mark.parametrize("size", [3, 4])
def test_taps_stay_where_they_are(size: int) -> None:
    """On what varies linearly, which interpolation knows, a kernel gives the same whatever the pixels measure."""
    kernel = torch.randn(1, 1, size, 1)
    places = torch.arange(24.0) - 11.5
    wanted = (kernel[0, 0, :, 0] * (torch.arange(size) - (size - 1) / 2)).sum()  # where the kernel's centre is 0
    for factor in (1.0, 1.5, 4.0):
        got = F.conv2d(factor * places[None, None, :, None], drawn_together(kernel, (factor, 1.0)))[0, 0, :, 0]
        centres = factor * (torch.arange(len(got)) - (len(got) - 1) / 2)
        torch.testing.assert_close(got, wanted + kernel.sum() * centres)
    assert torch.equal(drawn_together(kernel, (1.0, 1.0)), kernel)


def test_learned_wave_vectors_drift_and_fixed_ones_do_not() -> None:
    from networks import ours

    for method, options in FREQUENCIES.items():
        network = ours(2, (1.0, 1.0), **options)
        before = wave_vectors(network)
        assert before
        assert drift(network, before) == 0
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.1)
        moved = drift(network, before)
        assert moved == 0 if "fixed" in method else abs(moved - 0.1) < 1e-5


def test_every_experiment_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (masks, spacing):
        monkeypatch.setattr(module, "TESTED", 1)
    wanted = {
        "masks": ("touching cells", "grouping, native masks"),
        "spacing": ("radii, mixed", "RoPE by index"),
        "frequencies": ("radii, mixed", "uniform, learned"),
    }
    for name, (data, method) in wanted.items():
        run = Run(name, data, method, 0, 2)
        assert run in program.EXPERIMENTS[name].runs(2)
        result = program.EXPERIMENTS[name].do(run, None)
        shown = result.pop("shown", None)
        assert (shown is None) == (name != "masks")
        assert all(0 <= value <= 100 for value in json.loads(json.dumps(result))["scores"].values())


def test_other_numbers_of_steps_are_not_evidence(tmp_path: Path) -> None:
    real, trial = program.EXPERIMENTS["masks"].runs()[0], program.EXPERIMENTS["masks"].runs(2)[0]
    for run, score in ((real, 60.0), (trial, 10.0)):
        write(tmp_path, run, {"scores": {"mIoU": score}})
    results = evidence.recorded(tmp_path)
    assert tables.of_score(results, "masks", real.data, real.method, "mIoU") == [60.0]


def test_pages_have_every_block_and_it_is_what_the_results_give() -> None:
    results = evidence.recorded()
    for name, blocks in evidence.BLOCKS.items():
        page = (evidence.PAGES / f"{name}.md").read_text()
        assert blocks_of(page) == set(blocks)
        assert evidence.render(name, results) == page


def test_tables_say_what_results_hold() -> None:
    rows = {
        Run("masks", "nuclei", method, seed, 1): {"scores": {"mIoU": value + seed}}
        for method, value in (("grouping, native masks", 50.0), ("uniform twin, bilinear", 48.0))
        for seed in (0, 2)
    }
    results = tables.by_method(rows)
    table = tables.scores(results, "masks", "nuclei", ("mIoU",))
    assert "| grouping, native masks | 51.0 ± 1.4 | 2 |" in table
    assert "| nuclei | +2.0 ± 0.0 |  |  |" in tables.differences(results)


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path: Path) -> None:
    results = evidence.recorded()
    evidence.draw(results, tmp_path)
    for name in ("predictions", "segments", "spacing"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert (evidence.PAGES / f"{name}.png").exists()
