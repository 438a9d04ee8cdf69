"""Forms of memberships: pytrees, devices, dtypes, autocast, backends, and what is refused."""

import itertools
from typing import Any

import pytest
import torch
from assignment_cases import EVERY_VARIANT, chain, one, random
from grouping_cases import assert_near
from layer_cases import SHAPES, VARIANTS, make_layer, tokens
from spatial_grouping_attention import Assignment, ComposedAssignment, DeformableAssignment, Neighbourhood, compose
from torch.utils import _pytree as pytree


def test_assignments_are_pytrees(assignment: Assignment) -> None:
    leaves, structure = pytree.tree_flatten(assignment)
    assert all(leaf is None or isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, structure)
    assert type(again) is type(assignment)
    assert torch.equal(again.matrix(), assignment.matrix())
    detached = pytree.tree_map(lambda leaf: None if leaf is None else leaf.detach(), assignment)
    assert not detached.upsample(random(2, assignment.num_groups, 1)).requires_grad


def test_everything_is_where_the_memberships_are(assignment: Assignment) -> None:
    elsewhere = pytree.tree_map(lambda leaf: None if leaf is None else leaf.to("meta"), assignment)
    usage = elsewhere.usage()
    for here in (elsewhere, usage.mass, usage.unused, elsewhere.matrix(), elsewhere.labels(), elsewhere.boundaries()):
        assert here.device.type == "meta"


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_pytrees_keep_what_is_real_and_the_backend(variant: str) -> None:
    named = {"sparse": "tiled", "deformable": "reference"}
    layer, shape = make_layer(variant, backend=named.get(variant, "auto")), SHAPES[2]
    valid = torch.zeros(2, *shape, dtype=torch.bool)
    valid[:, :3, :4] = True
    assignment = layer(tokens(shape), 0.5, shape, valid=valid).assignment
    again = pytree.tree_map(lambda leaf: leaf, assignment)
    labels = again.labels()
    assert torch.equal(labels, assignment.labels())
    assert torch.equal(labels >= 0, valid.flatten(1))
    assert torch.equal(again.valid, assignment.valid)
    assert torch.equal(again.valid_groups, assignment.valid_groups)
    assert getattr(again, "backend", None) == getattr(assignment, "backend", None)


@pytest.mark.parametrize(("variant", "refuses"), [("sparse", "fused"), ("deformable", "tiled")])
def test_the_backend_of_an_assignment_serves_all_that_it_carries(variant: str, refuses: str) -> None:
    """By one that refuses such memberships."""
    assignment = one(variant)
    refusing: Any = pytree.tree_map(lambda leaf: leaf, assignment)
    refusing.backend = refuses
    up, down = random(2, assignment.num_groups, 1), random(2, assignment.num_inputs, 1)
    for call, values in ((refusing.upsample, up), (refusing.pool, down), (refusing.sum, down)):
        with pytest.raises(ValueError, match=refuses):
            call(values)


def test_memberships_at_points_are_carried_by_any_backend_unless_one_is_named() -> None:
    log_shares, points = torch.zeros(1, 1, 4, 1), torch.arange(4.0).view(1, 1, 4, 1, 1) / 2
    assignment = DeformableAssignment(log_shares, points, Neighbourhood((4,), (2,), 2, 2, 0, 1))
    assert assignment.backend == "auto"
    assert_near(assignment.upsample(torch.tensor([[[0.0], [1.0]]])).flatten(), torch.tensor([0.0, 0.5, 1.0, 1.0]), 1e-6)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_the_backend_of_the_layer_is_used(backend: str) -> None:
    auto, chosen = one("sparse"), one("sparse", backend=backend)
    values = random(2, auto.num_groups, 2)
    assert chosen.backend == backend  # type: ignore[attr-defined]
    assert_near(chosen.upsample(values), auto.upsample(values), 1e-9)


