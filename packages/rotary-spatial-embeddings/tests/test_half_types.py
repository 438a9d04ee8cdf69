"""Half types never reach the angles: on every road they are kept out, or refused before the first use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from process_groups import process_group
from RoSE import (
    Grid,
    MultiResolutionBlock,
    RoSEMultiHeadAttention,
    RoSEMultiHeadCrossAttention,
    RotarySpatialEmbedding,
)
from RoSE.functional import cos_sin, phases
from RoSE.transforms import LogSpacing, PowerSpacing
from sharded_runs import CPU, WAYS, half_if_pure
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard

NARROW = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
SHAPE = (20, 20)


class Scores(nn.Module):
    """The scores of tokens against themselves."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.scores = RoSEMultiHeadCrossAttention(16, 2, 2, **options)

    def forward(self, x: Tensor, spacing: object, grid_shape: object) -> Tensor:
        return self.scores(x, x, spacing, grid_shape)


MAKERS: dict[str, Callable[..., nn.Module]] = {
    "embedding": lambda **o: RotarySpatialEmbedding(16, 2, 2, **o),
    "fixed embedding": lambda **o: RotarySpatialEmbedding(16, 2, 2, learnable=False, **o),
    "scores": lambda **o: Scores(**o),
    "attention": lambda **o: RoSEMultiHeadAttention(16, 2, 2, **o),
    "block": lambda **o: MultiResolutionBlock(16, 2, 2, **o),
}
TRANSFORMS = (None, "power", "log")


def made(name: str, transform: str | None = None) -> nn.Module:
    """A module whose angle-deciding parameters have digits that a half type would lose."""
    torch.manual_seed(0)
    module = MAKERS[name](spacing_transform=transform)
    with torch.no_grad():
        for path, tensor in module.state_dict().items():
            if "spacing_transform" in path:
                tensor.uniform_(-0.5, 0.5)
    return module


