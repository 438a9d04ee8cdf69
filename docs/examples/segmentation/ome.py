"""OME-Zarr: an array, what its axes are, and where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zarr

from segmentation.axes import MICROMETRES, Axis, FileError, step_of

KINDS = {**dict.fromkeys("zyx", "space"), "c": "channel", "t": "time"}


class Place(NamedTuple):
    """An axis in the words of the file: voxel k lies at ``translation + k * scale``, in ``unit`` if that is known."""

    name: str
    unit: str | None = None
    scale: float = 1.0
    translation: float = 0.0


def open_zarr(path: Path) -> tuple[zarr.Array, tuple[Axis, ...], list[Place]]:
    """The finest resolution of OME-Zarr 0.4 or 0.5, or a plain array; nothing of it is read yet.

    Raises:
        FileError: a group that is no OME-Zarr. What zarr throws at a broken one comes through.
    """
    node = zarr.open(path, mode="r")
    if isinstance(node, zarr.Array):
        names = getattr(node.metadata, "dimension_names", None) or [None] * node.ndim
        places = [Place(name or f"axis{i}") for i, name in enumerate(names)]
        return node, tuple(_plain_axis(name) for name in names), places
    multiscales = node.attrs.get("ome", node.attrs).get("multiscales")
    if not multiscales or not all(isinstance(axis, dict) for axis in multiscales[0].get("axes", [None])):
        raise FileError.of(
            path, "an image in OME-Zarr 0.4 or 0.5 (multiscales with axes)", f"attributes {list(node.attrs)}"
        )
    finest = multiscales[0]["datasets"][0]
    places = _places(multiscales[0], finest)
    # Writers put ones without a unit where they know nothing; other numbers without a unit are taken as they are.
    known = any(place.unit is not None or place.scale != 1 for place in places)
    axes = []
    for axis, place in zip(multiscales[0]["axes"], places, strict=True):
        factor = MICROMETRES.get(place.unit or "µm") if known else None
        kind = axis.get("type", KINDS.get(place.name, "other"))
        axes.append(Axis(kind if kind in KINDS.values() else "other", place.name, step_of(place.scale, factor)))
    return node[finest["path"]], tuple(axes), places


def _places(multiscale: dict[str, Any], dataset: dict[str, Any]) -> list[Place]:
    """Transformations of a data set, and then those that all of them have in common."""
    places = [Place(axis["name"], axis.get("unit")) for axis in multiscale["axes"]]
    steps = [*dataset["coordinateTransformations"], *multiscale.get("coordinateTransformations", ())]
    for step in steps:
        scales, shifts = (
            step.get(name, [value] * len(places)) for name, value in (("scale", 1.0), ("translation", 0.0))
        )
        places = [
            place._replace(scale=place.scale * scale, translation=place.translation * scale + shift)
            for place, scale, shift in zip(places, scales, shifts, strict=True)
        ]
    return places


def _plain_axis(name: str | None) -> Axis:
    """An axis of an array that is not OME-Zarr."""
    return Axis("unnamed", "(no name)") if name is None else Axis(KINDS.get(name, "other"), name)


def create_group(path: Path, places: Sequence[Place]) -> zarr.Group:
    """A new OME-Zarr (0.5) whose one resolution, "0", has yet to be made. All axes are of space."""
    axes = [
        {"name": place.name, "type": "space"} | ({} if place.unit is None else {"unit": place.unit}) for place in places
    ]
    steps: list[dict[str, Any]] = [{"type": "scale", "scale": [place.scale for place in places]}]
    if any(place.translation for place in places):
        steps.append({"type": "translation", "translation": [place.translation for place in places]})
    multiscales = [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": steps}]}]
    return zarr.create_group(path, zarr_format=3, attributes={"ome": {"version": "0.5", "multiscales": multiscales}})
