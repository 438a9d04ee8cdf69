"""Losses, the optimiser's parts, settings, tiles, pictures and tables."""

import csv
import json
import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from segmentation.loop import NEVER_DECAYED, moving_average, parameter_groups, warm_up_and_cosine
from segmentation.losses import semantic_losses
from segmentation.pairs import Sample
from segmentation.pictures import window
from segmentation.prediction import GroupUse, Predictor, add_use, group_labels
from segmentation.records import flat, write_history
from segmentation.settings import Settings, SettingsError, build_network, complete, differences
from segmentation.stopping import Stopped, StopRequest
from torch import nn

pytestmark = pytest.mark.training

SETTINGS = Settings(
    task="semantic", preset="nano", spatial_dims=2, in_channels=1, num_classes=3, num_candidates=100,
    spacing=(0.5, 0.5), crop=(32, 32), learning_rate=1e-3, batch=2,
)  # fmt: skip


def sample(size, spacing, labels=None):
    image = np.random.default_rng(0).normal(size=(1, *size)).astype(np.float32)
    return Sample("a", image, np.zeros(size, np.int32) if labels is None else labels, spacing)


class TestLosses:
    def losses(self, logits, labels, valid):
        return semantic_losses(SimpleNamespace(logits=logits), labels, valid, lambda sums: sums)

    def test_what_is_not_valid_does_not_matter(self):
        labels = torch.randint(3, (2, 6, 5))
        valid = torch.rand(2, 6, 5) > 0.4
        logits = torch.randn(2, 3, 6, 5, requires_grad=True)
        losses = self.losses(logits, labels, valid)
        other = torch.where(valid[:, None], logits, 100 * torch.randn_like(logits))
        assert self.losses(other, labels.where(valid, 2), valid) == losses
        losses["total"].backward()
        assert not logits.grad.movedim(1, -1)[~valid].any()
        assert logits.grad.movedim(1, -1)[valid].any(-1).all()

    def test_right_logits_cost_nothing_and_wrong_ones_much(self):
        labels = torch.randint(3, (2, 6, 5))
        right = 50.0 * nn.functional.one_hot(labels, 3).movedim(-1, 1)
        everywhere = torch.ones_like(labels, dtype=torch.bool)
        assert self.losses(right, labels, everywhere)["total"] < 1e-5
        assert self.losses(-right, labels, everywhere)["dice"] > 0.9

    def test_dice_by_hand(self):
        labels = torch.tensor([[[0, 1]], [[1, 1]]])
        logits = torch.zeros(2, 2, 1, 2)  # probabilities of a half
        losses = self.losses(logits, labels, torch.ones_like(labels, dtype=torch.bool))
        expected = np.mean([1 - 2 * 0.5 / (1 + 2), 1 - 2 * 1.5 / (3 + 2)])
        assert losses["dice"].item() == pytest.approx(expected, abs=1e-4)
        assert losses["cross-entropy"].item() == pytest.approx(math.log(2))


class TestOptimiser:
    def test_decay_is_for_matrices_alone(self):
        network = build_network(SETTINGS)
        groups = parameter_groups(network, 1e-3, 0.1)
        assert [group["weight_decay"] for group in groups] == [0.1] + [0.0] * (len(groups) - 1)
        decayed, *kept = (set(map(id, group["params"])) for group in groups)
        assert len(decayed) + sum(map(len, kept)) == len(decayed.union(*kept)) == len(list(network.parameters()))
        for name, parameter in network.named_parameters():
            last = name.rpartition(".")[2]
            assert (id(parameter) in decayed) == (last == "weight" and "norm" not in name), name
            assert last in ("weight", "bias", "freqs", *NEVER_DECAYED), f"{name}: does it decay?"

    def test_wave_vectors_have_rates_of_their_own(self):
        network = build_network(SETTINGS)
        _, _, *waves = parameter_groups(network, 1e-3, 0.1)
        freqs = {id(p) for name, p in network.named_parameters() if name.endswith("freqs")}
        assert {id(p) for group in waves for p in group["params"]} == freqs
        assert len(freqs) > 1
        assert len({group["lr"] for group in waves}) > 1

    def test_rate_rises_then_falls_to_nothing(self):
        optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.5)
        schedule = warm_up_and_cosine(optimiser, 100, 0.1)
        rates = []
        for _ in range(100):
            rates.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            schedule.step()
        assert rates[0] == pytest.approx(0.005)
        assert rates[10] == max(rates) == 0.5
        assert rates[:11] == sorted(rates[:11])
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 1e-3

    def test_average_forgets_the_first_weights_soon_and_later_ones_slowly(self):
        average = moving_average(0.99)
        for count, kept in ((1, 2 / 11), (10**6, 0.99)):
            mean = torch.ones(1)
            average([mean], [torch.zeros(1)], torch.tensor(count))
            assert mean.item() == pytest.approx(kept)


