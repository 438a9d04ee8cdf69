"""The same numbers from threads, processes and seeds, and nothing that asks the network."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import model_cases
import pytest
import torch
from layer_cases import VARIANTS, make_layer, tokens
from loaded_networks import Labelled
from model_cases import image_of
from spatial_grouping_attention import WindowedSelfAttention
from spatial_grouping_attention.models import GroupingViT
from torch import Tensor, nn
from torch.utils.data import DataLoader

ALONE = """
import sys
import torch

def refuse(event, _):
    if event.startswith("socket.") or event == "urllib.Request":
        raise AssertionError(f"no network is needed here: {event}")

sys.addaudithook(refuse)
import spatial_grouping_attention as package
from spatial_grouping_attention import functional, models
x = torch.randn(1, 20, 16)
for variant in ("Dense", "Sparse", "Deformable"):
    layer = getattr(package, f"{variant}SpatialGroupingAttention")(16, 2, 3, 2)
    layer(x, 1.0, (4, 5)).assignment.upsample(torch.ones(1, 20, 1)).sum().backward()
package.WindowedSelfAttention(16, 2)(x, 1.0, (4, 5)).sum().backward()
functional.grouping_attention(x[None], x[None], x[None])
output = models.grouping_vit_nano(2, 1, 2, num_candidates=3)(torch.randn(1, 1, 17, 16))
models.panoptic_segments(output)
output.logits.sum().backward()
"""

# What a process waits for that never compiles: torch's compiler takes a second and more to import.
EAGER = """
import sys
import einops
import torch
einops.rearrange(torch.ones(1), "a -> a 1")
by_einops = "torch._dynamo" in sys.modules  # which imports it before 0.8.2
import spatial_grouping_attention as package
x = torch.randn(1, 20, 16)
for variant in ("Dense", "Sparse", "Deformable"):
    layer = getattr(package, f"{variant}SpatialGroupingAttention")(16, 2, 3, 2)
    with torch.no_grad():
        output = layer(x, 1.0, (4, 5))
    members = output.assignment
    for values in (members.upsample(output.x_out), members.upsample(output.x_out, hard=True)):
        members.pool(values), members.sum(values)
    members.labels(), members.labels(per_head=True), members.usage(), members.boundaries(), members.matrix()
    if variant != "Deformable":  # which recomputes: torch's checkpoints import it
        layer(x, 1.0, (4, 5)).x_out.sum().backward()
package.WindowedSelfAttention(16, 2)(x, 1.0, (4, 5)).sum().backward()
assert by_einops or "torch._dynamo" not in sys.modules
"""

CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{
        variant: (lambda variant=variant: make_layer(variant, drop_path=0.3, mlp_dropout=0.3), lambda: tokens((6, 9)))
        for variant in VARIANTS
    },
    "window": (lambda: WindowedSelfAttention(8, 2, window=3, proj_dropout=0.3), lambda: tokens((6, 9))),
    **{
        head: (lambda head=head: model_cases.make(head=head, drop_path=0.3), lambda: image_of((9, 7)))
        for head in ("native", "fused", "panoptic")
    },
    "convolutions": (lambda: model_cases.make(stem="conv", mlp="conv", checkpoint=True), lambda: image_of((9, 7))),
}


def made(name: str) -> nn.Module:
    """The same module every time, which was never called."""
    torch.manual_seed(3)
    return CALLS[name][0]()


def result(module: nn.Module, x: Tensor) -> list[Tensor | None]:
    """What comes out of a step, forward and backward; parameters keep no gradient, which threads would share."""
    x = x.clone().requires_grad_(True)
    if isinstance(module, GroupingViT):
        output = module(x, 0.5)
        out = (output.logits, *(() if output.class_logits is None else (output.class_logits,)))
    elif isinstance(module, WindowedSelfAttention):
        out = (module(x, 0.5, (6, 9)),)
    else:
        output = module(x, 0.5, (6, 9))
        out = output.x_out, output.assignment.upsample(output.x_out)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    total = torch.stack([each.square().sum() for each in out]).sum()
    return [*(each.detach() for each in out), *torch.autograd.grad(total, wanted, allow_unused=True)]


def assert_same(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("program", [ALONE, EAGER], ids=["nothing asks the network", "nothing imports the compiler"])
def test_a_process_of_its_own(program: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CALLS)
def test_threads_share_a_module(name: str) -> None:
    inputs = [factor * CALLS[name][1]() for factor in (1.0, 2.0)]
    want = [result(made(name).eval(), x) for x in inputs]
    shared = made(name).eval()
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(lambda x: result(shared, x), 2 * inputs), 2 * want, strict=True):
            assert_same(got, expected)


@pytest.mark.parametrize("name", CALLS)
def test_a_seed_decides_construction_and_training(name: str) -> None:
    first, again, x = made(name).train(), made(name).train(), CALLS[name][1]()
    assert_same(list(first.state_dict().values()), list(again.state_dict().values()))
    torch.manual_seed(5)
    want = result(first, x)
    torch.manual_seed(5)
    assert_same(result(again, x), want)
    if name != "convolutions":
        others = (result(again, x)[0] for _ in range(5))
        assert any(not torch.equal(other, want[0]) for other in others), "else nothing is drawn"


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CALLS)
def test_deterministic_algorithms_are_used_throughout(name: str, request: pytest.FixtureRequest) -> None:
    module, x = made(name).eval(), CALLS[name][1]()
    want = result(module, x)
    request.getfixturevalue("deterministic")
    assert_same(result(module, x), want)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "start",
    [pytest.param("fork", marks=pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")), "spawn"],
)
def test_loaders_take_a_network_into_their_workers(start: str) -> None:
    examples = Labelled(made("native").eval())
    want = torch.stack([examples[i] for i in range(3)])  # so it has been called in this process
    loader = DataLoader(examples, batch_size=2, num_workers=1, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), want)
