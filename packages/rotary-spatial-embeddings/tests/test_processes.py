"""What importing does and does not, and the same numbers from threads, processes and seeds."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from loader_cases import Rotated
from RoSE import MultiResolutionBlock, RoSEMultiHeadAttention, RoSEMultiHeadCrossAttention, RotarySpatialEmbedding
from torch import Tensor, nn
from torch.utils.data import DataLoader

# Beyond torch's own, in seconds of the processor: of those on the wall, others take their share.
IMPORT_SECONDS = 0.05

IMPORTING = """
import sys, time, warnings
import torch

def refuse(event, _):
    if event.startswith("socket.") or event == "urllib.Request":
        raise AssertionError(f"no network is needed here: {event}")

sys.addaudithook(refuse)
warnings.simplefilter("error")
began = time.process_time()
import RoSE
print(time.process_time() - began)

x = torch.randn(2, 12, 16)
RoSE.RotarySpatialEmbedding(16, 2)(x, 0.5, (3, 4)).sum()
RoSE.RoSEMultiHeadCrossAttention(16, 2).attend(x, x, x, 0.5, (3, 4))
RoSE.RoSEMultiHeadAttention(16, 2)(x, 0.5, (3, 4)).sum().backward()
RoSE.MultiResolutionBlock(16, 2)(x, 0.5, (3, 4)).sum().backward()
RoSE.augment_coordinates(RoSE.Grid((3, 4)).coordinates(), shift=1.0)
"""

MODULES: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: RotarySpatialEmbedding(16, 2, spacing_transform="power"),
    "fixed embedding": lambda: RotarySpatialEmbedding(16, 2, learnable=False, rotary_ratio=0.5),
    "scores": lambda: RoSEMultiHeadCrossAttention(16, 2),
    "attention": lambda: RoSEMultiHeadAttention(16, 2, attn_dropout=0.3, proj_dropout=0.3),
    "block": lambda: MultiResolutionBlock(16, 2, mlp_dropout=0.3, drop_path=0.3),
}


def made(name: str) -> nn.Module:
    """The same module every time."""
    torch.manual_seed(3)
    return MODULES[name]()


def result(module: nn.Module, x: Tensor) -> list[Tensor]:
    """What comes out of a step, forward and backward; parameters keep no gradient, which threads would share."""
    x = x.clone().requires_grad_(True)
    sides = (x, x.flip(1)) if isinstance(module, RoSEMultiHeadCrossAttention) else (x,)
    out = module(*sides, 0.5, (3, 4))
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(got, want, strict=True))


INPUTS = [torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(i)) for i in range(6)]


def test_importing_is_quick_and_silent_and_nothing_asks_the_network() -> None:
    seconds = []
    keeping = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    while min(seconds, default=1.0) > IMPORT_SECONDS and len(seconds) < 5:  # a busy machine is slow now and then
        done = subprocess.run([sys.executable, "-c", IMPORTING], env=keeping, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
    assert min(seconds) < IMPORT_SECONDS, seconds


@pytest.mark.parametrize("name", MODULES)
def test_threads_share_a_module(name: str) -> None:
    """One that was not called before: whatever it keeps from its first call, two threads make at once."""
    want = [result(made(name).eval(), x) for x in INPUTS]
    shared = made(name).eval()
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(lambda x: result(shared, x), 5 * INPUTS), 5 * want, strict=True):
            assert_same(got, expected)


@pytest.mark.parametrize("name", MODULES)
def test_a_seed_decides_construction_and_training(name: str) -> None:
    first, again = made(name), made(name)
    assert_same(list(first.state_dict().values()), list(again.state_dict().values()))
    torch.manual_seed(5)
    want = result(first, INPUTS[0])
    torch.manual_seed(5)
    assert_same(result(again, INPUTS[0]), want)
    if name in ("attention", "block"):
        torch.manual_seed(6)
        assert not torch.equal(result(again, INPUTS[0])[0], want[0]), "else nothing is drawn"


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", MODULES)
def test_deterministic_algorithms_are_used_throughout(name: str, request: pytest.FixtureRequest) -> None:
    module = made(name).eval()
    want = result(module, INPUTS[0])
    request.getfixturevalue("deterministic")
    assert_same(result(module, INPUTS[0]), want)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "start",
    [pytest.param("fork", marks=pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")), "spawn"],
)
def test_loaders_take_a_module_into_their_workers(start: str) -> None:
    examples = Rotated(made("embedding"))
    want = torch.stack([examples[i] for i in range(4)])  # so it has been called in this process
    loader = DataLoader(examples, batch_size=2, num_workers=1, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), want)
