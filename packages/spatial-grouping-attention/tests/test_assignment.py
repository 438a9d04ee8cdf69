"""Memberships in use: carrying values up and down, labels, chains, usage and borders, against dense matrices."""

import itertools

import pytest
import torch
from assignment_cases import EVERY_VARIANT, chain, one, random
from grouping_cases import assert_near
from layer_cases import make_layer, tokens
from spatial_grouping_attention import Assignment, AttentionAssignment, Neighbourhood, compose
from spatial_grouping_attention.assignment.base import label_boundaries
from spatial_grouping_attention.backends import labelling
from spatial_grouping_attention.backends.deformable import labelling as labelling_of_points
from spatial_grouping_attention.backends.semantics import most_likely
from spatial_grouping_attention.backends.tiled import chunks
from torch.utils import _pytree as pytree


def test_rows_of_the_matrix_sum_to_one(assignment: Assignment) -> None:
    matrix = assignment.matrix()
    assert matrix.shape == (2, assignment.num_inputs, assignment.num_groups)
    assert (matrix >= 0).all()
    assert_near(matrix.sum(-1), torch.ones(matrix.shape[:2]), 1e-6)
    assert matrix.amax(-1).mean() > 1.2 / assignment.num_groups, "a uniform matrix would prove nothing"


def test_everything_is_the_matrix(assignment: Assignment) -> None:
    matrix = assignment.matrix()
    up, down = random(2, assignment.num_groups, 3), random(2, assignment.num_inputs, 3)
    mass = matrix.sum(1)[..., None]
    assert_near(assignment.upsample(up), matrix @ up, 1e-6)
    assert_near(assignment.sum(down), matrix.mT @ down, 1e-6)
    assert_near(assignment.pool(down), matrix.mT @ down / mass, 1e-6)
    assert_near(assignment.upsample(torch.ones_like(up)), torch.ones(2, assignment.num_inputs, 3), 1e-6)
    assert_near(assignment.pool(torch.ones_like(down)), torch.ones_like(up), 1e-6)


def test_up_and_down_are_adjoint(assignment: Assignment) -> None:
    up, down = random(2, assignment.num_groups, 4), random(2, assignment.num_inputs, 4)
    over_tokens = (assignment.upsample(up) * down).sum()
    over_groups = (up * assignment.sum(down)).sum()
    assert_near(over_tokens, over_groups, 1e-6)
    mass = assignment.sum(torch.ones_like(down))
    assert_near((up * mass * assignment.pool(down)).sum(), over_tokens, 1e-6)


def test_labels_are_the_argmax_of_the_matrix(assignment: Assignment) -> None:
    chosen = assignment.labels()
    assert chosen.dtype == torch.int64
    matrix = assignment.matrix()
    # Two groups can be equally likely up to rounding, so the label's share is compared, not its number.
    assert_near(matrix.gather(-1, chosen[..., None]).squeeze(-1), matrix.amax(-1), 1e-6)
    assert (chosen == matrix.argmax(-1)).double().mean() > 0.95
    assert not chosen.requires_grad


