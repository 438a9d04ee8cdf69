"""Instance norm, whichever way images and gradients lie in memory."""

import pytest
import torch
from grouping_cases import assert_near
from model_cases import image_of, make
from spatial_grouping_attention.models.normalise import EPS, InstanceNorm
from torch import Tensor

GRIDS = [(7,), (6, 5), (4, 3, 5), (1, 1)]


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {"channels first": torch.Tensor.contiguous, "channels last": channels_last}


def plain(norm: InstanceNorm, x: Tensor) -> Tensor:
    axes = tuple(range(2, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    scaled = centred / (centred.square().mean(axes, keepdim=True) + EPS).sqrt()
    return scaled * norm.weight.view(-1, *[1] * len(axes)) + norm.bias.view(-1, *[1] * len(axes))


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("image", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_values_and_gradients(grid: tuple[int, ...], batch: int, image: str, gradient: str, valid: bool) -> None:
    torch.manual_seed(0)
    norm = InstanceNorm(8, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    x, arriving = torch.randn(2, batch, 8, *grid, dtype=torch.float64)
    results = []
    mask = torch.ones(batch, *grid, dtype=torch.bool) if valid else None
    for function in (lambda norm, x: norm(x, mask), plain):
        own = function is plain
        leaf = (x if own else LAYOUTS[image](x)).detach().requires_grad_()
        out = function(norm, leaf)
        came = arriving if own else LAYOUTS[gradient](arriving)
        results.append((out, *torch.autograd.grad(out, (leaf, norm.weight, norm.bias), came)))
    for got, want in zip(*results, strict=True):
        assert_near(got, want, 1e-12, size=1.0)  # of a single place, what is left of rounding is scaled by 316


@pytest.mark.parametrize(
    ("head", "downsample"),
    [("native", "group"), ("fused", "group"), ("fpn", "group"), ("bilinear", "conv"), ("fpn", "conv")],
)
def test_a_batch_of_one_has_the_gradients_that_it_has_in_a_batch_of_two(head: str, downsample: str) -> None:
    model = make(stem="conv", head=head, downsample=downsample)
    image, weights = image_of((13, 10), batch=1), torch.randn(3, 13, 10, dtype=torch.float64)
    gradients = []
    for batch in (1, 2):
        loss = (model(image.expand(batch, -1, -1, -1)).logits * weights).sum() / batch
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for one, two in zip(*gradients, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert_near(one, two, 1e-9)
