"""The packages that are on the index today, in a process of their own that takes turns with this one.

They have the import names of ours. ``python benchmarks/other_process.py --install`` fetches them, without what they
require, into a folder that only that process sees; torch and timm are the ones that are installed here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FOLDER = HERE.parent / ".benchmarks" / "index"
PINS = ("spatial-grouping-attention==2025.9.29.1947", "rotary-spatial-embeddings==2025.9.27.2133")


class IndexLayer:
    """A layer of the index's package, forward or with backward; like a bound computation, elsewhere."""

    leaves: dict[str, Any]

    def __init__(self, **settings: Any) -> None:
        from entries import Absent

        self.leaves = {}
        if not FOLDER.exists():
            raise Absent(f"not installed: python benchmarks/{Path(__file__).name} --install")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, json.dumps(settings)],
            env={**os.environ, "PYTHONPATH": f"{FOLDER}{os.pathsep}{HERE}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        started = self.ask("start")
        if "refused" in started:
            self.process.wait()
            raise Absent(started["refused"])
        self.result_bytes, self.parameters = started["result_bytes"], started["parameters"]
        self.operand_bytes = started["operand_bytes"]

    def ask(self, what: str, *arguments: Any) -> Any:
        """One question, one line of an answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([what, *arguments]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def error(self) -> float:
        """Its own float32 against its own float64: it computes another formula than we do."""
        return float(self.ask("error"))

    def timed(self, way: str) -> RemoteCall:
        return RemoteCall(self, way)

    def __del__(self) -> None:
        if process := getattr(self, "process", None):
            process.stdin.close()
            process.wait()
            process.stdout.close()


class RemoteCall:
    """A call that is made in that process, which times it by its own clock."""

    slow = False

    def __init__(self, layer: IndexLayer, way: str) -> None:
        self.layer = layer
        self.way = way

    def sample(self, repeats: int) -> float:
        return float(self.layer.ask("sample", self.way, repeats))

    def peak_bytes(self) -> int:
        return int(self.layer.ask("peak_bytes", self.way))

    def flops(self) -> int:
        return int(self.layer.ask("flops", self.way))


def serve(settings: dict[str, Any]) -> None:
    """Answer questions, one a line, until there are no more."""
    import probes
    import torch

    torch.set_num_threads(1)
    probes.keep_pages()
    # Whatever is printed meanwhile must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    sys.stdin.readline()
    try:
        bound, wide = made(settings)
    except Exception as error:
        return answer({"refused": " ".join(f"{type(error).__name__}: {error}".split())[:160]})
    from harness import MAKE, largest_error, results_of

    out = bound.call()
    leaves = list(bound.leaves.values())
    answer(
        {
            "result_bytes": out.numel() * out.element_size(),
            "operand_bytes": sum(x.numel() * x.element_size() for x in leaves),
            "parameters": sum(x.numel() for x in leaves[1:]),
        }
    )
    calls = {way: probes.Call(make(bound)) for way, make in MAKE.items()}
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        if what == "error":
            answer(largest_error(results_of(bound, True), results_of(wide, True)))
        else:
            way, *rest = arguments
            answer(getattr(calls[way], what)(*rest))
    return None


def made(settings: dict[str, Any]) -> tuple[Any, Any]:
    """The layer, and itself in float64."""
    import math

    import torch
    from entries import in_float64, of_module, random_leaves
    from other_libraries import beside_torchvision

    beside_torchvision("timm.layers")
    import spatial_grouping_attention as package

    shape, name = tuple(settings.pop("shape")), settings.pop("name")
    if Path(package.__file__).parent.parent != FOLDER:
        raise ImportError("another package than the index's was imported")
    torch.manual_seed(0)
    layer = getattr(package, name)(**settings)
    spacing = (1.0,) * len(shape)

    def read(module: Any, x: torch.Tensor) -> torch.Tensor:
        return module(x, input_spacing=spacing, input_grid_shape=shape)["x_out"]

    def of(module: Any, dtype: torch.dtype) -> Any:
        return of_module(module, read, random_leaves(dtype, x=(1, math.prod(shape), settings["feature_dims"]))["x"])

    return of(layer, torch.float32), of(in_float64(layer), torch.float64)


def install() -> None:
    """Fetch the pinned packages, and nothing that they require."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(FOLDER)]
    subprocess.run([*command, *PINS], check=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--install"]:
        install()
    else:
        serve(json.loads(sys.argv[1]))