def test_labels_do_not_depend_on_how_the_work_is_cut(assignment: Assignment, monkeypatch: pytest.MonkeyPatch) -> None:
    want = assignment.labels()
    monkeypatch.setattr(labelling, "BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(labelling_of_points, "BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", {"cpu": 64})
    monkeypatch.setattr(chunks, "TOKENS_PER_AXIS", 2)
    assert torch.equal(assignment.labels(), want)


def test_usage_counts_members(assignment: Assignment) -> None:
    usage = assignment.usage()
    matrix = assignment.matrix()
    assert_near(usage.mass, matrix.sum(1), 1e-5)
    for sample, chosen in enumerate(assignment.labels()):
        assert usage.unused[sample] == assignment.num_groups - len(chosen.unique())


def test_boundaries_lie_on_both_sides_of_every_change(assignment: Assignment) -> None:
    borders = assignment.boundaries()
    assert borders.dtype == torch.bool
    assert borders.shape == (2, *assignment.input_shape)
    for chosen, marked in zip(assignment.labels().reshape(borders.shape), borders, strict=True):
        for index in itertools.product(*(range(n) for n in chosen.shape)):
            differs = False
            for axis, step in itertools.product(range(chosen.ndim), (-1, 1)):
                other = list(index)
                other[axis] += step
                if 0 <= other[axis] < chosen.shape[axis]:
                    differs |= bool(chosen[index] != chosen[tuple(other)])
            assert bool(marked[index]) == differs


def test_of_no_groups_none_is_the_most_likely() -> None:
    for device in ("cpu", "meta"):
        found = most_likely(torch.zeros(2, 3, 0, device=device))
        assert (found.shape, found.dtype, found.device.type) == ((2, 3), torch.long, device)
    assert most_likely(torch.zeros(2, 3, 0)).eq(-1).all()


def test_a_chain_is_the_product_of_its_stages() -> None:
    composed = chain()
    first, second, third = (stage.matrix() for stage in composed.stages)
    assert_near(composed.matrix(), first @ second @ third, 1e-9)
    assert composed.input_shape == (9, 14)
    assert composed.output_shape == composed.stages[-1].output_shape
    values = random(2, composed.num_groups, 2)
    by_stage = values
    for stage in reversed(composed.stages):
        by_stage = stage.upsample(by_stage)
    assert torch.equal(composed.upsample(values), by_stage)


def test_nested_labels_follow_the_most_likely_group_of_every_stage() -> None:
    composed = chain()
    first, second, third = (stage.labels() for stage in composed.stages)
    nested = composed.labels(nested=True)
    for sample in range(2):
        want = [third[sample, second[sample, label]].item() for label in first[sample]]
        assert nested[sample].tolist() == want
        for group in first[sample].unique():
            assert len(nested[sample][first[sample] == group].unique()) == 1, "what is together stays together"
    assert (nested != composed.labels()).any(), "else this tells nothing apart"
    chains = (compose([composed]), compose([compose(composed.stages[:2]), composed.stages[2]]),
              compose([composed.stages[0], compose(composed.stages[1:])]))  # fmt: skip
    for chain_of_chains in chains:
        assert torch.equal(chain_of_chains.labels(nested=True), nested)


def test_chains_that_do_not_fit_are_refused() -> None:
    first, second, third = chain().stages
    with pytest.raises(ValueError, match="assignments must hold at least one Assignment; got none"):
        compose([])
    with pytest.raises(TypeError, match=r"assignments\[1\] must be an Assignment; got Tensor"):
        compose([first, torch.ones(2, 2)])
    with pytest.raises(ValueError, match=r"stage 0 with groups \(5, 7\) for batch 2, stage 1 with tokens \(3, 4\)"):
        compose([first, third])
    with pytest.raises(ValueError, match="assignments must fit, the groups of each being the tokens of the next"):
        compose([second, first])
    halved = pytree.tree_map(lambda leaf: leaf if leaf is None else leaf[:1], second)
    with pytest.raises(ValueError, match=r"for batch 2.* for batch 1"):
        compose([first, halved])


def test_averages_of_neglected_groups_are_exact_in_float32() -> None:
    """Masses of exp(-200) are 0 in float32; what they weigh is not."""
    neighbourhood = Neighbourhood((6,), (3,), 2, 3, 1, 5)
    q, k = torch.zeros(1, 2, 3, 2), torch.ones(1, 2, 6, 2)
    q[:, :, 1] = -150.0
    assignment = AttentionAssignment(q, k, neighbourhood, 1.0)
    values = torch.arange(6.0).reshape(1, 6, 1)
    assert assignment.matrix()[0, :, 1].eq(0).all()
    assert_near(assignment.pool(values)[0, 1], torch.tensor([2.5]), 1e-5)
    assert assignment.sum(values)[0, 1].eq(0).all()


def test_groups_that_nobody_sees_get_nothing() -> None:
    neighbourhood = Neighbourhood((4,), (10,), 1, 1, 3, 1)
    assignment = AttentionAssignment(torch.randn(1, 2, 10, 2), torch.randn(1, 2, 4, 2), neighbourhood, 1.0)
    unseen = neighbourhood.mask().sum(0) == 0
    assert unseen.sum() == 6
    for pooled in (assignment.pool(torch.ones(1, 4, 1)), compose([assignment]).pool(torch.ones(1, 4, 1))):
        assert torch.equal(pooled[0, :, 0], (~unseen).float())
    assert assignment.usage().unused.tolist() == [6]


@pytest.mark.parametrize("nested", [{}, {"nested": False}, {"nested": True}], ids=str)
def test_whatever_is_hard_follows_the_same_labels(assignment: Assignment, nested: dict[str, bool]) -> None:
    """With one word and one default everywhere."""
    labels = assignment.labels(**nested)
    one_hot = torch.nn.functional.one_hot(labels, assignment.num_groups).double()
    values, given = random(2, assignment.num_groups, 3), random(2, assignment.num_inputs, 3)
    sizes = one_hot.sum(1).clamp(min=1)[..., None]
    assert_near(assignment.upsample(values, hard=True, **nested), one_hot @ values, 1e-12)
    assert_near(assignment.sum(given, hard=True, **nested), one_hot.mT @ given, 1e-12)
    assert_near(assignment.pool(given, hard=True, **nested), one_hot.mT @ given / sizes, 1e-12)
    assert torch.equal(assignment.usage(**nested).unused, (one_hot.sum(1) == 0).sum(1))
    grid = labels.reshape(2, *assignment.input_shape)
    assert torch.equal(assignment.boundaries(**nested), label_boundaries(grid))


def test_nested_is_for_labels_only(assignment: Assignment) -> None:
    for call, size in ((assignment.upsample, assignment.num_groups), (assignment.pool, assignment.num_inputs)):
        with pytest.raises(ValueError, match=r"nested must be False unless hard is True.*; got True"):
            call(random(2, size, 1), nested=True)


def test_usage_makes_labels_once(assignment: Assignment, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, labels = [], type(assignment).labels
    monkeypatch.setattr(type(assignment), "labels", lambda self, **rule: (calls.append(self), labels(self, **rule))[1])
    assignment.usage()
    assert [call is assignment for call in calls].count(True) == 1


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_heads_are_shown_one_by_one_and_their_mean_is_the_assignment(variant: str, ndim: int) -> None:
    single = one(variant, ndim)
    up, down = random(2, single.num_groups, 3), random(2, single.num_inputs, 3)
    for members in (single, compose([single]), compose([compose([single])])):
        heads = members.matrix(per_head=True)
        assert heads.shape == (2, members.num_heads, members.num_inputs, members.num_groups)
        assert (heads[:, 0] - heads[:, 1]).abs().max() > 1e-2, "equal heads would prove nothing"
        assert_near(heads.mean(1), members.matrix(), 1e-9)
        mass = heads.sum(-2).clamp(min=1e-300).unsqueeze(-1)
        ups, downs = random(2, 2, single.num_groups, 3), random(2, 2, single.num_inputs, 3)
        for given_up, given_down in ((up, down), (ups, downs)):
            each_up = given_up if given_up.ndim == 4 else given_up[:, None]
            each_down = given_down if given_down.ndim == 4 else given_down[:, None]
            assert_near(members.upsample(given_up, per_head=True), heads @ each_up, 1e-9)
            assert_near(members.sum(given_down, per_head=True), heads.mT @ each_down, 1e-9)
            assert_near(members.pool(given_down, per_head=True), heads.mT @ each_down / mass, 1e-9)
            labels = members.labels(per_head=True)
            one_hot = torch.nn.functional.one_hot(labels, members.num_groups).double()
            assert_near(members.upsample(given_up, per_head=True, hard=True), one_hot @ each_up, 1e-12)
            assert_near(members.sum(given_down, per_head=True, hard=True), one_hot.mT @ each_down, 1e-12)
        assert_near(heads.gather(-1, labels[..., None]).squeeze(-1), heads.amax(-1), 1e-9)
        assert (labels[:, 0] != labels[:, 1]).any()
        with pytest.raises(ValueError, match=r"values must have shape \(B=2, H=2, N_in=.*got \(2, 3, "):
            members.pool(random(2, 3, single.num_inputs, 1), per_head=True)
        with pytest.raises(ValueError, match=r"values must have shape \(B=2, N_in="):
            members.pool(downs)


def test_heads_of_several_stages_do_not_correspond() -> None:
    members = chain()
    with pytest.raises(ValueError, match=r"per_head must be False for a chain .*got True for 2 stages"):
        compose(members.stages[:2]).labels(per_head=True)
    for call in (
        lambda: members.matrix(per_head=True),
        lambda: members.labels(per_head=True),
        lambda: members.upsample(random(2, members.num_groups, 1), per_head=True),
        lambda: members.sum(random(2, members.num_inputs, 1), per_head=True),
        lambda: members.pool(random(2, members.num_inputs, 1), per_head=True, hard=True),
    ):
        with pytest.raises(ValueError, match=r"per_head must be False for a chain of several stages.*got True for 3"):
            call()


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_pooling_per_head_is_the_grouping_of_the_layer(variant: str) -> None:
    """What the layer's last round adds is the per-head average of its own values, and not the average over heads."""
    layer = make_layer(variant, iters=1).double()
    with torch.no_grad():
        layer.q_proj.weight.mul_(3)
    seen = []
    layer.norm_attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, shape = tokens((12, 14)).double(), (12, 14)
    members = layer(x, 0.5, shape).assignment
    values = layer.v_proj(x)
    pooled = members.pool(values.unflatten(-1, (2, -1)).transpose(1, 2), per_head=True)
    assert_near(pooled.transpose(1, 2).flatten(2), seen[0], 1e-9)
    assert (members.pool(values) - seen[0]).norm() > 0.1 * seen[0].norm()


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_tokens_of_which_nobody_can_tell_have_no_label(variant: str) -> None:
    def broken(leaf: torch.Tensor | None) -> torch.Tensor | None:
        if leaf is None or leaf.shape[2:3] != (54,):
            return leaf
        leaf = leaf.clone()
        leaf[0, :, 7] = torch.nan
        return leaf

    members = one(variant)
    hurt = pytree.tree_map(broken, members)
    for per_head in (False, True):
        want, got = members.labels(per_head=per_head), hurt.labels(per_head=per_head)
        want[0, ..., 7] = -1
        assert torch.equal(got, want)
    assert torch.equal(compose([hurt]).labels(), hurt.labels())
