"""What the adapters promise without the libraries they are for: tables, and how they are told where tokens are."""

from __future__ import annotations

import copy
import inspect
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from RoSE import Grid, RotarySpatialEmbedding
from RoSE.adapters import DINOv3Rope, PrimusRope, RopeSlot, TimmRope, XTransformersRope
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

HEADS, SIZE, SHAPE = 3, 16, (4, 6)
SPACING = torch.tensor([[1.0, 1.0], [0.5, 2.0]])
CONFIG = SimpleNamespace(hidden_size=HEADS * SIZE, num_attention_heads=HEADS, patch_size=8)
IMAGES = torch.zeros(2, 3, 32, 48)


def slot(kind: str, **options: Any) -> RopeSlot:
    torch.manual_seed(0)
    if kind == "timm":
        return TimmRope(HEADS * SIZE, HEADS, grid_shape=SHAPE, **options)
    if kind == "timm, half":
        return TimmRope(HEADS * SIZE, HEADS, grid_shape=SHAPE, rotate_half=True, **options)
    if kind == "primus":
        return PrimusRope(SIZE, False, SHAPE, SHAPE, num_heads=HEADS, **options)
    if kind == "transformers":
        return DINOv3Rope(CONFIG, **options)
    return XTransformersRope(SIZE, 2, **options)


KINDS = ["timm", "timm, half", "primus", "transformers", "x-transformers"]
IN_HALVES = ("timm, half", "transformers")


def tables(rope: RopeSlot) -> tuple[Tensor, Tensor]:
    """Cosines and sines, ``([batch,] heads, tokens, channels)``, as the libraries read them."""
    if isinstance(rope, TimmRope):
        sin, cos = rope.get_embed().chunk(2, -1)
        return cos, sin
    if isinstance(rope, DINOv3Rope):
        return rope(IMAGES.to(rope.rotary.freqs.device))
    if rope._where.coordinates is None:  # this library says the tokens' coordinates itself
        spacing = torch.as_tensor(rope._where.spacing, dtype=torch.float64)
        angles, scale = rope(Grid(SHAPE, spacing).coordinates())
    else:
        angles, scale = rope(torch.arange(24))
    assert scale == 1.0
    angles = angles.unsqueeze(1) if len(angles) > 1 else angles
    return angles.cos(), angles.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor, in_halves: bool) -> Tensor:
    """The formula of all four libraries, with either way to pair channels."""
    if in_halves:
        first, second = x.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    else:
        other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + other * sin


def features() -> Tensor:
    return torch.randn(2, HEADS, 24, SIZE, generator=torch.Generator().manual_seed(1))


def embedding_of(rope: RopeSlot, kind: str, **options: Any) -> RotarySpatialEmbedding:
    heads = rope.num_heads
    same = RotarySpatialEmbedding(heads * SIZE, heads, 2, interleaved=kind not in IN_HALVES, **options)
    same.load_state_dict(rope.rotary.state_dict())
    return same