class TestSettings:
    def test_plain_data_and_back(self):
        assert Settings.from_data(SETTINGS.as_data()) == SETTINGS
        with pytest.raises(SettingsError, match=r"settings must be .*'batch'.*; got \['epochs'\]"):
            Settings.from_data({"epochs": 3})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"task": "panoptic"}, "task must be one of semantic, instances; got panoptic"),
            ({"preset": "huge"}, "preset must be one of nano, tiny, base, large; got huge"),
            ({"batch": 0}, "batch must be at least 1; got 0"),
            ({"num_classes": 1}, "num_classes must be at least 2; got 1"),
            ({"spacing": (1.0,)}, "spacing must be 2 positive numbers"),
            ({"spacing": (1.0, math.nan)}, "spacing must be 2 positive numbers"),
            ({"crop": (32, 32, 32)}, "crop must be 2 numbers of pixels"),
            ({"crop": (8, 8)}, "the largest at least 16"),
            ({"learning_rate": 0.0}, "learning_rate must be positive; got 0.0"),
            ({"validation": 1.0}, "validation must be between 0 and 1; got 1.0"),
        ],
    )
    def test_values_out_of_range(self, change, message):
        with pytest.raises(SettingsError, match=message):
            replace(SETTINGS, **change)

    def test_crops_are_as_long_in_every_direction_and_not_longer_than_images(self):
        samples = [sample((20, 200, 200), (2.0, 0.5, 0.5)), sample((24, 200, 30), (2.0, 0.5, 0.5))]
        settings = complete({}, samples)
        assert settings.crop == (12, 48, 48)
        assert settings.spacing == (2.0, 0.5, 0.5)
        assert complete({}, samples[1:]).crop == (12, 48, 30)
        assert complete({"crop": (4, 16, 16), "epochs": 3}, samples).crop == (4, 16, 16)

    def test_coarse_axes_wait_in_the_network(self):
        anisotropic = replace(SETTINGS, spatial_dims=3, spacing=(5.0, 0.5, 0.5), crop=(8, 32, 32))
        volume = torch.randn(1, 1, 4, 16, 16)
        with torch.no_grad():
            grids = build_network(anisotropic)(volume).grids
            same = build_network(replace(anisotropic, spacing=(0.5,) * 3))(volume).grids
        assert [grid.shape[0] for grid in grids] == [4, 4, 4]
        assert same[-1].shape[0] < 4

    def test_instances_have_one_class_and_every_group_is_a_candidate(self):
        labels = np.arange(300, dtype=np.int32).reshape(15, 20)
        settings = complete({"task": "instances"}, [sample((15, 20), (1.0, 1.0), labels)] * 2)
        assert settings.num_classes == 2
        with torch.no_grad():
            output = build_network(settings)(torch.randn(1, 1, 96, 100))
        assert output.candidates.shape[1] == output.assignments[-1].num_groups

    def test_other_channels_than_in_the_checkpoint(self):
        with pytest.raises(SettingsError, match="images must have 3 channels; got 1"):
            complete({"in_channels": 3}, [sample((40, 40), (1.0, 1.0))])

    def test_differences_are_named(self):
        assert differences(SETTINGS, {"epochs": SETTINGS.epochs, "batch": 7}) == ["batch is 2 in the checkpoint; got 7"]