def deciding(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every parameter and buffer on which angles depend, as its owner and its name."""
    kinds = (RotarySpatialEmbedding, PowerSpacing, LogSpacing)
    return [
        (part, name)
        for part in module.modules()
        if isinstance(part, kinds)
        for name in (*part._parameters, *part._buffers)
    ]


def tokens() -> Tensor:
    return torch.randn(1, 400, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", NARROW)
def test_what_was_narrowed_behind_the_module_is_refused_before_use(
    name: str, transform: str | None, dtype: torch.dtype
) -> None:
    whole = made(name, transform)
    assert deciding(whole)
    for index in range(len(deciding(whole))):
        module = copy.deepcopy(whole)
        part, path = deciding(module)[index]
        narrow = getattr(part, path).detach().to(dtype)
        getattr(part, path).data = narrow
        with pytest.raises(TypeError, match=f"{path} of {type(part).__name__} must be float64 or float32; got {dtype}"):
            module(tokens(), 0.7, SHAPE)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", MAKERS)
def test_checkpoints_that_were_cast_are_refused_and_those_of_cast_modules_load(
    name: str, transform: str | None, assign: bool
) -> None:
    whole = made(name, transform)
    expected = copy.deepcopy(whole).bfloat16()(tokens().bfloat16(), 0.7, SHAPE)
    for dtype in NARROW:
        cast = {path: value.to(dtype) for path, value in whole.state_dict().items()}
        with pytest.raises(RuntimeError, match=f"freqs must be float64 or float32; got {dtype}"):
            made(name, transform).load_state_dict(cast, assign=assign, strict=False)
        for path, value in whole.state_dict().items():
            if "freqs" in path:
                cast[path] = value
        if transform is not None:
            with pytest.raises(RuntimeError, match=f"spacing_transform.log_gain must be .*; got {dtype}"):
                made(name, transform).load_state_dict(cast, assign=assign)
    saved = copy.deepcopy(whole).bfloat16().state_dict()
    with torch.device("meta" if assign else "cpu"):
        fresh = MAKERS[name](spacing_transform=transform).bfloat16()
    fresh.load_state_dict(saved, assign=assign)
    assert torch.equal(fresh(tokens().bfloat16(), 0.7, SHAPE), expected)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_of_a_module_and_true_half_training_leave_them_out(
    name: str, transform: str | None, dtype: torch.dtype
) -> None:
    whole = made(name, transform)
    kept = [getattr(part, path).clone() for part, path in deciding(whole)]
    casts = (
        lambda m: m.to(dtype),
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(dtype).float(),
        lambda m: m.to(dtype, memory_format=torch.preserve_format),
        lambda m: m.apply(lambda each: each.to(dtype)),
        lambda m: m.to(torch.float8_e4m3fn),
    )
    for cast in casts:
        module = cast(copy.deepcopy(whole))
        for (part, path), value in zip(deciding(module), kept, strict=True):
            assert torch.equal(getattr(part, path), value)
    default = torch.get_default_dtype()
    expected = copy.deepcopy(whole).to(dtype)(tokens().to(dtype), 0.7, SHAPE)
    try:  # as Lightning's "bf16-true" constructs and calls
        torch.set_default_dtype(dtype)
        module = MAKERS[name](spacing_transform=transform)
        assert all(getattr(part, path).dtype == torch.float32 for part, path in deciding(module))
        module.load_state_dict(copy.deepcopy(whole).to(dtype).state_dict())
        assert torch.equal(module(tokens().to(dtype), 0.7, SHAPE), expected)
        exact = RotarySpatialEmbedding(16, 2, 2, learnable=False).freqs
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(exact, RotarySpatialEmbedding(16, 2, 2, learnable=False).freqs)


def test_replaced_and_parametrised_wave_vectors_are_looked_at_too() -> None:
    embedding = made("embedding")
    with pytest.raises(TypeError, match="freqs of RotarySpatialEmbedding must be float64 or float32"):
        torch.func.functional_call(embedding, {"freqs": embedding.freqs.half()}, (tokens(), 0.7, SHAPE))
    with pytest.raises(TypeError, match="freqs of RotarySpatialEmbedding must be float64 or float32"):
        torch.func.functional_call(embedding, {"freqs": embedding.freqs.half()}, (tokens(),), {
            "coordinates": torch.zeros(400, 2), "k": tokens()})  # fmt: skip
    embedding.freqs.data = embedding.freqs.data.half()
    with pytest.raises(TypeError, match="freqs of RotarySpatialEmbedding"):
        embedding.angles(torch.zeros(3, 2))


HALF = torch.tensor([0.7, 0.3]).half()
X = torch.randn(2, 6, 16)
E, A, C, B = (MAKERS[n]() for n in ("embedding", "attention", "scores", "block"))
STRETCHED = RotarySpatialEmbedding(16, 2, 2, spacing_transform="log")
POINTS = torch.rand(6, 2).bfloat16()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Grid((2, 3), HALF), "spacing"),
        (lambda: Grid((2, 3), 1.0, HALF), "origin"),
        (lambda: Grid((2, 3), HALF.expand(2, 2)), "spacing"),
        (lambda: E(X, HALF, (2, 3)), "spacing"),
        (lambda: A(X, HALF, (2, 3)), "spacing"),
        (lambda: C(X, HALF, (2, 3)), "spacing"),
        (lambda: B(X, HALF, (2, 3)), "spacing"),
        (lambda: B([X], [HALF], [(2, 3)]), "spacing"),
        (lambda: A(X, 1.0, (2, 3), k_spacing=HALF), "spacing"),
        (lambda: E(X, coordinates=POINTS), "coordinates"),
        (lambda: E(X, coordinates=[POINTS]), "coordinates"),
        (lambda: A(X, coordinates=POINTS.expand(2, 6, 2)), "coordinates"),
        (lambda: A(X, 1.0, (2, 3), k_coordinates=POINTS), "coordinates"),
        (lambda: B(X, coordinates=POINTS), "coordinates"),
        (lambda: STRETCHED(X, HALF, coordinates=POINTS.float()), "spacing"),
        (lambda: phases(POINTS, E.freqs), "coordinates"),
        (lambda: phases(POINTS.float(), E.freqs.half()), "freqs"),
        (lambda: cos_sin(POINTS), "angles"),
        (lambda: E.angles(POINTS), "positions"),
        (lambda: Grid((2, 3)).coordinates(dtype=torch.bfloat16), "dtype"),
    ],
)
def test_half_positions_are_refused_whatever_holds_them(call: Callable[[], object], name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be (torch\.)?float64 or (torch\.)?float32; got torch\."):
        call()


def test_half_positions_of_numpy_are_refused() -> None:
    numpy = pytest.importorskip("numpy", reason="headers of image files give NumPy numbers where it is installed")
    for spacing in (numpy.float16(0.7), numpy.array([0.7, 0.3], dtype=numpy.float16)):
        with pytest.raises(TypeError, match=r"spacing(\[0\])? must be in float64 or float32; got .* of type float16"):
            Grid((2, 3), spacing)


@pytest.fixture
def _process_group() -> Iterator[None]:
    with process_group():
        yield


class Model(nn.Module):
    """Two blocks, and an attention over what they make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(made("block", form) for form in TRANSFORMS)
        self.attention = made("attention")

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, 0.7, SHAPE)
        return self.attention(x, 0.7, SHAPE)


