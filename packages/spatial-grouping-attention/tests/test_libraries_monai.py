"""Networks beside MONAI: spacing from a MetaTensor's affine, windows over large images, its losses and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from library_cases import beside_torchvision, images, nano
from spatial_grouping_attention.models.affine import SpacingFromAffine, common_spacing, spacing_of
from torch import Tensor, nn

# Libraries warn of matters of their own. They are imported where they are used: elsewhere they are not installed.
pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore")]
OBLIQUE = torch.tensor([[0.0, 0.6, 0.0, 9.0], [-0.5, 0.0, 0.0, -3.0], [0.0, 0.8, 2.0, 4.0], [0.0, 0.0, 0.0, 1.0]])
"""Axes swapped, mirrored and tilted: spacing 0.5, 1, 2."""


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    beside_torchvision("monai")


def scan(*affines: Tensor, size: tuple[int, ...] = (9, 12, 6)) -> Any:
    """A batch as MONAI's loaders make it."""
    from monai.data import MetaTensor, list_data_collate

    return list_data_collate([MetaTensor(images(1, *size, seed=i), affine=a) for i, a in enumerate(affines)])


def scaled(*factors: float) -> Tensor:
    return torch.diag(torch.tensor([*factors, 1.0]))


def test_spacing_is_the_length_of_the_steps() -> None:
    from monai.data import MetaTensor

    batch = scan(OBLIQUE, scaled(3.0, 1.0, 1.0))
    torch.testing.assert_close(spacing_of(batch), torch.tensor([[0.5, 1.0, 2.0], [3.0, 1.0, 1.0]]).double())
    one = MetaTensor(images(2, 1, 9, 12, 6), affine=OBLIQUE)
    torch.testing.assert_close(spacing_of(one), torch.tensor([0.5, 1.0, 2.0]).double())
    # A slice of a volume keeps a matrix for three axes, and its own may be tilted out of the first two.
    slice_of_it = MetaTensor(images(2, 1, 9, 12), affine=OBLIQUE)
    torch.testing.assert_close(spacing_of(slice_of_it), torch.tensor([0.5, 1.0]).double())
    torch.testing.assert_close(common_spacing(scan(OBLIQUE, OBLIQUE)), torch.tensor([0.5, 1.0, 2.0]).double())
    with pytest.raises(ValueError, match="images of one batch must have the same spacing"):
        common_spacing(batch)
    with pytest.raises(ValueError, match="for at least 3 axes; got shape"):
        spacing_of(MetaTensor(images(1, 1, 4, 4, 4), affine=torch.eye(3)))


def test_the_network_sees_the_spacing_of_every_image() -> None:
    network = nano(3).eval()
    model, batch = SpacingFromAffine(network), scan(OBLIQUE, scaled(3.0, 1.0, 1.0))
    with torch.no_grad():
        logits = model(batch)
        want = network(batch.as_tensor(), torch.tensor([[0.5, 1.0, 2.0], [3.0, 1.0, 1.0]])).logits
        assert not torch.allclose(want, network(batch.as_tensor()).logits, atol=1e-3)
        torch.testing.assert_close(logits.as_tensor(), want)
        given = model(batch.as_tensor(), spacing=spacing_of(batch))
    assert type(given) is Tensor
    torch.testing.assert_close(given, want)
    assert type(logits) is type(batch)
    torch.testing.assert_close(logits.affine, batch.affine)
    with pytest.raises(ValueError, match="image must carry an affine matrix where no spacing is given"):
        model(batch.as_tensor())