class PixelByPixel(nn.Module):
    """A network that looks at single pixels; so tiles must give what the whole gives."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image, spacing):
        logits = torch.cat([image, -image], 1) * self.scale * spacing[0]
        return SimpleNamespace(logits=logits, assignments=())


class TestPrediction:
    @pytest.mark.parametrize("size", [(40, 31), (9, 20, 17)])
    def test_tiles_give_what_the_whole_gives(self, size):
        image = np.random.default_rng(0).normal(size=(1, *size))
        spacing = (2.0, *[1.0] * (len(size) - 1))
        whole = Predictor(PixelByPixel(), "semantic", "float32", 10**6)(image, spacing)
        tiled = Predictor(PixelByPixel(), "semantic", "float32", 300)(image, spacing)
        assert whole.labels.shape == size
        assert np.array_equal(whole.labels, tiled.labels)
        assert 0 < whole.labels.mean() < 1

    def test_a_network_sees_all_tiles_and_counts_its_groups(self):
        network = build_network(SETTINGS)
        image = np.random.default_rng(0).normal(size=(1, 64, 40))
        whole = Predictor(network, "semantic", "float32", 10**6)(image, (0.5, 0.5))
        tiled = Predictor(network, "semantic", "float32", 40 * 40)(image, (0.5, 0.5))
        assert tiled.labels.shape == whole.labels.shape == (64, 40)
        assert len(tiled.use) == len(whole.use) == 2
        assert all(0 <= use.unused < use.groups for use in (*tiled.use, *whole.use))
        assert tiled.use[0].groups > whole.use[0].groups
        assert np.mean(tiled.labels == whole.labels) > 0.8

    def test_counts_add_up(self):
        one = [GroupUse(1, 10), GroupUse(2, 5)]
        assert add_use([], one) == add_use(one, []) == one
        assert add_use(one, one) == [GroupUse(2, 20), GroupUse(4, 10)]

    def test_every_pixel_has_a_group_and_segments_are_nested(self):
        network = build_network(SETTINGS).eval()
        with torch.no_grad():
            output = network(torch.randn(1, 1, 37, 30))
        fine, coarse = group_labels(output, (37, 30))
        assert fine.shape == coarse.shape == (37, 30)
        assert fine.min() >= 0
        for group in np.unique(fine):
            assert len(np.unique(coarse[fine == group])) == 1


class TestPictures:
    def test_window_shows_what_is_labelled(self):
        labels = np.zeros((600, 500), np.int32)
        labels[500:520, 20:30] = 1
        place, plane = window(labels)
        assert labels[place][plane].shape == (128, 128)
        assert labels[place][plane].sum() == labels.sum()

    def test_plane_of_a_volume_goes_through_what_is_labelled(self):
        labels = np.zeros((200, 40, 40), np.int32)
        labels[150:160] = 1
        place, plane = window(labels)
        assert labels[place][plane].shape == (40, 40)
        assert labels[place][plane].all()

    def test_nothing_labelled(self):
        place, plane = window(np.zeros((10, 12), np.int32))
        assert np.zeros((10, 12))[place][plane].shape == (10, 12)


def test_history_as_table_and_as_json(tmp_path):
    history = [{"epoch": 1, "loss": 0.1 + 0.2, "IoU per class": [0.5, math.nan]}]
    assert flat(history[0]).keys() == {"epoch", "loss", "IoU per class 0", "IoU per class 1"}
    write_history(tmp_path, history)
    (row,) = json.loads((tmp_path / "history.json").read_text())
    assert row == {"epoch": 1, "loss": 0.1 + 0.2, "IoU per class 0": 0.5, "IoU per class 1": None}
    with (tmp_path / "history.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert float(line["loss"]) == 0.1 + 0.2
    assert line["IoU per class 1"] == ""


def test_stopping_waits_for_a_good_place_and_a_second_time_does_not():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_stopping_under_torchrun_waits_every_time_and_for_any_process():
    with StopRequest(impatient=False) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            stop.check()
    with pytest.raises(Stopped):
        StopRequest(False, agreed=lambda asked: True).check()
    StopRequest(False, agreed=lambda asked: False).check()
