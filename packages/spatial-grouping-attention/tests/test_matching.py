"""The set matching loss: the best of all pairings, finite everywhere, and blind to order and padding."""

import itertools
import math
import sys

import pytest
import torch
from grouping_cases import assert_near
from model_cases import LARGER, SIZES, image_of, make, padded
from spatial_grouping_attention.models import GroupingViT, MatchingLosses, Objects, SetMatchingLoss, objects_of
from spatial_grouping_attention.models import matching as module
from torch import Tensor

SIZE = (13, 10)
ALL = 10_000


def instances_of(size: tuple[int, ...] = SIZE) -> Tensor:
    """Three objects in the first image, one in the second."""
    instances = torch.zeros(2, *size, dtype=torch.int32)
    instances[0, :5, :4], instances[0, 7:12, 1:6], instances[0, 2:9, 7:] = 7, 2, 5
    instances[1, 3:9, 3:8] = 1
    return instances


def network(**options: object) -> GroupingViT:
    return make(head="panoptic", **{"num_candidates": ALL, **options})


def test_objects_are_what_the_map_says() -> None:
    instances = instances_of()
    kinds = (instances > 2).long()
    kinds[0, 7, 1:6] = 3  # a fifth of an object
    first, second = objects_of(instances, kinds)
    assert first.labels.tolist() == [0, 1, 1]
    for mask, number in zip(first.masks, (2, 5, 7), strict=True):
        assert torch.equal(mask, instances[0] == number)
    assert second.labels.tolist() == [0]
    nothing = objects_of(torch.zeros(1, 4, 5, 6, dtype=torch.uint8), 1)[0]
    assert nothing.labels.shape == (0,)
    assert nothing.labels.dtype == torch.int64
    assert nothing.masks.shape == (0, 4, 5, 6)
    assert nothing.masks.dtype == torch.bool
    assert objects_of(instances, 2)[0].labels.tolist() == [2, 2, 2]


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (5, 3), (3, 5), (2, 1), (3, 0), (0, 2)])
def test_a_match_is_the_best_of_all_pairings(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    for _ in range(5):
        cost = torch.randn(rows, columns, generator=generator)
        one, other = module.match(cost)
        few = min(rows, columns)
        assert len(set(one.tolist())) == len(set(other.tolist())) == few
        best = min(
            sum(float(cost[r, c]) for r, c in zip(some, others, strict=True))
            for some in itertools.combinations(range(rows), few)
            for others in itertools.permutations(range(columns), few)
        )
        assert float(cost[one, other].sum()) == pytest.approx(best, abs=1e-6)


def plain_loss(loss: SetMatchingLoss, classes: Tensor, masks: Tensor, image: Objects) -> list[Tensor]:
    """Of one image and the pairing that is cheapest, term by term from the memberships themselves."""
    members, count = masks.exp().flatten(1), len(image.labels)
    found = []
    for pairing in itertools.permutations(range(len(classes)), count):
        cost, entropy, dice = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        wanted = torch.full((len(classes),), loss.num_classes)
        for i, j in enumerate(pairing):
            p, t = members[j], image.masks[i].flatten().double()
            cost = cost - loss.class_weight * classes[j].softmax(0)[image.labels[i]]
            entropy = entropy - (t * p.log() + (1 - t) * (1 - p).log()).mean()
            dice = dice + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
            wanted[j] = image.labels[i]
        weights = torch.tensor([1.0] * loss.num_classes + [loss.no_object_weight], dtype=classes.dtype)
        classed = loss.class_weight * torch.nn.functional.cross_entropy(classes, wanted, weights)
        terms = [classed, loss.mask_weight * entropy / count, loss.dice_weight * dice / count]
        found.append((float(cost + loss.dice_weight * dice), terms))
    return min(found, key=lambda entry: entry[0])[1]


def test_the_loss_is_that_of_the_cheapest_pairing() -> None:
    model = network(num_candidates=5)
    loss = SetMatchingLoss(3, class_weight=1.5, mask_weight=4.0, dice_weight=3.0, no_object_weight=0.2)
    for i, target in enumerate(objects_of(instances_of(), 1)):
        output = model(image_of(SIZE)[i : i + 1]).detach()
        losses = loss(output, [target])
        want = plain_loss(loss, output.class_logits[0], output.mask_logits[0], target)
        assert_near(torch.stack([losses.classes.double(), losses.masks, losses.dice]), torch.stack(want), 1e-6)
        assert_near(losses.total, sum(losses[1:]).double(), 1e-6)


def gradients(model: GroupingViT, losses: MatchingLosses) -> dict[str, Tensor]:
    model.zero_grad()
    losses.total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_order_of_objects_and_candidates_changes_nothing() -> None:
    model, loss = network(), SetMatchingLoss(3)
    labels = torch.arange(7) % 3
    targets = objects_of(instances_of(), labels[instances_of().long() % 7])
    output = model(image_of(SIZE))
    want = loss(output, targets)
    turned = [(labels.flip(0), masks.flip(0)) for labels, masks in targets]
    assert_near(loss(output, turned).total, want.total, 1e-6)
    grads = gradients(model, want)
    output = model(image_of(SIZE))
    output.candidates, output.class_logits = output.candidates.flip(1), output.class_logits.flip(1)
    shuffled = loss(output, targets)
    assert_near(shuffled.total, want.total, 1e-6)
    for name, gradient in gradients(model, shuffled).items():
        assert_near(gradient, grads[name], 1e-5, name)


def test_a_batch_that_processes_share_out_has_the_losses_of_the_whole() -> None:
    """Each process has one image, of as many objects as the other's by no means, and adds the other's sums."""
    model, images, targets = network(), image_of(SIZE), objects_of(instances_of(), 1)
    want = SetMatchingLoss(3)(model(images), targets)
    grads = gradients(model, want)
    sums: list[Tensor] = []
    for i in (0, 1):
        SetMatchingLoss(3, reduce=lambda t: sums.append(t.detach()) or t)(model(images[i : i + 1]), [targets[i]])
    shares = []
    for i in (0, 1):
        loss = SetMatchingLoss(3, reduce=lambda t, other=sums[1 - i]: t + other)
        losses = loss(model(images[i : i + 1]), [targets[i]])
        for got, wanted in zip(losses, want, strict=True):
            assert_near(got, wanted, 1e-10)
        shares.append(gradients(model, losses))
    for name, gradient in grads.items():
        assert_near(sum(share[name] for share in shares), gradient, 1e-8, name)
    with pytest.raises(TypeError, match="reduce must be a function of a tensor, or None; got 2"):
        SetMatchingLoss(3, reduce=2)


def test_padding_counts_for_nothing() -> None:
    model, loss = network(), SetMatchingLoss(3)
    targets = objects_of(instances_of(), 1)
    want = loss(model(image_of(SIZE)), targets)
    grads = gradients(model, want)
    wide, valid = padded(image_of(SIZE), (19, 17), math.nan)
    instances = torch.zeros(2, 19, 17, dtype=torch.int32)
    instances[:, :13, :10] = instances_of()
    # Neither an object that lies in the padding alone nor one's part there.
    instances[0, 15:, 2:9], instances[1, 13:, 4:] = 9, 1
    losses = loss(model(wide, valid=valid), objects_of(instances, 1))
    for got, wanted in zip(losses, want, strict=True):
        assert_near(got, wanted, 1e-6)
    for name, gradient in gradients(model, losses).items():
        assert_near(gradient, grads[name], 1e-5, name)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("what", ["objects", "one image without", "none", "no pixel", "more than candidates"])
def test_losses_and_gradients_are_finite(what: str, autocast: bool) -> None:
    model = network(dtype=torch.float32, num_candidates=2 if what == "more than candidates" else ALL)
    instances, valid = instances_of(), None
    if what in ("one image without", "none"):
        instances[: 1 if what == "one image without" else 2] = 0
    if what == "no pixel":
        valid = torch.zeros(2, *SIZE, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = SetMatchingLoss(3)(model(image_of(SIZE).float(), valid=valid), objects_of(instances, 1))
    assert all(term.isfinite() for term in losses)
    assert bool(losses.masks == 0) == bool(losses.dice == 0) == (what in ("none", "no pixel"))
    for name, gradient in gradients(model, losses).items():
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("member", [0.0, 1e-30, 0.5, 1.0])
def test_logarithms_near_zero_and_one_are_stable(member: float) -> None:
    log_member = (torch.full((1, 1, 4), member) + 1e-12).log().requires_grad_()
    for mask in (torch.zeros(1, 1, 4, dtype=torch.bool), torch.ones(1, 1, 4, dtype=torch.bool)):
        losses = module.mask_losses(log_member, mask, torch.ones(1, 4, dtype=torch.bool))
        (gradient,) = torch.autograd.grad(sum(losses).sum(), log_member)
        assert all(loss.isfinite().all() for loss in losses)
        assert gradient.isfinite().all()
    members = torch.linspace(0.01, 0.99, 9)
    assert_near(module.log_complement(members.log()), torch.log1p(-members), 1e-5)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_overlaps_are_sums_over_masks(ndim: int) -> None:
    model = make(ndim, head="panoptic", num_candidates=ALL, stem_stride=3)
    wide, valid = padded(image_of(SIZES[ndim]), LARGER[ndim], math.nan)
    output = model(wide, valid=valid)
    masks = (torch.rand(2, 4, *LARGER[ndim]) > 0.5) & valid.unsqueeze(1)
    inside, mass = module.overlaps(output, masks.flatten(2))
    every = torch.arange(inside.shape[1]).expand(2, -1)
    members = output.masks_of(every).exp().flatten(2)
    assert_near(inside, members @ masks.flatten(2).double().mT, 1e-8)
    assert_near(mass, (members * valid.flatten(1).unsqueeze(1)).sum(2), 1e-8)


def test_a_perfect_prediction_costs_next_to_nothing() -> None:
    """Objects drawn after the prediction: hard memberships, and classes that are certain."""
    model = network(num_candidates=4, stem_stride=1, compactness=None, num_heads=(1, 1, 1))
    output = model(image_of(SIZE))
    with torch.no_grad():
        for assignment in output.assignments:
            assignment.q.mul_(1e4)
    share, hard = output.mask_logits.max(1)
    instances = (1 + hard).where((hard < 3) & (share > -0.1), 0)
    output.class_logits = 30 * torch.nn.functional.one_hot(torch.tensor([[1, 1, 1, 3]] * 2), 4).double()
    assert all(len(instances[i].unique()) == 4 for i in range(2))
    losses = SetMatchingLoss(3)(output, objects_of(instances, 1))
    assert losses.total < 0.05
    output.class_logits = output.class_logits.flip(1)
    assert SetMatchingLoss(3)(output, objects_of(instances, 1)).total > 1


def test_without_scipy_the_error_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"needs scipy: pip install 'spatial-grouping-attention\[matching\]'"):
        SetMatchingLoss(3)(network()(image_of(SIZE)), objects_of(instances_of(), 1))


def test_a_network_that_diverged_is_told_so() -> None:
    output = network()(image_of(SIZE))
    output.class_logits = output.class_logits * math.nan
    with pytest.raises(ValueError, match=r"candidates must have finite classes and masks; got .* diverged"):
        SetMatchingLoss(3)(output, objects_of(instances_of(), 1))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1; got 0"),
        ({"mask_weight": -1.0}, ValueError, r"mask_weight must be in \[0, 3.40282e\+38\]; got -1"),
        ({"dice_weight": "1"}, TypeError, "dice_weight must be a real number; got '1'"),
    ],
)
def test_wrong_settings_are_refused(keywords: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SetMatchingLoss(**{"num_classes": 3, **keywords})


def test_wrong_targets_are_refused() -> None:
    loss, output = SetMatchingLoss(3), network()(image_of(SIZE))
    one, mask = torch.ones(1, dtype=torch.long), torch.ones(1, *SIZE, dtype=torch.bool)
    for targets, error, message in [
        ([(one, mask)], ValueError, "targets must have one entry per image, 2; got 1"),
        ([(one, mask), (one.float(), mask)], TypeError, r"labels of targets.1. must hold integers; got torch.float32"),
        ([(one, mask.float()), (one, mask)], TypeError, r"masks of targets.0. must be boolean; got torch.float32"),
        ([(one, mask[:, 1:]), (one, mask)], ValueError, r"masks of targets.0. must have shape .1, 13, 10.; got"),
        ([(one, mask), (3 * one, mask)], ValueError, r"labels of targets.1. must be in .0, 3.; got .3."),
        ([(one[None], mask), (one, mask)], ValueError, r"labels of targets.0. must have shape .n.; got .1, 1."),
    ]:
        with pytest.raises(error, match=message):
            loss(output, targets)
    with pytest.raises(ValueError, match="output must come from a network with num_candidates; got one without"):
        loss(make()(image_of(SIZE)), [(one, mask)] * 2)


def test_wrong_maps_are_refused() -> None:
    with pytest.raises(TypeError, match=r"instances must hold integers; got torch.float32"):
        objects_of(torch.zeros(1, 3, 3), 1)
    with pytest.raises(TypeError, match=r"classes must hold integers; got torch.bool"):
        objects_of(torch.zeros(1, 3, 3, dtype=torch.long), torch.zeros(1, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"classes must have shape .1, 3, 3.; got .3, 3."):
        objects_of(torch.zeros(1, 3, 3, dtype=torch.long), torch.zeros(3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="classes must be at least 0; got -1"):
        objects_of(torch.zeros(1, 3, 3, dtype=torch.long), -1)