def test_values_keep_their_dtype_and_get_gradients(assignment: Assignment) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        up = random(2, assignment.num_groups, 2).to(dtype).requires_grad_()
        down = random(2, assignment.num_inputs, 2).to(dtype).requires_grad_()
        for values, result in (
            (up, assignment.upsample(up)),
            (down, assignment.pool(down)),
            (down, assignment.sum(down)),
        ):
            assert result.dtype == dtype
            (grad,) = torch.autograd.grad(result.sum(), values)
            assert grad.dtype == dtype
            assert grad.abs().max() > 0
    matrix = assignment.matrix().detach()
    up = random(2, assignment.num_groups, 2).requires_grad_()
    weights = random(2, assignment.num_inputs, 2)
    (grad,) = torch.autograd.grad((assignment.upsample(up) * weights).sum(), up)
    assert_near(grad, matrix.mT @ weights, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_wider_values_are_carried_in_their_own_dtype(variant: str, dtype: torch.dtype) -> None:
    """By the numbers that the memberships are made of, whatever holds them."""
    narrow = pytree.tree_map(lambda x: x.to(dtype) if x is not None and x.is_floating_point() else x, one(variant))
    wide = pytree.tree_map(lambda x: x.double() if x is not None and x.is_floating_point() else x, narrow)
    up, down = random(2, wide.num_groups, 2), random(2, wide.num_inputs, 2)
    for got, want in (
        (narrow.upsample(up), wide.upsample(up)),
        (narrow.pool(down), wide.pool(down)),
        (narrow.sum(down), wide.sum(down)),
    ):
        assert got.dtype == torch.float64
        assert_near(got, want, 1e-12)


def test_flags_are_flags(assignment: Assignment) -> None:
    up, down = random(2, assignment.num_groups, 1), random(2, assignment.num_inputs, 1)
    for name in ("hard", "nested", "per_head"):
        for call, values in ((assignment.upsample, up), (assignment.sum, down), (assignment.pool, down)):
            with pytest.raises(TypeError, match=f"^{name} must be True or False; got 1$"):
                call(values, **{"hard": True, name: 1})


def test_bad_values_are_refused(assignment: Assignment) -> None:
    groups, inputs = assignment.num_groups, assignment.num_inputs
    for method, name, size in (("upsample", "N_out", groups), ("pool", "N_in", inputs), ("sum", "N_in", inputs)):
        call = getattr(assignment, method)
        with pytest.raises(ValueError, match=rf"values must have shape \(B=2, {name}={size}, C\); got \(2, {size}\)"):
            call(torch.randn(2, size))
        with pytest.raises(ValueError, match=rf"{name}={size}.* got \(2, {size + 1}, 3\)"):
            call(torch.randn(2, size + 1, 3))
        with pytest.raises(ValueError, match=rf"B=2.* got \(3, {size}, 1\)"):
            call(torch.randn(3, size, 1))
        with pytest.raises(TypeError, match=r"values must be float.* got torch.int64"):
            call(torch.ones(2, size, 1, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"values must be a torch\.Tensor; got list"):
            call([[1.0]])


def test_autocast_changes_nothing_that_is_read_from_memberships(assignment: Assignment) -> None:
    # float64 is nothing that autocast touches.
    assignment = pytree.tree_map(lambda leaf: leaf if leaf is None else leaf.float(), assignment)
    values, given = (random(2, n, 3).float() for n in (assignment.num_groups, assignment.num_inputs))
    heads = [False, True] if type(assignment) is not ComposedAssignment else [False]

    def everything() -> list[torch.Tensor]:
        every = [*assignment.usage(), assignment.boundaries(), assignment.labels(nested=True)]
        for per_head, hard in itertools.product(heads, (False, True)):
            options = {"per_head": per_head, "hard": hard}
            every += [assignment.matrix(per_head=per_head), assignment.labels(per_head=per_head)]
            every += [assignment.upsample(values, **options), assignment.sum(given, **options)]
            every += [assignment.pool(given, **options)]
        return every

    want = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything()
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_memberships_made_under_autocast_have_their_own_labels(variant: str) -> None:
    """Those of float32 layers too, whose matrix products autocast would round."""
    layer = make_layer(variant)
    with torch.no_grad():
        layer.q_proj.weight.mul_(3)
    plain = layer(tokens((24, 28)), 0.5, (24, 28)).assignment
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer(tokens((24, 28)), 0.5, (24, 28)).assignment
        for members in (plain, cast, compose([cast])):
            shares = members.matrix()
            chosen = shares.gather(-1, members.labels().unsqueeze(-1)).squeeze(-1)
            assert_near(chosen, shares.amax(-1), 1e-6)


@pytest.mark.parametrize("members", [*EVERY_VARIANT, "chain"])
def test_empty_batches(members: str) -> None:
    full = one(members) if members in VARIANTS else chain()
    # All but the table of biases.
    empty = pytree.tree_map(lambda leaf: leaf if leaf is None or leaf.ndim == 3 else leaf[:0], full)
    assert empty.batch_size == 0
    for nested in (False, True):
        assert empty.labels(nested=nested).shape == (0, full.num_inputs)
        assert empty.boundaries(nested=nested).shape == (0, *full.input_shape)
        assert [part.shape for part in empty.usage(nested=nested)] == [(0, full.num_groups), (0,)]
        assert empty.upsample(torch.zeros(0, full.num_groups, 2), hard=True, nested=nested).shape[1] == full.num_inputs
    if members in VARIANTS:
        assert empty.labels(per_head=True).shape == (0, 2, full.num_inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_averages_of_many_half_precision_values(variant: str, dtype: torch.dtype) -> None:
    """Sums over thousands of tokens overflow half types, averages do not."""
    layer = make_layer(variant, stride=32, kernel_size=33)
    members = layer(tokens((64, 64), batch=1), 1.0, (64, 64)).assignment
    given = torch.full((1, 64 * 64, 2), 100.0, dtype=dtype)
    for pooled in (members.pool(given), compose([members]).pool(given), members.pool(given, hard=True)):
        used = pooled[pooled != 0]
        assert used.numel()
        assert_near(used, torch.full_like(used, 100.0), 1e-2)
