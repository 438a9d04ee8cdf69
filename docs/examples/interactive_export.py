"""What the interactive page reads: the network as ONNX, example images, and numbers about both.

The graph says which groups every token belongs to in a form that the page can use without attention of its own. A
window of w x w groups holds at most one group of every *colour* (row mod w, column mod w). So memberships in groups of
one colour, which ``Assignment.upsample`` gives for a picture of that colour, are the memberships in single groups.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from interactive_ballast import without_ballast
from numpy.typing import NDArray
from skimage import io
from spatial_grouping_attention import Assignment, compose
from spatial_grouping_attention.models import GroupingViT
from torch import Tensor, nn

SIZE = (144, 192)  # of the images, rows and columns
WAVES = 6  # wave vectors shown
LONGEST = 800.0  # of their wavelengths, in units of which the page shows up to 768


@dataclass(frozen=True)
class Example:
    """An image that the page offers.

    Args:
        name: of its file.
        title: what it is called on the page.
        image: brightness in [0, 1], of ``SIZE``.
        labels: numbered coins, 0 for the table.
        spot: where the page starts, row and column.
    """

    name: str
    title: str
    image: NDArray[np.float32]
    labels: NDArray[np.int64]
    spot: tuple[int, int]


class Graph(nn.Module):
    """A network and the memberships in it, as tensors.

    Args:
        network: with groupings that are sparse, or of few groups.
    """

    def __init__(self, network: GroupingViT) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image (1, 1, *size) -> see :func:`output_names`.

        Returns:
            Class probabilities (classes, *size); of every grouping the memberships of its tokens in the groups of
            their window (N_in, colours), mean over heads, and for every token of the first stage the group that its
            most likely groups lead to, (N,) int32.
        """
        output = self.network(image)
        results = {"classes": output.logits[0].softmax(0)}
        for stage, assignment in enumerate(output.assignments, 1):
            results[f"memberships{stage}"] = assignment.upsample(colours(assignment))[0]
            labels = compose(output.assignments[:stage]).labels(nested=True)
            results[f"labels{stage}"] = labels[0].to(torch.int32)
        return results


def output_names(groupings: int) -> list[str]:
    """Names of the graph's outputs, in their order."""
    return ["classes", *(f"{name}{stage}" for stage in range(1, groupings + 1) for name in ("memberships", "labels"))]


def periods(assignment: Assignment) -> tuple[int, ...]:
    """After how many groups colours repeat, per axis: the window, or all groups where it is wider."""
    return tuple(min(w, n) for w, n in zip(assignment.neighbourhood.window, assignment.output_shape, strict=True))


def colours(assignment: Assignment) -> Tensor:
    """One picture per colour, 1 at its groups: (1, N_out, colours)."""
    repeated = periods(assignment)
    axes = (torch.arange(n) % p for n, p in zip(assignment.output_shape, repeated, strict=True))
    colour = torch.zeros(assignment.output_shape, dtype=torch.long)
    for place, period in zip(torch.meshgrid(*axes, indexing="ij"), repeated, strict=True):
        colour = colour * period + place
    return nn.functional.one_hot(colour.flatten(), math.prod(repeated)).float()[None]


def exported(network: GroupingViT, size: tuple[int, int]) -> onnx.ModelProto:
    """A network and its memberships as an ONNX graph for images of one size."""
    program = torch.onnx.export(
        Graph(network).eval(),
        (torch.zeros(1, 1, *size),),
        dynamo=True,
        verbose=False,
        input_names=["image"],
        output_names=output_names(len(network.downsamples)),
    )
    assert program is not None  # it is where dynamo is asked for
    return program.model_proto


def describe_grouping(assignment: Assignment, pixels: int) -> dict[str, Any]:
    """The geometry of a grouping: grids, and for every axis the cell of every token."""
    relation = assignment.neighbourhood
    return {
        "tokens": list(relation.input_shape),
        "groups": list(relation.output_shape),
        "window": list(relation.window),
        "periods": list(periods(assignment)),
        "cells": [[axis.cell(i) for i in range(axis.size)] for axis in relation.axes],
        "pixels": pixels,
    }


def waves(network: GroupingViT) -> list[dict[str, Any]]:
    """Wave vectors (radians per unit) of the attention before the last grouping, from short waves to long ones.

    Evenly picked from those that turn about once where the page shows them, or more often.
    """
    stage = len(network.stages) - 2
    rotary = network.stages[stage].blocks[0].attention.rotary
    found = [(2 * math.pi / math.hypot(*vector), vector) for vector in rotary.freqs.flatten(0, 1).tolist()]
    found = sorted(wave for wave in found if wave[0] <= LONGEST)
    chosen = [found[round(i * (len(found) - 1) / (WAVES - 1))] for i in range(WAVES)]
    pixels = round(rotary.reference_spacing[0] / network.spacing[0])
    return [{"wavelength": length, "vector": vector, "pixels": pixels} for length, vector in chosen]


def write_assets(folder: Path, network: GroupingViT, examples: Sequence[Example], recipe: Mapping[str, Any]) -> None:
    """Write network.onnx, one PNG per example, and network.json.

    Args:
        folder: made if it is not there.
        network: trained.
        examples: images for the page.
        recipe: how the network was trained, for the page to say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network.eval()
    model = without_ballast(exported(network, SIZE))
    onnx.checker.check_model(model)
    (folder / "network.onnx").write_bytes(model.SerializeToString())
    for example in examples:
        io.imsave(folder / f"{example.name}.png", (example.image * 255).round().astype(np.uint8), check_contrast=False)
    with torch.no_grad():
        output = network(torch.zeros(1, 1, *SIZE))
    steps = [round(grid.spacing[0] / network.spacing[0]) for grid in output.grids[1:]]
    described = {
        "size": list(SIZE),
        "classes": ["table", "coin"],
        "groupings": [describe_grouping(a, n) for a, n in zip(output.assignments, steps, strict=True)],
        "waves": waves(network),
        "parameters": sum(p.numel() for p in network.parameters()),
        "recipe": dict(recipe),
        "images": [{"file": f"{e.name}.png", "title": e.title, "spot": e.spot} for e in examples],
    }
    (folder / "network.json").write_text(json.dumps(described) + "\n")