@pytest.mark.usefixtures("_process_group")
@pytest.mark.filterwarnings("ignore:FSDP:UserWarning")  # of a single process, and of results that are views
@pytest.mark.parametrize("way", WAYS)
def test_sharded_half_models_compute_what_the_cast_model_does(way: str) -> None:
    x = tokens()
    plain = Model().bfloat16()
    expected = plain(x.bfloat16())
    expected.square().sum().backward()
    mixed, shard = WAYS[way]
    model = shard(half_if_pure(Model(), mixed))
    got = model(x if mixed else x.bfloat16())
    torch.testing.assert_close(got.to(torch.bfloat16), expected, rtol=0, atol=0)
    got.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and g.dtype == p.dtype for g, p in zip(gradients, model.parameters(), strict=True))


@pytest.mark.usefixtures("_process_group")
@pytest.mark.filterwarnings("ignore:FSDP:UserWarning")
def test_sharding_that_would_cast_them_is_refused_with_the_way_out() -> None:
    for model in (
        fully_shard(Model(), mp_policy=MixedPrecisionPolicy(torch.bfloat16)),
        FullyShardedDataParallel(Model(), mixed_precision=MixedPrecision(torch.bfloat16), device_id=CPU),
    ):
        with pytest.raises(TypeError, match="in FSDP make every RotarySpatialEmbedding a unit of its own"):
            model(tokens())


@pytest.mark.usefixtures("_process_group")
@pytest.mark.filterwarnings("ignore:FSDP:UserWarning")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_one_unit_of_two_dtypes_is_refused_by_torch_in_the_words_that_the_documentation_quotes(
    use_orig_params: bool,
) -> None:
    with pytest.raises(ValueError, match="Must flatten tensors with uniform dtype but got"):
        FullyShardedDataParallel(Model().bfloat16(), use_orig_params=use_orig_params, device_id=CPU)
    with pytest.raises(AssertionError, match="FSDP expects uniform original parameter dtype but got"):
        fully_shard(Model().bfloat16())(tokens().bfloat16())


@pytest.mark.usefixtures("_process_group")
@pytest.mark.filterwarnings("ignore:FSDP:UserWarning")
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_child_may_be_sharded_by_itself(name: str, transform: str | None) -> None:
    module = made(name, transform)
    expected = module(tokens(), 0.7, SHAPE)
    for child in module.children():
        fully_shard(child)
    fully_shard(module)
    got = module(tokens(), 0.7, SHAPE)
    torch.testing.assert_close(got, expected)
    if got.requires_grad:
        got.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
