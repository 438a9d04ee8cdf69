"""Bad input is refused before computing, in words that name the rule and the value."""

import ast
import math
from pathlib import Path

import pytest
import RoSE
import torch
from RoSE import (
    AliasingWarning,
    Grid,
    MultiResolutionBlock,
    RoSEMultiHeadAttention,
    RoSEMultiHeadCrossAttention,
    RotarySpatialEmbedding,
)
from RoSE.functional import cos_sin, phases, rotate

NAN, INF = math.nan, math.inf
X = torch.randn(2, 6, 32)
R = RotarySpatialEmbedding(32, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (((0, 2),), ValueError, r"shape\[0\] must be at least 1; got 0"),
        (((),), ValueError, "at least one axis"),
        (((2.0, 2),), TypeError, r"shape\[0\] must be an int; got 2.0"),
        ((True,), TypeError, "shape must be a sequence"),
        (("23",), TypeError, "shape must be a sequence"),
        ((torch.tensor([2, 3]),), TypeError, "shape must be a sequence"),
        (((2, 3), 0.0), ValueError, "spacing must be greater than 0; got 0.0"),
        (((2, 3), (1.0, -2.0)), ValueError, r"spacing\[1\] must be greater than 0; got -2.0"),
        (((2, 3), (1.0, NAN)), ValueError, r"spacing\[1\] must be finite; got nan"),
        (((2, 3), INF), ValueError, "spacing must be finite; got inf"),
        (((2, 3), (1.0,)), ValueError, r"one value for each of the 2 axes; got \(1.0,\)"),
        (((2, 3), "ab"), TypeError, "spacing must be a number"),
        (((2, 3), None), TypeError, "spacing must be a number"),
        (((2, 3), (1.0, "b")), TypeError, r"spacing\[1\] must be a real number; got 'b'"),
        (((2, 3), True), TypeError, "spacing must be a real number; got True"),
        (
            ((2, 3), torch.tensor([1, 2])),
            TypeError,
            "spacing must be float64 or float32; got torch.int64",
        ),
        (((2, 3), torch.tensor([1.0, 0.0])), ValueError, "spacing must be finite and greater than 0; got"),
        (((2, 3), torch.ones(3)), ValueError, r"shape \(2,\) or \(batch, 2\); got \(3,\)"),
        (((2, 3), torch.ones(1, 1, 2)), ValueError, r"got \(1, 1, 2\)"),
        (((2, 3), 1.0, (0.0, INF)), ValueError, r"origin\[1\] must be finite"),
        (((2, 3), 1.0, torch.tensor([NAN, 0.0])), ValueError, "origin must be finite; got"),
        (((2, 3), torch.ones(2, 2), torch.zeros(3, 2)), ValueError, "agree on the batch size .* got 2 and 3"),
    ],
)
def test_grid(arguments: tuple[object, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Grid(*arguments)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((30, 4), {}, ValueError, "divisible by num_heads; got dim=30, num_heads=4"),
        ((30, 2), {}, ValueError, "15 channels a head"),
        ((32.0, 2), {}, TypeError, "dim must be an int; got 32.0"),
        ((32, 0), {}, ValueError, "num_heads must be at least 1; got 0"),
        ((32, 2, 0), {}, ValueError, "spatial_dims must be at least 1; got 0"),
        ((32, 2), {"base_theta": 1.0}, ValueError, "base_theta must be greater than 1; got 1.0"),
        ((32, 2), {"base_theta": "10"}, TypeError, "base_theta must be a real number; got '10'"),
        ((32, 2), {"rotary_ratio": 1.5}, ValueError, r"rotary_ratio must be in \[0, 1\]; got 1.5"),
        ((32, 2), {"rotary_ratio": NAN}, ValueError, "rotary_ratio must be finite; got nan"),
        ((32, 2), {"init_jitter_std": -1.0}, ValueError, "init_jitter_std must be at least 0; got -1.0"),
        ((32, 2), {"frequency_scaling": "log"}, ValueError, "frequency_scaling must be one of 'none', .* got 'log'"),
        ((32, 2), {"directions": "diagonal"}, ValueError, "directions must be one of .* got 'diagonal'"),
        ((32, 2), {"rotary_partition": "dims"}, ValueError, "rotary_partition must be one of"),
        ((32, 2), {"spacing_transform": "exp"}, ValueError, "spacing_transform must be one of"),
        ((32, 2), {"reference_spacing": 0.0}, ValueError, "reference_spacing must be greater than 0"),
        ((32, 2), {"reference_spacing": torch.ones(2)}, TypeError, "reference_spacing must be a number"),
        ((32, 2), {"wavelengths": 3.0}, TypeError, "wavelengths must be a pair"),
        ((32, 2), {"wavelengths": (9.0, 3.0)}, ValueError, r"\(shortest, longest\); got \(9.0, 3.0\)"),
        ((32, 2), {"wavelengths": (0.0, 3.0)}, ValueError, "wavelengths must be greater than 0"),
        ((32, 2), {"wavelengths": (1.0, 3.0), "reference_spacing": 2.0}, ValueError, "reference_spacing must stay 1"),
        ((32, 2), {"dtype": torch.int32}, TypeError, "dtype must be float64, float32, .* got torch.int32"),
        ((2, 1, 3), {"directions": "axial"}, ValueError, "at least one plane per axis"),
    ],
)
def test_embedding_options(
    arguments: tuple[object, ...], options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        RotarySpatialEmbedding(*arguments, **options)


JAGGED = torch.nested.nested_tensor([torch.randn(2, 32), torch.randn(4, 32)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: R(X.numpy(), 1.0, (2, 3)), TypeError, "x must be a torch.Tensor; got ndarray"),
        (
            lambda: R(X.long(), 1.0, (2, 3)),
            TypeError,
            "x must be float64, .* or float16; got torch.int64",
        ),
        (
            lambda: R(X[0], 1.0, (2, 3)),
            ValueError,
            r"\(batch, tokens, 32\) in layout 'bnd'; got \(6, 32\)",
        ),
        (lambda: R(X[..., :30], 1.0, (2, 3)), ValueError, r"got \(2, 6, 30\)"),
        (
            lambda: R(X, 1.0, (2, 3), layout="bnhd"),
            ValueError,
            r"x must have shape \(batch, tokens, 2, 16\) in layout 'bnhd'; got",
        ),
        (lambda: R(X, 1.0, (2, 3), layout="nbd"), ValueError, "layout must be one of 'bnd', 'bnhd', 'bhnd'; got 'nbd'"),
        (lambda: R(X, 1.0), ValueError, "grid_shape must be given for 2-D tokens; got None"),
        (
            lambda: R(X, 1.0, (2, 4)),
            ValueError,
            r"one point for each of the 6 tokens; got \(2, 4\) with 8",
        ),
        (lambda: R(X, 1.0, (6,)), ValueError, r"grid_shape must have 2 ints, one per axis; got \(6,\)"),
        (lambda: R(X, -1.0, (2, 3)), ValueError, "spacing must be greater than 0; got -1.0"),
        (lambda: R(X, torch.ones(3, 2), (2, 3)), ValueError, "must have the batch size 2; got 3"),
        (lambda: R(X, coordinates=torch.zeros(5, 2)), ValueError, r"shape \(6, 2\) or \(batch, 6, 2\).* got \(5, 2\)"),
        (lambda: R(X, coordinates=torch.zeros(3, 6, 2)), ValueError, "must have the batch size 2; got 3"),
        (lambda: R(X, coordinates=torch.zeros(6, 2).long()), TypeError, "coordinates must be float64"),
        (lambda: R(X, coordinates=torch.full((6, 2), NAN)), ValueError, "coordinates must be finite"),
        (lambda: R(X, coordinates=[[0.0, 0.0]] * 6), TypeError, r"coordinates\[0\] must be a RoSE.Grid or a tensor"),
        (lambda: R(X, coordinates=Grid(6)), ValueError, r"coordinates must have 2 axes; got shape \(6,\)"),
        (
            lambda: R(X, 1.0, coordinates=Grid((2, 3))),
            ValueError,
            "coordinates must be the only place",
        ),
        (lambda: R(X, 1.0, coordinates=torch.zeros(6, 2)), ValueError, "coordinates must stand alone"),
        (lambda: R(X, 1.0, (2, 3), num_prefix_tokens=-1), ValueError, "num_prefix_tokens must be at least 0"),
        (lambda: R(X, 1.0, (2, 3), num_prefix_tokens=7), ValueError, "at most the 6 tokens of x; got 7"),
        (lambda: R.rotate_pair(X, X[:, :4], 1.0, (2, 3)), ValueError, "same number of tokens .* got 6 and 4"),
        (lambda: R(JAGGED, 1.0, (2, 3)), TypeError, "coordinates must be a tensor for nested features"),
        (
            lambda: R(JAGGED, coordinates=torch.zeros(6, 2), num_prefix_tokens=1),
            ValueError,
            "num_prefix_tokens must be 0",
        ),
        (lambda: R(JAGGED, coordinates=torch.zeros(6, 2), layout="bhnd"), ValueError, "ragged dimension 1"),
        (lambda: RotarySpatialEmbedding(32, 2, 2, rotary_ratio=0.0)(X, 1.0, (9, 9)), ValueError, "81 points"),
    ],
)
def test_embedding_calls(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_nested_coordinates_need_the_lengths_of_the_features() -> None:
    where = torch.nested.nested_tensor([torch.zeros(3, 2), torch.zeros(3, 2)], layout=torch.jagged)
    with pytest.raises(ValueError, match="sequence lengths"):
        R(JAGGED, coordinates=where)


C, A, B = RoSEMultiHeadCrossAttention(32, 2, 2), RoSEMultiHeadAttention(32, 2, 2), MultiResolutionBlock(32, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: C(X, X[:1], 1.0, (2, 3)),
            ValueError,
            r"k must have shape \(batch=2, tokens, dim=32\); got",
        ),
        (lambda: C(X.int(), X, 1.0, (2, 3)), TypeError, "q must be float64"),
        (lambda: C(X[0], X, 1.0, (2, 3)), ValueError, r"q must have shape .*; got \(6, 32\)"),
        (lambda: C.attend(X, X, X[:, :5], 1.0, (2, 3)), ValueError, r"got v \(2, 5, 32\) for k \(2, 6, 32\)"),
        (lambda: C.attend(X, X, X[..., :31], 1.0, (2, 3)), ValueError, "divisible by 2 heads"),
        (lambda: C.attend(X, X, X, 1.0, (2, 3), dropout_p=2.0), ValueError, r"dropout_p must be in \[0, 1\)"),
        (lambda: RoSEMultiHeadCrossAttention(32, 2, scale=0.0), ValueError, "scale must be greater than 0"),
        (
            lambda: RoSEMultiHeadCrossAttention(32, 2, max_score_bytes=0),
            ValueError,
            "max_score_bytes must be at least 1",
        ),
        (lambda: RoSEMultiHeadCrossAttention(32, 2, feature_dims=3), TypeError, "feature_dims"),  # type: ignore[call-arg]
        (lambda: A(X[..., :8], 1.0, (2, 3)), ValueError, r"x must have shape .*channels=32"),
        (lambda: A(X, 1.0, (2, 3), context=X[..., :8]), ValueError, r"context must have shape .*channels=32"),
        (lambda: RoSEMultiHeadAttention(32, 2, attn_dropout=1.5), ValueError, r"attn_dropout must be in \[0, 1\)"),
        (lambda: B([X], [1.0, 1.0], [(2, 3)]), ValueError, "spacing must be a list with one entry for each of the 1"),
        (lambda: B([X, X], 1.0, [(2, 3)] * 2), ValueError, "spacing must be a list"),
        (lambda: B([X], [1.0], [(2, 3)], leading_tokens=True), ValueError, "at least one grid's tokens"),
        (lambda: B(X, 1.0, (2, 3), leading_tokens=True), ValueError, "leading_tokens must be False unless x is a list"),
        (lambda: B([X, X[:1]], [1.0] * 2, [(2, 3)] * 2), ValueError, r"x\[1\] must be \(batch, tokens, 32\)"),
        (lambda: B([X.long()], [1.0], [(2, 3)]), TypeError, r"x\[0\] must be float64"),
        (lambda: MultiResolutionBlock(32, 2, drop_path=1.0), ValueError, r"drop_path must be in \[0, 1\); got 1.0"),
        (lambda: MultiResolutionBlock(32, 2, mlp_ratio=0.0), ValueError, "mlp_ratio must be greater than 0"),
    ],
)
def test_modules(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


COS = torch.ones(6, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rotate(X.long(), COS, COS), TypeError, "x must be float64"),
        (lambda: rotate(X, COS.long(), COS), TypeError, "cos must be float64"),
        (lambda: rotate(X, COS, COS[:5]), ValueError, r"one shape; got \(6, 4\) and \(5, 4\)"),
        (lambda: rotate(X, torch.ones(17), torch.ones(17)), ValueError, "at most half of x's channels"),
        (lambda: rotate(X, torch.ones(5, 4), torch.ones(5, 4)), ValueError, r"leading dimensions \(2, 6\); got \(5,\)"),
        (lambda: rotate(X[0], torch.ones(2, 6, 4), torch.ones(2, 6, 4)), ValueError, "leading dimensions"),
        (lambda: phases(torch.zeros(6, 3), R.freqs), ValueError, r"coordinates must have shape \(\.\.\., tokens, 2\)"),
        (lambda: phases(torch.zeros(6, 2), R.freqs[0]), ValueError, "freqs must have shape"),
        (lambda: phases(torch.zeros(6, 2).long(), R.freqs), TypeError, "coordinates must be float64"),
        (lambda: cos_sin(torch.zeros(6), torch.bfloat16), ValueError, "dtype must be torch.float32 or torch.float64"),
        (lambda: cos_sin(torch.zeros(6).long()), TypeError, "angles must be float64"),
    ],
)
def test_functional(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("name", ["interleaved", "learnable"])
def test_words_are_no_flags(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True or False; got 'half'"):
        RotarySpatialEmbedding(16, 2, 2, **{name: "half"})


def test_an_activation_must_make_a_module() -> None:
    with pytest.raises(TypeError, match="mlp_activation must be callable"):
        MultiResolutionBlock(16, 2, mlp_activation="gelu")


def test_the_advice_on_aliasing_can_be_followed() -> None:
    coarse = RotarySpatialEmbedding(32, 4, 2, wavelengths=(1.0, 10.0), learnable=False, directions="axial")
    with pytest.warns(AliasingWarning, match="give wavelengths whose shortest is 2 or more"):
        coarse(torch.randn(1, 12, 32), 1.0, (3, 4))
    followed = RotarySpatialEmbedding(32, 4, 2, wavelengths=(2.0, 10.0), learnable=False, directions="axial")
    followed(torch.randn(1, 12, 32), 1.0, (3, 4))
    late = RotarySpatialEmbedding(32, 4, 2)
    late(torch.randn(1, 1, 32), 10.0, (1, 1))
    with pytest.warns(AliasingWarning, match="raise reference_spacing") as caught:
        late(torch.randn(1, 12, 32), 10.0, (3, 4))
    assert caught[0].filename == __file__  # the line to change, not one of ours


# What is not about a value: several reasons in a list, Python's own words, and a protocol.
OTHER_WORDS = ("the kernels cannot serve this call", "got an unexpected keyword argument", "is not hashable")


def test_every_message_names_a_rule_and_a_value() -> None:
    """``<name> must be <rule>; got <value>``, wherever the package refuses an argument."""
    looked_at = 0
    for path in Path(RoSE.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            if getattr(node.exc.func, "id", "") not in ("ValueError", "TypeError"):
                continue
            parts = [c.value for c in ast.walk(node.exc) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
            words = "".join(parts)
            looked_at += 1
            assert any(w in words for w in OTHER_WORDS) or ("must " in words and "; " in words and "got" in words), (
                words
            )
    assert looked_at > 40


def collated() -> list[torch.Tensor]:
    """What torch's default collation makes of one tuple of floats per sample."""
    return torch.utils.data.default_collate([(0.5, 0.7), (1.0, 0.3)])


# How spacings per sample arrive that are no tensor yet, and what to do with each.
PER_SAMPLE = {
    "collated tuples": collated,
    "tuples": lambda: [(0.5, 0.7), (1.0, 0.3)],
    "lists": lambda: [[0.5, 0.7], [1.0, 0.3]],
    "tensors": lambda: [torch.tensor([0.5, 0.7]), torch.tensor([1.0, 0.3])],  # MONAI's pixdim of a batch
    "many tensors": lambda: [torch.tensor([0.5, 0.7])] * 5,
    "numbers in tensors": lambda: [torch.tensor(0.5), torch.tensor(0.7)],
    "array": lambda: pytest.importorskip("numpy").array([[0.5, 0.7], [1.0, 0.3]]),
    "arrays": lambda: [pytest.importorskip("numpy").array([0.5, 0.7])] * 2,
}
TAKE_SPACINGS = {
    "Grid": lambda s: Grid((2, 3), s),
    "origin of a Grid": lambda s: Grid((2, 3), 1.0, s),
    "embedding": lambda s: R(X, s, (2, 3)),
    "rotate_pair": lambda s: R.rotate_pair(X, X, 1.0, (2, 3), s),
    "scores": lambda s: C(X, X, s, (2, 3)),
    "attend": lambda s: C.attend(X, X, X, s, (2, 3)),
    "attention": lambda s: A(X, s, (2, 3)),
    "block": lambda s: B(X, s, (2, 3)),
    "block of a list": lambda s: B([X], [s], [(2, 3)]),
    "constructor": lambda s: RotarySpatialEmbedding(32, 2, 2, reference_spacing=s),
    "constructor of a layer": lambda s: MultiResolutionBlock(32, 2, 2, reference_spacing=s),
}


@pytest.mark.parametrize("taker", TAKE_SPACINGS)
@pytest.mark.parametrize("form", PER_SAMPLE)
def test_spacings_per_sample_in_a_list_are_told_how_to_become_a_tensor(form: str, taker: str) -> None:
    words = r"must be a number, one number per axis, or one tensor, \(batch, 2\) .* torch\.stack\(\.\.\., -1\) where"
    if ("constructor" in taker and "tensors" in form) or (form == "collated tuples" and "constructor" in taker):
        words = r"reference_spacing must be a number or one number per axis; got a tensor, .* give its values, \.tolist"
    with pytest.raises(TypeError, match=words):
        TAKE_SPACINGS[taker](PER_SAMPLE[form]())


def test_the_advice_on_spacings_per_sample_can_be_followed() -> None:
    wanted = torch.tensor([[0.5, 0.7], [1.0, 0.3]], dtype=torch.float64)
    for made in (
        torch.as_tensor(PER_SAMPLE["tuples"](), dtype=torch.float64),
        torch.as_tensor(PER_SAMPLE["array"]()),
        torch.stack(PER_SAMPLE["tensors"](), 0),
        torch.stack(collated(), -1),
    ):
        torch.testing.assert_close(R(X, made, (2, 3)), R(X, wanted, (2, 3)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda np: Grid((2, 3), np.array(0.5)), r"spacing must be a number, .* got array\(0.5\) of type ndarray"),
        (lambda np: RotarySpatialEmbedding(32, 2, 2, reference_spacing=torch.ones(())), r"\.tolist\(\)"),
        (
            lambda np: RotarySpatialEmbedding(32, 2, 2, base_theta=torch.tensor(10.0)),
            r"base_theta must be a real number",
        ),
        (
            lambda np: RotarySpatialEmbedding(32, 2, 2, wavelengths=torch.tensor([1.0, 2.0])),
            r"wavelengths must be a pair",
        ),
        (lambda np: R(X.numpy(), 1.0, (2, 3)), "x must be a torch.Tensor; got ndarray"),
        (lambda np: R(X, coordinates=np.zeros((6, 2))), "coordinates must be a torch.Tensor; got ndarray"),
        (lambda np: A(X, 1.0, (2, 3), valid=np.ones((2, 6), bool)), "valid must be a torch.Tensor; got ndarray"),
        (lambda np: R(X, 1.0, torch.tensor([2, 3])), "grid_shape must be a sequence of ints"),
    ],
)
def test_what_is_no_tensor_or_no_number(call, words: str) -> None:
    numpy = pytest.importorskip("numpy", reason="headers of image files give NumPy numbers where it is installed")
    with pytest.raises(TypeError, match=words):
        call(numpy)


@pytest.mark.parametrize("module", [R, C, A, B], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("what", ["features", "spacing", "shape", "coordinates"])
def test_symbolic_tracing_is_told_the_ways_out(module: torch.nn.Module, what: str) -> None:
    given = {"spacing": 1.0, "grid_shape": (2, 3)}

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: torch.Tensor, other: object) -> torch.Tensor:
            features = x if what == "features" else X
            more = {"spacing": {**given, "spacing": other}, "shape": {**given, "grid_shape": other},
                    "coordinates": {"coordinates": other}}.get(what, given)  # fmt: skip
            return self.inner(features, features, **more) if module is C else self.inner(features, **more)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: torch.nn.Module, qualified_name: str) -> bool:
            return m is module

    class Through(torch.fx.Tracer):
        def is_leaf_module(self, m: torch.nn.Module, qualified_name: str) -> bool:
            return False

    with pytest.raises(
        TypeError, match=r"must be .* got a torch\.fx\.Proxy: .*make the module a leaf .*or use torch\.export"
    ):
        Through().trace(Model())
    if what == "features":
        graph = torch.fx.GraphModule(Model(), Tracer().trace(Model()))
        torch.testing.assert_close(graph(X, None), Model()(X, None))
