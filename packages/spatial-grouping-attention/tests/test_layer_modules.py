"""Grouping layers as torch modules: masks, gradients, dtypes, hooks, transforms and modes."""

import copy

import pytest
import torch
from grouping_cases import assert_near
from layer_cases import VARIANTS, full, make_layer, slow, tokens
from spatial_grouping_attention import GroupingOutput, compose
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint as checkpointed

EVERY_VARIANT = tuple(VARIANTS)
SHAPE = (6, 9)


@pytest.mark.parametrize("out_dims", [None, 4, 12])
@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_out_dims(variant: str, out_dims: int | None) -> None:
    layer = make_layer(variant, out_dims=out_dims, mlp_ratio=1.5)
    output = layer(tokens(SHAPE), 1.0, SHAPE)
    assert output.x_out.shape == (2, 15, out_dims or 8)
    assert output.assignment.upsample(output.x_out).shape == (2, 54, out_dims or 8)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_masked_tokens_are_replaced_before_anything_else(variant: str) -> None:
    layer = make_layer(variant)
    x = tokens(SHAPE)
    mask = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(3)) < 0.4
    by_hand = x.clone()
    by_hand[mask.flatten(1)] = layer.mask_embedding.detach()
    want = layer(by_hand, 1.0, SHAPE)
    for content in (x, x.masked_fill(mask.flatten(1)[..., None], 1e4)):
        got = layer(content, 1.0, SHAPE, mask)
        assert torch.equal(got.x_out, want.x_out)
        assert torch.equal(got.assignment.matrix(), want.assignment.matrix())
    assert torch.equal(layer(x, 1.0, SHAPE, torch.zeros_like(mask)).x_out, layer(x, 1.0, SHAPE).x_out)
    assert torch.equal(layer(x, 1.0, mask=mask).x_out, want.x_out), "the mask shows the grid's shape"
    x.requires_grad_()
    layer(x, 1.0, SHAPE, mask).x_out.square().sum().backward()
    assert x.grad[mask.flatten(1)].eq(0).all()
    assert x.grad[~mask.flatten(1)].ne(0).any(-1).all()
    assert layer.mask_embedding.grad.ne(0).all()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_every_parameter_gets_a_gradient(variant: str, checkpoint: bool) -> None:
    layer = make_layer(variant, relative_bias=variant != "dense", checkpoint=checkpoint, iters=3)
    x = tokens(SHAPE).requires_grad_()
    mask = torch.zeros(2, *SHAPE, dtype=torch.bool)
    mask[:, 0, 0] = True
    output = layer(x, 1.0, SHAPE, mask)
    up = output.assignment.upsample(output.x_out)
    (torch.randn_like(output.x_out) * output.x_out).sum().add((torch.randn_like(up) * up).sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_memberships_carry_gradients_into_the_layer(variant: str) -> None:
    layer = make_layer(variant, iters=1)
    layer(tokens(SHAPE), 1.0, SHAPE).assignment.upsample(torch.randn(2, 15, 1)).square().sum().backward()
    for module in (layer.q_proj, layer.k_proj, layer.proposal):
        assert module.weight.grad.abs().max() > 0


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_checkpointing_changes_memory_only(variant: str) -> None:
    results = []
    for checkpoint in (False, True):
        layer = make_layer(variant, checkpoint=checkpoint)
        out = layer(tokens(SHAPE), 1.0, SHAPE).x_out
        out.square().sum().backward()
        results.append([out, *(p.grad for p in layer.parameters() if p.grad is not None)])
    for plain, recomputed in zip(*results, strict=True):
        assert_near(recomputed, plain, 1e-6)


@pytest.mark.parametrize("iters", [0, 1, 4])
@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_what_does_not_change_is_computed_once(variant: str, iters: int) -> None:
    layer = make_layer(variant, iters=iters)
    calls = dict.fromkeys(("k_proj", "v_proj", "q_proj", "proposal", "mlp", "rotary"), 0)

    def count(name: str):
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    for name in calls:
        getattr(layer, name).register_forward_hook(count(name))
    layer(tokens(SHAPE), 1.0, SHAPE)
    assert calls["k_proj"] == calls["v_proj"] == calls["proposal"] == 1
    assert calls["q_proj"] == max(1, iters)
    assert calls["mlp"] == iters
    assert calls["rotary"] == 1 + max(1, iters), "keys once, queries in every round, through the module itself"


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_dropout_and_stochastic_depth_are_for_training_only(variant: str) -> None:
    layer = make_layer(variant, mlp_dropout=0.5, drop_path=0.5)
    x = tokens(SHAPE)
    assert not torch.equal(layer(x, 1.0, SHAPE).x_out, layer(x, 1.0, SHAPE).x_out)
    layer.eval()
    want = layer(x, 1.0, SHAPE).x_out
    assert torch.equal(layer(x, 1.0, SHAPE).x_out, want)
    assert torch.equal(make_layer(variant)(x, 1.0, SHAPE).x_out, want)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_half_types(variant: str) -> None:
    """The module in bfloat16, and the float32 module under autocast, both near the float32 result."""
    layer = make_layer(variant)
    x = tokens(SHAPE)
    want = layer(x, 1.0, SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = layer(x, 1.0, SHAPE)
    half = copy.deepcopy(layer).bfloat16()
    halved = half(x.bfloat16(), 1.0, SHAPE)
    assert halved.x_out.dtype == torch.bfloat16
    assert half.rotary.freqs.dtype == torch.float32
    for got in (cast, halved):
        assert (got.x_out.float() - want.x_out).square().mean().sqrt() < 0.03 * want.x_out.std()
        members = got.assignment.upsample(torch.ones(2, 15, 1))
        assert members.dtype == torch.float32
        assert_near(members, torch.ones(2, 54, 1), 1e-5)
    halved.x_out.sum().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_tokens_may_be_any_view(variant: str) -> None:
    layer = make_layer(variant)
    image = torch.randn(2, 8, *SHAPE)
    view = image.permute(0, 2, 3, 1).flatten(1, 2)
    channels_last = image.flatten(2).mT
    assert not channels_last.is_contiguous()
    assert_near(layer(channels_last, 1.0, SHAPE).x_out, layer(view.contiguous(), 1.0, SHAPE).x_out, 1e-6)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_a_first_call_in_inference_mode(variant: str) -> None:
    """A first call in inference mode leaves nothing behind that training would trip over."""
    layer = make_layer(variant)
    with torch.inference_mode():
        want = layer(tokens(SHAPE), 1.0, SHAPE).x_out.clone()
    got = layer(tokens(SHAPE), 1.0, SHAPE).x_out
    assert_near(got, want, 1e-6)
    got.sum().backward()


@pytest.mark.filterwarnings(
    "error", "ignore::DeprecationWarning", "ignore:.torch.jit"
)  # torch calls what it has deprecated
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_layers_can_be_transformed(variant: str, padded: bool) -> None:
    """By torch.func, and by the functions of torch.autograd that map over gradients."""
    layer = make_layer(variant, relative_bias=variant != "dense", iters=1).double()
    x = tokens(SHAPE).double().requires_grad_()
    valid = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(3)) < 0.8 if padded else None
    weights = torch.randn(2, 2, 15, 8, dtype=torch.float64)

    def output(x: torch.Tensor) -> GroupingOutput:
        return layer(x, 1.0, SHAPE, valid=valid)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (output(x).x_out * weights[0]).sum() + output(x).assignment.upsample(weights[1]).square().sum()

    def of_one(x: torch.Tensor) -> torch.Tensor:
        real = None if valid is None else valid[:1]
        return layer(x[None], 1.0, SHAPE, valid=real).x_out[0]

    (want,) = torch.autograd.grad(loss(x), x)
    given, direction = x.detach(), torch.randn_like(x)
    assert_near(torch.func.grad(loss)(given), want, 1e-9)
    assert_near(torch.func.jvp(loss, (given,), (direction,))[1], (want * direction).sum(), 1e-9)
    mapped = torch.func.vmap(of_one)(given)
    assert_near(mapped, torch.stack([of_one(sample) for sample in given]), 1e-9)
    each = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (output(x).x_out * weights).sum((1, 2, 3))]
    (batched,) = torch.autograd.grad(output(x).x_out, x, weights, is_grads_batched=True)
    assert_near(batched, torch.stack(each), 1e-9)
    jacobian = torch.func.jacrev(lambda sample: of_one(sample)[:1])(given[0])
    assert_near(
        torch.autograd.functional.jacobian(lambda sample: of_one(sample)[:1], given[0], vectorize=True), jacobian, 1e-9
    )
    parameters = dict(layer.named_parameters())

    def of_parameters(parameters: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (sample[None], 1.0, SHAPE)).x_out.sin().sum()

    per_sample = torch.func.vmap(torch.func.grad(of_parameters), (None, 0))(parameters, given)
    for i, sample in enumerate(given):
        layer.zero_grad()
        of_parameters(parameters, sample).backward()
        for name, gradients in per_sample.items():
            alone = parameters[name].grad
            assert_near(gradients[i], torch.zeros_like(gradients[i]) if alone is None else alone, 1e-9, name)

    def labels(sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        members = layer(sample[None], 1.0, SHAPE).assignment
        return members.labels()[0], members.labels(per_head=True)[0]

    members = layer(given, 1.0, SHAPE).assignment
    got = torch.func.vmap(labels)(given)
    assert torch.equal(got[0], members.labels())
    assert torch.equal(got[1], members.labels(per_head=True))


@pytest.mark.parametrize(("per_sample", "padded"), [(False, False), (True, True), *slow((False, True), (True, False))])
@pytest.mark.parametrize("variant", [*EVERY_VARIANT, "windowed self-attention"])
def test_values_that_are_not_there_are_not_read(variant: str, per_sample: bool, padded: bool) -> None:
    """Fake and meta tensors, and an empty batch: the shapes of the real results, and a backward pass."""

    def shapes(batch: int, device: str = "cpu") -> list[tuple[int, ...]]:
        layer = full(variant, device=device)
        x, spacing = torch.randn(batch, 54, 16, device=device), torch.ones(batch, 2, device=device)
        valid = torch.ones(batch, *SHAPE, dtype=torch.bool, device=device) if padded else None
        output = layer(x, spacing if per_sample else 1.0, SHAPE, valid=valid)
        if isinstance(output, torch.Tensor):
            output.sum().backward()
            return [tuple(output.shape)]
        members = output.assignment
        results = [output.x_out, members.upsample(output.x_out), members.pool(x, per_head=True), members.matrix()]
        sum(result.sum() for result in results).backward()
        results += [members.labels(), members.labels(per_head=True), members.boundaries(), *members.usage()]
        results += [compose([members]).labels(nested=True), members.upsample(output.x_out, hard=True)]
        return [tuple(result.shape) for result in results]

    want = shapes(2)
    assert shapes(2, "meta") == want
    with FakeTensorMode():
        assert shapes(2) == want
    assert shapes(0) == [(0, *shape[1:]) for shape in want]


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_checkpoints_that_would_lose_gradients_are_refused(variant: str) -> None:
    layer, x = make_layer(variant), tokens(SHAPE).requires_grad_()
    for function in (layer, layer.forward):
        with pytest.raises(RuntimeError, match=r"must be called with use_reentrant=False.*got use_reentrant=True"):
            checkpointed(function, x, 1.0, SHAPE, use_reentrant=True)
    gradients = []
    for reentrant, result in ((False, None), (False, "x_out"), (True, "x_out")):
        function = layer if result is None else lambda *given: layer(*given).x_out
        out = checkpointed(function, x, 1.0, SHAPE, use_reentrant=reentrant)
        x.grad = None
        (out.x_out if result is None else out).square().sum().backward()
        gradients.append(x.grad)
    for gradient in gradients:
        assert_near(gradient, gradients[0], 1e-6)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert layer(x.detach(), 1.0, SHAPE).x_out.shape[0] == 2


@pytest.mark.parametrize("variant", [*EVERY_VARIANT, "windowed self-attention"])
def test_children_are_called_and_not_reached_into(variant: str) -> None:
    """Whoever offloads, shards or differentiates per sample lives in hooks, and sees every use of every parameter."""
    layer = full(variant)
    inside: list[torch.nn.Module] = []
    owner: dict[int, torch.nn.Module] = {}
    used: set[int] = set()

    class Watched(torch.nn.Parameter):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            """What is computed with the parameter is computed while its module is being called."""
            if function.__name__ not in ("__get__", "dim", "size"):  # what is asked without a value
                for leaf in pytree.tree_leaves((args, kwargs)):
                    if id(leaf) in owner:
                        used.add(id(leaf))
                        assert owner[id(leaf)] in inside, function
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))

    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            watched = Watched(parameter.detach())
            setattr(module, name, watched)
            owner[id(watched)] = module
        module.register_forward_pre_hook(lambda module, _: inside.append(module))
        module.register_forward_hook(lambda *_: inside.pop() and None)
    mask = {} if variant not in VARIANTS else {"mask": torch.ones(2, *SHAPE, dtype=torch.bool)}
    layer(torch.randn(2, 54, 16), 1.0, SHAPE, **mask)
    assert used == owner.keys()


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_a_spacing_can_be_learned(variant: str) -> None:
    layer = make_layer(variant).double()
    x, weights = tokens(SHAPE).double(), torch.randn(2, 15, 8, dtype=torch.float64)

    def loss(spacing: torch.Tensor) -> torch.Tensor:
        return (layer(x, spacing, SHAPE).x_out * weights).sum()

    spacing = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(spacing), spacing)
    with torch.no_grad():
        for axis in range(2):
            step = torch.zeros(2, dtype=torch.float64)
            step[axis] = 1e-3
            slope = (loss(spacing + step) - loss(spacing - step)) / 2e-3
            assert slope.item() == pytest.approx(gradient[axis].item(), rel=1e-2, abs=1e-3)
