"""One thread per worker, and hypothesis without time limits: a failure must mean a broken law."""

import gc
import os
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from assignment_cases import ASSIGNMENTS
from hypothesis import HealthCheck, settings
from spatial_grouping_attention import Assignment

torch.set_num_threads(1)

settings.register_profile(
    "laws",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("laws")

if os.environ.get("TRITON_INTERPRET") == "1":
    from quick_interpreter import remember_builtins

    remember_builtins()


@pytest.fixture(params=ASSIGNMENTS)
def assignment(request: pytest.FixtureRequest) -> Assignment:
    make, *arguments = ASSIGNMENTS[request.param]
    return make(*arguments)


@pytest.fixture
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself cuDNN convolves float32 in 3-D with the 10 bits of TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def unsynchronised() -> Iterator[Callable[[], None]]:
    """Makes whatever waits for the GPU an error, until the test ends."""

    def forbid() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")

    yield forbid
    torch.cuda.set_sync_debug_mode("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start what takes longest first, so that no worker is left with it at the end."""
    items.sort(key=lambda item: "test_memory.py" not in item.nodeid)


def pytest_collection_finish() -> None:
    """Let what imports have made stay: searches for garbage among all of torch take a tenth of the time of tests."""
    gc.collect()
    gc.freeze()
