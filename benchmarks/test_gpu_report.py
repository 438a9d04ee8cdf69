"""That one failure of gpu_report.py costs no more than itself, and that gpu_networks.py runs.

TRITON_INTERPRET=1 PYTHONPATH=... python -m pytest benchmarks -m triton
"""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import gpu_networks
import gpu_report
import gpu_report_cases
import gpu_report_correctness as checks
import gpu_report_timing as timing
from gpu_report_timing import Contender, Report

pytestmark = pytest.mark.triton


@pytest.fixture
def report(tmp_path: Path) -> Report:
    made = Report(60.0, tmp_path / "report.json")
    made.bandwidth = 1e9
    return made


def works() -> Callable[[], None]:
    return lambda: None


def cannot_be_made() -> Callable[[], None]:
    raise ImportError("no such peer")


def cannot_be_called() -> Callable[[], object]:
    return lambda: 1 / 0


def on_disk(report: Report) -> dict:
    assert report.path is not None
    return json.loads(report.path.read_text())


def test_contenders_fail_alone(report: Report) -> None:
    made = {"unmade": cannot_be_made, "uncalled": cannot_be_called, "fine": works}
    report.section("one", 10, {name: Contender(make) for name, make in made.items()})
    rows = on_disk(report)["measurements"]["one"]
    assert rows["unmade"]["skipped"] == "ImportError: no such peer"
    assert rows["uncalled"]["skipped"].startswith("ZeroDivisionError")
    assert rows["fine"]["median"] >= 0.0


def test_parts_fail_alone_and_what_came_before_is_on_disk(report: Report) -> None:
    def breaks() -> None:
        report.section("before", 10, {"fine": Contender(works)})
        raise RuntimeError("the GPU\nis gone")

    report.guarded("first", breaks)
    report.guarded("second", lambda: {"kept": 1})
    found = on_disk(report)
    assert found["first"] == {"failed": "RuntimeError: the GPU is gone"}
    assert found["second"] == {"kept": 1}
    assert "fine" in found["measurements"]["before"]


def test_what_is_wrong_or_late_is_not_timed(report: Report) -> None:
    report.wrong.add("triton")
    report.section("one", 10, {"kernels": Contender(cannot_be_made, "triton"), "peer": Contender(works)})
    assert "disagree" in on_disk(report)["measurements"]["one"]["kernels"]["skipped"]
    assert report.deadline == math.inf
    report.seconds = -1.0
    report.start_clock()
    report.section("two", 10, {"peer": Contender(works)})
    assert on_disk(report)["measurements"]["two"]["peer"] == {"skipped": "out of time"}


def test_a_wrong_kernel_is_named_and_the_rest_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(check: checks.Check) -> tuple[float, float]:
        if check.engine == "triton" and check.dtype == torch.float16:
            raise RuntimeError("illegal memory access")
        return (1.0 if check.engine == "rotation" else 0.0), 1e-5

    monkeypatch.setattr(checks, "run", run)
    found = checks.correctness()
    assert found["wrong"] == ["rotation", "triton"]
    assert len(found["errors"]) == len(checks.every_check())


class FakeCUDA:
    """Streams, captures and synchronisation as torch.cuda has them, without a device."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current, self.capturing, self.checked = "default", False, False
        for name in ("Stream", "CUDAGraph", "Event"):
            patch.setattr(torch.cuda, name, mock.MagicMock(side_effect=lambda *a, **k: mock.MagicMock()))
        patch.setattr(torch.cuda, "stream", self.stream)
        patch.setattr(torch.cuda, "graph", self.graph)
        patch.setattr(torch.cuda, "set_sync_debug_mode", self.set_sync_debug_mode)
        for name in ("current_stream", "synchronize", "empty_cache"):
            patch.setattr(torch.cuda, name, mock.MagicMock())
        patch.setattr(timing, "DEVICE", "cuda")
        patch.setattr("triton.testing.do_bench", lambda call, **options: (call(), [1.0, 2.0, 3.0])[1])
        patch.setattr(timing, "FLUSHED_BYTES", 1)
        patch.setattr(torch, "empty", mock.MagicMock())
        patch.setattr(timing.statistics, "median", lambda times: 1.5e-3)

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph: object, stream: object) -> Iterator[None]:
        assert stream is self.current
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def set_sync_debug_mode(self, mode: str) -> None:
        self.checked = mode == "error"

    def wait(self) -> None:
        """What a call does that waits for the device."""
        if self.checked:
            raise RuntimeError("called a synchronizing CUDA operation")
        assert not self.capturing, "a capture was spoilt"


def test_making_warming_and_capturing_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a backward pass needs, which runs on the stream of its forward pass."""
    cuda = FakeCUDA(monkeypatch)
    met = []

    def make() -> Callable[[], None]:
        met.append(cuda.current)
        return lambda: met.append(cuda.current)

    row = timing.measure(make)
    assert row == {"median": 2e-3, "q1": 1e-3, "q3": 3e-3, "graph": 1.5e-3}
    assert len(met) > 4
    assert met[0] != "default"
    assert all(stream is met[0] for stream in met)


def test_what_synchronises_is_never_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed capture would leave the allocator in a bad state for all that follow."""
    cuda = FakeCUDA(monkeypatch)
    row = timing.measure(lambda: cuda.wait)
    assert row["graph"] is None
    assert "synchronizing" in row["not_captured"]
    assert row["median"] == 2e-3
    assert not cuda.checked


def test_workers_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TINY", False)
    found = timing.in_workers(math.sqrt, [4.0, -1.0, 9.0], timing.said)
    assert found[0::2] == [2.0, 3.0]
    assert str(found[1]).startswith("ValueError")


@pytest.mark.slow
def test_the_report_fails_at_its_end_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a part that fails and a kernel that is wrong, everything else is there."""
    path = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--json", str(path)])
    monkeypatch.setattr(gpu_report, "correctness", lambda: {"wrong": ["triton"]})
    monkeypatch.setattr(gpu_report_cases, "first_calls", cannot_be_made)
    monkeypatch.setattr(gpu_report_cases, "rotation", lambda report: 1 / 0)
    with pytest.raises(
        SystemExit, match=r"disagree with float64: \['triton'\]; failed: \['first_call_seconds', 'rotation'\]"
    ):
        gpu_report.main()
    titles = json.loads(path.read_text())["measurements"]
    assert any(title.startswith("dense") for title in titles)
    assert any(title.startswith("assign") for title in titles)


@pytest.mark.slow
def test_networks_are_measured_and_peers_may_be_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(*_: object) -> None:
        raise ImportError("no such peer")

    path = tmp_path / "networks.json"
    monkeypatch.setattr(sys, "argv", ["gpu_networks.py", "--json", str(path)])
    monkeypatch.setattr(gpu_networks, "swin_unetr", absent)
    gpu_networks.main()
    found = json.loads(path.read_text())
    for precision in gpu_networks.PRECISIONS:
        ours, twin, peer = found["measurements"][f"segmentation, 64 x 64, 1 images, {precision}"].values()
        assert ours["median"] > 0
        assert twin["median"] > 0
        assert peer == {"skipped": "ImportError: no such peer"}
    assert 0 < found["autocast from float32, segmentation, 64 x 64"]["grouping_vit_nano"] < 0.1
    assert len(found["failed to compile ahead"]) == len(gpu_networks.PRECISIONS)