@pytest.mark.parametrize("options", [{}, {"directions": "axial", "learnable": False}, {"spacing_transform": "log"}])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_turn_as_the_embedding_does(kind: str, options: dict[str, Any]) -> None:
    rope, x = slot(kind, **options), features()
    embedding = embedding_of(rope, kind, **options)
    for spacing in (SPACING[1], (0.5, 2.0), SPACING):
        with rope.at(spacing):
            got = turn(x, *tables(rope), kind in IN_HALVES)
        if rope.num_heads == 1:  # one table for all heads
            single = [embedding(head, spacing, SHAPE, layout="bhnd") for head in x.split(1, dim=1)]
            expected = torch.cat(single, dim=1)
        else:
            expected = embedding(x, spacing, SHAPE, layout="bhnd")
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_channels_turns_and_the_rest_stays(kind: str) -> None:
    rope = slot(kind, rotary_ratio=0.5)
    cos, sin = tables(rope)
    pairs = (cos.chunk(2, -1)[0], sin.chunk(2, -1)[0]) if kind in IN_HALVES else (cos[..., ::2], sin[..., ::2])
    assert (pairs[0][..., SIZE // 4 :] == 1).all()
    assert (pairs[1][..., SIZE // 4 :] == 0).all()
    assert (pairs[1][..., 1:, : SIZE // 4] != 0).any(dim=(0, 1)).all()
    cos, sin = tables(slot(kind, rotary_ratio=0.0))
    assert (cos == 1).all()
    assert (sin == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_one_batch_have_places_of_their_own(kind: str) -> None:
    rope = slot(kind)
    alone = []
    for row in SPACING:
        with rope.at(row):
            alone.append(torch.stack(tables(rope)))
    grids = (
        {"spacing": SPACING},
        {"coordinates": Grid(SHAPE, SPACING)},
        {"coordinates": Grid(SHAPE, SPACING).coordinates()},
    )
    for where in grids:
        with rope.at(**where):
            together = torch.stack(tables(rope))
        assert together.shape == (2, 2, rope.num_heads, 24, SIZE)
        for sample, table in enumerate(alone):
            torch.testing.assert_close(together[:, sample], table.reshape(together[:, sample].shape))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_places_have_the_same_angles(kind: str) -> None:
    """However finely they are sampled, and whatever unit they are measured in."""
    rope = slot(kind, reference_spacing=0.5)
    with rope.at(coordinates=Grid(SHAPE, 1.0)):
        coarse = torch.stack(tables(rope))
    points = Grid((8, 12), 0.5).coordinates().view(8, 12, 2)[::2, ::2].reshape(24, 2)
    with rope.at(coordinates=points):
        torch.testing.assert_close(torch.stack(tables(rope)), coarse)
    thousandths = slot(kind, reference_spacing=500.0)
    with thousandths.at(coordinates=Grid(SHAPE, 1000.0)):
        torch.testing.assert_close(torch.stack(tables(thousandths)), coarse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_holds_while_the_context_lasts(kind: str) -> None:
    rope = slot(kind, spacing=(0.25, 1.0))
    first = torch.stack(tables(rope))
    with rope.at(2.0) as same:
        assert same is rope
        outer = torch.stack(tables(rope))
        with pytest.raises(RuntimeError, match="on the way"), rope.at(3.0):
            raise RuntimeError("on the way")
        assert torch.equal(torch.stack(tables(rope)), outer)
    assert torch.equal(torch.stack(tables(rope)), first)
    assert not torch.allclose(outer, first, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_wave_vectors_and_places_learn(kind: str) -> None:
    rope = slot(kind)
    spacing = SPACING.clone().requires_grad_()
    points = Grid(SHAPE, SPACING).coordinates().requires_grad_()
    for where in ({"spacing": spacing}, {"coordinates": points}):
        with rope.at(**where):
            cos, sin = tables(rope)
        (cos * torch.linspace(0, 1, SIZE) + sin).sum().backward()
    assert (rope.rotary.freqs.grad != 0).all()
    assert (spacing.grad != 0).all()
    assert (points.grad[:, 1:] != 0).any(dim=-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_copies_casts_and_checkpoints(kind: str) -> None:
    rope = slot(kind)
    first = torch.stack(tables(rope))
    assert set(rope.state_dict()) == rope.no_weight_decay() == {"rotary.freqs"}
    for other in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope)), copy.deepcopy(rope).bfloat16()):
        assert other.rotary.freqs.dtype == torch.float32
        assert torch.equal(torch.stack(tables(other)), first)
    wide = slot(kind).double()
    cos, sin = tables(wide)
    if kind != "transformers":  # whose tables have the images' dtype
        assert cos.dtype == sin.dtype == torch.float64
    torch.testing.assert_close(cos.float(), first[0])
    empty = slot(kind, device="meta").to_empty(device="cpu")
    empty.load_state_dict(rope.state_dict())
    assert torch.equal(torch.stack(tables(empty)), first)


@pytest.mark.parametrize("spacing", [0.5, SPACING[0]])
def test_spacings_go_where_the_wave_vectors_are(spacing: Any) -> None:
    """Once, and not in every block. Weights that are elsewhere between calls leave their values where they are."""
    rope = slot("timm")
    with rope.at(spacing):
        assert rope._where.spacing.device == rope.rotary.freqs.device
    with rope.to("meta").at(spacing):
        assert rope._where.spacing.tolist() == torch.as_tensor(spacing).expand(2).tolist()
    with FakeTensorMode(allow_non_fake_inputs=True):
        rope.rotary.freqs = torch.nn.Parameter(torch.empty(1, device="cuda"))
        with rope.at(spacing):
            assert rope._where.spacing.is_cuda


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_tables_are_the_same(kind: str) -> None:
    """Where the rotation is a kernel's; spacings and coordinates may be anywhere."""
    rope = slot(kind)
    moved = copy.deepcopy(rope).cuda()
    grid = Grid(SHAPE, SPACING, origin=(10.0, -20.0))
    for where in ({"spacing": SPACING}, {"spacing": SPACING.cuda()}, {"spacing": 0.5}, {"coordinates": grid},
                  {"coordinates": grid.coordinates()}, {"coordinates": grid.coordinates("cuda")}):  # fmt: skip
        with rope.at(**{name: value.cpu() if isinstance(value, Tensor) else value for name, value in where.items()}):
            expected = torch.stack(tables(rope))
        with moved.at(**where):
            got = torch.stack(tables(moved))
        assert got.is_cuda
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)
        for table in (expected, got):
            (table * torch.linspace(0, 1, SIZE, device=table.device)).sum().backward()
    torch.testing.assert_close(moved.rotary.freqs.grad.cpu(), rope.rotary.freqs.grad, rtol=1e-3, atol=1e-3)


def test_shapes_that_timms_attention_broadcasts() -> None:
    channels = 2 * SIZE
    assert slot("timm").get_embed().shape == (HEADS, 24, channels)
    assert slot("timm").get_embed((2, 3)).shape == (HEADS, 6, channels)
    assert slot("timm", depth=5).get_embed().shape == (5, HEADS, 24, channels)
    shared = TimmRope(SIZE, 1)
    assert shared.get_embed(SHAPE).shape == (24, channels)
    assert shared.get_embed(SHAPE, dtype=torch.float16).dtype == torch.float16
    with shared.at(SPACING):
        assert shared.get_embed(SHAPE).shape == (2, 1, 24, channels)
    one = slot("timm")
    with one.at(SPACING[:1]):  # a batch of one is a batch
        assert one.get_embed().shape == (1, HEADS, 24, channels)
    deep = slot("timm", depth=5)
    with deep.at(SPACING):
        assert deep.get_embed().shape == (5, 2, HEADS, 24, channels)
        assert deep.get_embed()[3, 1].equal(deep.get_embed().select(0, 3).select(0, 1))
    deep.update_feat_shape((2, 3))
    assert deep.get_embed().shape == (5, HEADS, 6, channels)
    volume = PrimusRope(SIZE, False, (2, 3, 4), (2, 3, 4))
    assert volume.get_embed().shape == (24, 3 * SIZE)


def test_sequences_may_start_anywhere() -> None:
    """Memories stand before token 0, and a decoder's cache behind it."""
    rope = XTransformersRope(SIZE, spacing=0.5)
    whole, _ = rope(torch.arange(-3, 9))
    torch.testing.assert_close(rope(torch.arange(9))[0], whole[:, 3:])
    torch.testing.assert_close(rope.forward_from_seq_len(9)[0], whole[:, 3:])
    torch.testing.assert_close(rope(torch.arange(-3, 9).double().unsqueeze(-1) * 0.5)[0], whole)
    rows = torch.stack((torch.arange(12), torch.arange(-3, 9)))
    with rope.at(torch.tensor([[0.25], [0.5]])):
        torch.testing.assert_close(rope(rows)[0][1:], whole)
        torch.testing.assert_close(rope(torch.arange(-3, 9))[0][1:], whole)


def test_transformers_tables_have_the_images_dtype() -> None:
    rope = slot("transformers")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert {table.dtype for table in rope(IMAGES.to(dtype))} == {dtype}


@pytest.mark.parametrize("cls", [RopeSlot, TimmRope, PrimusRope, DINOv3Rope, XTransformersRope])
def test_constructors_show_the_keywords_they_take(cls: type[RopeSlot]) -> None:
    shown = inspect.signature(cls).parameters
    assert {"reference_spacing", "directions", "spacing"} <= set(shown)
    assert "interleaved" not in shown
    assert list(shown)[-2:] == ["device", "dtype"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_library_decides_is_refused(kind: str) -> None:
    with pytest.raises(TypeError, match=r"Rope\(\) got an unexpected keyword argument 'interleaved'"):
        slot(kind, interleaved=False)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_places(kind: str) -> None:
    rope = slot(kind)
    for error, message, where in (
        (ValueError, "spacing or coordinates must be given; got neither", {}),
        (ValueError, "spacing must be greater than 0", {"spacing": 0.0}),
        (ValueError, "spacing must have one value for each of the 2 axes", {"spacing": (1.0, 1.0, 1.0)}),
        (TypeError, "spacing must be float64 or float32", {"spacing": torch.ones(2).half()}),
        (TypeError, "coordinates must be float64 or float32", {"coordinates": torch.ones(24, 2).half()}),
        (TypeError, r"coordinates must be a torch\.Tensor", {"coordinates": (4, 6)}),
    ):
        with pytest.raises(error, match=message), rope.at(**where):
            pass
    with rope.at(coordinates=torch.zeros(23, 2)), pytest.raises(ValueError, match="coordinates must have shape"):
        tables(rope)
    with rope.at(coordinates=Grid((3, 6))), pytest.raises(ValueError, match="must"):
        tables(rope)
    with pytest.raises(TypeError, match="spacing must be a number or one number per axis; got a tensor"):
        slot(kind, spacing=torch.ones(2))


def test_a_grid_of_as_many_tokens_is_not_yet_the_models() -> None:
    for kind in ("timm", "primus", "transformers"):
        rope = slot(kind)
        with (
            rope.at(coordinates=Grid((6, 4))),
            pytest.raises(ValueError, match=r"coordinates must be a grid of the model's tokens, \(4, 6\)"),
        ):
            tables(rope)


def test_what_only_one_library_says() -> None:
    with pytest.raises(ValueError, match="shape must be given"):
        TimmRope(SIZE, 1).get_embed()
    with pytest.raises(TypeError, match="rotate_half must be True or False"):
        TimmRope(SIZE, 1, rotate_half="half")
    with pytest.raises(TypeError, match="model must be a timm Eva with a rope; got Linear"):
        TimmRope.for_model(torch.nn.Linear(2, 2))
    for arguments in ((SIZE, True, SHAPE, SHAPE), (SIZE, False, SHAPE, (2, 3))):
        with pytest.raises(ValueError, match="in_pixels must be False and ref_feat_shape must be feat_shape"):
            PrimusRope(*arguments)
    with pytest.raises(ValueError, match=r"positions must be given for 2-D tokens: encoder\(x, pos=coordinates\)"):
        XTransformersRope(SIZE, 2)(torch.arange(24))
    with pytest.raises(TypeError, match=r"t must be a torch\.Tensor"):
        XTransformersRope(SIZE)(24)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_once_for_all_spacings(kind: str) -> None:
    rope = slot(kind)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: torch.stack(tables(rope)), backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for spacing in (0.3, (0.5, 2.0), SPACING[1]):
            with rope.at(spacing):
                torch.testing.assert_close(compiled(), torch.stack(tables(rope)))
