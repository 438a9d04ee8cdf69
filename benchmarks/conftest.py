"""How pytest runs what is here: ``pytest benchmarks/bench_rotation.py [--quick] [--benchmark-json=FILE]``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only hold the benchmarks' entries to their oracles")


def pytest_configure(config: pytest.Config) -> None:
    config.absent_entries = []  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name.startswith("bench_"):
            # Other libraries warn of matters of their own.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def as_told() -> Iterator[None]:
    """As figures are told for: one thread, an allocator that keeps its pages, and float32 that is that on a GPU too."""
    import probes

    before, convolved = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    # Left to itself cuDNN convolves with the 10 bits of TF32, which no product of matrices does.
    torch.backends.cudnn.allow_tf32 = False
    probes.PAGES_KEPT = probes.keep_pages()
    yield
    torch.set_num_threads(before)
    torch.backends.cudnn.allow_tf32 = convolved


@pytest.fixture
def recorder(request: pytest.FixtureRequest, benchmark: Any, as_told: None) -> Any:
    """Where a case's results go."""
    from harness import Recorder

    return Recorder(benchmark, request.config.getoption("--quick"), request.config.absent_entries)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    from probes import machine

    return machine()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    import subprocess

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    sources = git("status", "--porcelain", "--", "../packages/*/src", "*.py")
    return {"id": git("rev-parse", "HEAD") or None, "dirty": bool(sources)}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["absent"] = config.absent_entries  # type: ignore[attr-defined]
