"""How prediction grows with a volume: in one piece, and block by block.

    python benchmarks/volumes.py
    python benchmarks/volumes.py --whole 64 96 128 --blocks 64 128 --workers 1 --json volumes.json

Every figure is of a process of its own and of all that it started: processor time, and the largest sum of what is
theirs in memory (proportional set size), both less those of the same program at work on 32^3 voxels, which are mostly
its start. Wall-clock time is that of the prediction alone. The network is nano with its first weights: nothing of this
depends on what it has learned.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import zarr

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
RESULTS = Path(__file__).parent / "results" / "volumes-cpu.json"
SMALLEST = 32
CLASSES = 3
SPACING = (1.0, 1.0, 1.0)
EVERY = 0.05  # seconds between two looks at memory


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and write; returns a row per volume."""
    options = parse(arguments)
    if options.child:
        print(json.dumps(CHILDREN[options.child](options)))
        return []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), sorted({SMALLEST, *options.blocks}))
        for way, sides in (("whole", options.whole), ("blocks", options.blocks)):
            least = measure(way, SMALLEST, folder, options.workers) if sides else {}
            for side in sides:
                found = measure(way, side, folder, options.workers)
                more = {name: max(found[name] - least[name], 0) for name in ("processor", "bytes")}
                rows.append({"way": way, "side": side, **found, **more})
                row = rows[-1]
                print(line(row), flush=True)
    # Only now: what describes the machine imports what no child should have.
    from probes import machine

    record = {"machine": machine(), "workers": options.workers, "rows": rows}
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as people read it."""
    voxels = row["side"] ** 3
    return (
        f"{row['way']:6} {row['side']:4}^3 {row['processor']:8.2f} s {1e6 * row['processor'] / voxels:6.2f} us/voxel "
        f"({row['seconds']:.2f} s on the clock) "
        f"{row['bytes'] / 2**20:7.0f} MiB {row['bytes'] / voxels:7.1f} bytes/voxel"
    )


def measure(way: str, side: int, folder: str, workers: int) -> dict[str, Any]:
    """Run a child and watch its memory."""
    command = [sys.executable, __file__, "--child", way, "--side", str(side)]
    command += ["--folder", folder, "--workers", str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child, Watch(child.pid) as watch:
        printed, _ = child.communicate()
    if child.returncode:
        raise RuntimeError(f"the program must succeed on {side}^3 voxels; it ended with {child.returncode}")
    return {**json.loads(printed.splitlines()[-1]), "processor": sum(watch.processor.values()), "bytes": watch.peak}


class Watch(threading.Thread):
    """Looks at a process and at all that it started, until it is left.

    Attributes:
        peak: the most bytes at any moment.
        processor: seconds by process.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.done = threading.Event()
        self.peak = 0
        self.processor: dict[int, float] = {}

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()

    def run(self) -> None:
        """Look again and again."""
        while not self.done.wait(EVERY):
            self.peak = max(self.peak, self.look())

    def look(self) -> int:
        """Bytes at this moment, pages that several share counted once; notes the seconds."""
        total = 0
        try:
            family = [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        for member in family:
            try:
                total += member.memory_full_info().pss
                times = member.cpu_times()
                self.processor[member.pid] = times.user + times.system
            except psutil.Error:
                continue  # it has ended since
        return total


def prepare(folder: Path, sides: Sequence[int]) -> None:
    """A checkpoint, and volumes of two kinds of texture."""
    sys.path.insert(0, str(EXAMPLES))
    from segmentation import checkpoint
    from segmentation.settings import Settings, build_network

    settings = Settings(
        task="semantic", preset="nano", spatial_dims=3, in_channels=1, num_classes=CLASSES, num_candidates=1,
        spacing=SPACING, crop=(48, 48, 48), learning_rate=1e-3, batch=2,
    )  # fmt: skip
    torch.manual_seed(0)
    weights = build_network(settings).state_dict()
    checkpoint.write(folder / "best.pt", {"settings": settings.as_data(), "weights": weights, "epoch": 0})
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    scale = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": list(SPACING)}]}]
    for side in sides:
        attributes = {"ome": {"version": "0.5", "multiscales": [{"axes": axes, "datasets": scale}]}}
        group = zarr.create_group(folder / f"{side}.ome.zarr", attributes=attributes)
        image = group.create_array("0", shape=(side,) * 3, chunks=(64,) * 3, dtype="uint8")
        for start in range(0, side, 64):
            image[start : start + 64] = texture(start, (min(64, side - start), side, side))


def texture(start: int, shape: tuple[int, ...]) -> np.ndarray:
    """Stripes in noise."""
    noise = np.random.default_rng(start).integers(0, 100, shape, np.uint8)
    return noise + (100 * (np.arange(shape[2]) // 8 % 2)).astype(np.uint8)


def whole(options: argparse.Namespace) -> dict[str, float]:
    """All voxels shown to the network at once, after a small image for which kernels are compiled."""
    from spatial_grouping_attention.models import grouping_vit_nano

    torch.set_num_threads(1)
    network = grouping_vit_nano(3, 1, CLASSES, spacing=SPACING).eval()
    with torch.inference_mode():
        for side in (SMALLEST, options.side):
            image = torch.randn(1, 1, *(side,) * 3)
            start = time.perf_counter()
            network(image, SPACING).logits.argmax(1)
            seconds = time.perf_counter() - start
    return {"seconds": seconds}


def blocks(options: argparse.Namespace) -> dict[str, float]:
    """Both passes of the program, without the start of its processes."""
    sys.path.insert(0, str(EXAMPLES))
    import segment_volume

    folder = Path(options.folder)
    result = segment_volume.main(
        [
            *("--checkpoint", str(folder / "best.pt"), "--image", str(folder / f"{options.side}.ome.zarr")),
            *("--out", str(folder / f"labels_{options.side}.ome.zarr"), "--workers", str(options.workers)),
            *("--device", "cpu"),
        ]
    )
    return {"seconds": result.counting + result.labelling, "counting": result.counting, "blocks": result.blocks}


CHILDREN = {"whole": whole, "blocks": blocks}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description="Time and memory of prediction over the size of a volume.")
    add = parser.add_argument
    add("--whole", type=int, nargs="*", default=[64, 96, 128, 192, 256], help="sides of volumes in one piece")
    add("--blocks", type=int, nargs="*", default=[64, 128, 256, 384, 512], help="sides of volumes in blocks")
    add("--workers", type=int, default=1, help="processes (default: %(default)s)")
    add("--json", type=Path, default=RESULTS, help="where figures go (default: benchmarks/results)")
    add("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    add("--side", type=int, help=argparse.SUPPRESS)
    add("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