def test_validity_and_gradients_pass() -> None:
    network = nano(3)
    model, batch = SpacingFromAffine(network), scan(OBLIQUE)
    valid = torch.ones(1, 9, 12, 6, dtype=torch.bool)
    valid[:, 7:] = False
    logits = model(batch, valid=valid)
    torch.testing.assert_close(logits.as_tensor(), network(batch.as_tensor(), (0.5, 1.0, 2.0), valid).logits)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_files_bring_their_spacing_along(tmp_path: Path) -> None:
    import nibabel
    from monai.data import DataLoader, Dataset
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, RandFlipd, SpatialPadd

    affine = torch.tensor([[-0.7, 0, 0, 3], [0, 0, 0.9, 1], [0, 2.5, 0, 2], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(images(9, 6, 12).numpy(), affine.numpy()), tmp_path / "scan.nii.gz")
    transforms = [
        LoadImaged("image"),
        EnsureChannelFirstd("image"),
        Orientationd("image", axcodes="RAS", labels=None),
        RandFlipd("image", prob=1.0, spatial_axis=0),
        SpatialPadd("image", (12, 16, 8)),
    ]
    dataset = Dataset([{"image": str(tmp_path / "scan.nii.gz")}] * 2, Compose(transforms))
    (batch,) = DataLoader(dataset, batch_size=2)
    # The axes were put into the order of space: y is the file's third axis.
    torch.testing.assert_close(
        spacing_of(batch["image"]), torch.tensor([[0.7, 0.9, 2.5]] * 2).double(), rtol=1e-6, atol=0
    )
    assert SpacingFromAffine(nano(3).eval())(batch["image"]).shape == (2, 3, 12, 16, 8)


class Seen(nn.Module):
    """A network that writes down what it was given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, []

    def forward(self, image: Tensor, spacing: Any = None, valid: Tensor | None = None) -> Any:
        self.calls.append((tuple(image.shape), spacing))
        return self.network(image, spacing, valid)


def test_windows_keep_the_spacing_of_the_image() -> None:
    from monai.inferers import SlidingWindowInferer

    batch = scan(OBLIQUE, OBLIQUE)
    seen = Seen(nano(3).eval())
    model, inferer = SpacingFromAffine(seen), SlidingWindowInferer((8, 8, 6), sw_batch_size=3, overlap=0.5)
    with torch.no_grad(), pytest.raises(ValueError, match="spacing=common_spacing"):
        inferer(batch, model)
    with torch.no_grad():
        logits = inferer(batch, model, spacing=common_spacing(batch))
    assert logits.shape == (2, 3, 9, 12, 6)
    assert type(logits) is type(batch)
    assert len(seen.calls) > 2
    for shape, spacing in seen.calls:
        assert shape[2:] == (8, 8, 6)
        torch.testing.assert_close(spacing, torch.tensor([0.5, 1.0, 2.0]).double())


def test_windows_that_cover_the_image_give_what_the_image_gives() -> None:
    from monai.inferers import SlidingWindowInferer

    batch = scan(OBLIQUE, size=(8, 8, 6))
    model = SpacingFromAffine(nano(3).eval())
    with torch.no_grad():
        for roi in ((8, 8, 6), (-1, -1, -1)):
            got = SlidingWindowInferer(roi)(batch, model, spacing=common_spacing(batch))
            torch.testing.assert_close(got.as_tensor(), model(batch).as_tensor())


def test_windows_agree_with_the_whole_image_away_from_their_borders() -> None:
    """For a network of limited reach: patches alone, no block in the last, global stage, no norm over the image."""
    from monai.inferers import SlidingWindowInferer

    local = {"stem": "patch", "depths": (1, 1, 0), "window": 3, "head": "native"}
    model = SpacingFromAffine(nano(**local).eval())
    batch = scan(scaled(0.5, 0.8, 1.0), size=(64, 320))
    with torch.no_grad():
        whole = model(batch).as_tensor()
        # Windows start where groups do: a multiple of the pixels between the last groups.
        inferer = SlidingWindowInferer((64, 192), overlap=1 / 3, mode="constant")
        windows = inferer(batch, model, spacing=common_spacing(batch)).as_tensor()
    # The windows begin at 0 and 128; what is near an inner border differs, as it would in any network.
    reach = reach_of(model, (64, 192))
    inner = [slice(0, 128 - reach), slice(192 + reach, 320)]
    for part in inner:
        assert part.stop - part.start >= 32
        torch.testing.assert_close(windows[..., part], whole[..., part], rtol=1e-3, atol=1e-4)
    assert (windows - whole).abs().max() > 1e-3


def reach_of(model: nn.Module, size: tuple[int, int]) -> int:
    """How far along the last axis a pixel's change is felt."""
    image = images(1, 1, *size)
    changed = image.clone()
    middle = size[1] // 2
    changed[..., middle] += 1.0
    with torch.no_grad():
        felt = (model(changed, 1.0) - model(image, 1.0)).abs().amax((0, 1, 2)).nonzero().flatten()
    reach = int((felt - middle).abs().max())
    assert reach < middle - 1, "the network sees the whole window"
    return reach


def test_losses_and_metrics_take_the_logits() -> None:
    from monai.losses import DiceCELoss
    from monai.metrics import DiceMetric
    from monai.networks import one_hot

    model, batch = SpacingFromAffine(nano(3)), scan(OBLIQUE, scaled(1.0, 1.0, 2.0))
    labels = torch.randint(0, 3, (2, 1, 9, 12, 6), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loss_of, losses = DiceCELoss(softmax=True, to_onehot_y=True), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(model(batch), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    metric = DiceMetric()
    predicted = one_hot(model(batch).argmax(1, keepdim=True), 3)
    metric(predicted, one_hot(labels, 3))
    assert 0.0 < metric.aggregate().item() < 1.0
