"""What decides a training, as plain data that a checkpoint can carry; and the network that it describes."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from spatial_grouping_attention import models
from torch import nn

from segmentation.pairs import Sample, number_of_classes
from segmentation.resample import size_at

TASKS = ("semantic", "instances")
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# A network's learning rate shrinks with its width. Nano's was tried on three data sets, the others' were not.
LEARNING_RATES = {"nano": 2e-3, "tiny": 5e-4, "base": 3e-4, "large": 2e-4}

CROPS = {2: 128, 3: 48}  # pixels along an axis of the finest spacing
BATCHES = {2: 4, 3: 2}
CANDIDATES = 10000  # as many as nano has groups in 800 x 800 pixels: what is no candidate cannot be found
# An object may be larger than what a group sees in the presets, and its members need not be near. Nuclei, 20 epochs of
# nano, one seed: AP@0.5 77.1 and AP@0.75 55.3, against 75.4 and 49.9 with head="panoptic" and the rest as the preset.
FOR_INSTANCES = {"compactness": None, "grouping_window": 5}
SMALLEST_CROP = 16  # pixels along an axis of the finest spacing; three halvings leave two groups


class SettingsError(ValueError):
    """Settings make no sense, or are not those of the checkpoint."""


@dataclass(frozen=True)
class Settings:
    """Everything that the result of a training depends on, beside the files.

    Args:
        task: ``"semantic"``, or ``"instances"`` (class 1 is the objects', 0 what is between them).
        preset: which network.
        spatial_dims: axes of the images.
        in_channels: of the images.
        num_classes: of the pixels.
        num_candidates: objects that can be found in one image, at most; for instances.
        spacing: typical distance of pixels, per axis.
        crop: pixels of a crop, per axis.
        epochs: how often validation takes place.
        steps: of the optimiser between two validations.
        batch: crops per step, of all processes together.
        learning_rate: at its highest, behind the warm-up.
        weight_decay: see :func:`segmentation.loop.parameter_groups`.
        warmup: part of all steps in which the learning rate rises.
        ema: how much of the averaged weights stays in every step.
        clip: longest gradient.
        seed: of weights, crops, and of which samples are for validation.
        validation: part of the samples that is kept for validation.
        given_spacing: spacing that was said in place of that of the files; None for theirs.
        resample: bring every image to ``spacing`` before the network sees it, and predictions back.
        precision: of the forward pass: ``"float32"``, or ``"bf16"`` or ``"fp16"`` by autocast.

    Raises:
        SettingsError: a value is out of range.
    """

    task: str
    preset: str
    spatial_dims: int
    in_channels: int
    num_classes: int
    num_candidates: int
    spacing: tuple[float, ...]
    crop: tuple[int, ...]
    learning_rate: float
    batch: int
    epochs: int = 20
    steps: int = 100
    weight_decay: float = 0.05
    warmup: float = 0.05
    ema: float = 0.995
    clip: float = 1.0
    seed: int = 0
    validation: float = 0.2
    given_spacing: tuple[float, ...] | None = None
    resample: bool = False
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name, choices in (("task", TASKS), ("preset", tuple(LEARNING_RATES)), ("precision", tuple(PRECISIONS))):
            if getattr(self, name) not in choices:
                raise SettingsError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)}")
        for name in ("in_channels", "num_candidates", "batch", "epochs", "steps"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.num_classes < 2:
            raise SettingsError(f"num_classes must be at least 2; got {self.num_classes}")
        if len(self.spacing) != self.spatial_dims or not all(0 < s < math.inf for s in self.spacing):
            raise SettingsError(f"spacing must be {self.spatial_dims} positive numbers; got {self.spacing}")
        if len(self.crop) != self.spatial_dims or min(self.crop) < 1 or max(self.crop) < SMALLEST_CROP:
            raise SettingsError(
                f"crop must be {self.spatial_dims} numbers of pixels, the largest at least {SMALLEST_CROP}; "
                f"got {self.crop}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise SettingsError(f"learning_rate must be positive; got {self.learning_rate}")
        if not 0 < self.validation < 1:
            raise SettingsError(f"validation must be between 0 and 1; got {self.validation}")

    @property
    def seen_spacing(self) -> tuple[float, ...] | None:
        """The one spacing that images are brought to; None where they keep their own."""
        return self.spacing if self.resample else None

    def as_data(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Settings:
        """What :meth:`as_data` gave, also before images could be resampled.

        Raises:
            SettingsError: entries are missing or unknown.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if known != {"resample", *data}:
            raise SettingsError(f"settings must be {sorted(known)}; got {sorted(data)}")
        return cls(**{"resample": False, **data})


def complete(chosen: Mapping[str, Any], samples: Sequence[Sample]) -> Settings:
    """Settings from those that were chosen and, for all others, from the samples.

    Raises:
        SettingsError: a value is out of range, or not that of the samples.
    """
    task, preset = chosen.get("task", TASKS[0]), chosen.get("preset", "nano")
    spacing = tuple(float(np.median(steps)) for steps in zip(*(sample.spacing for sample in samples), strict=True))
    found = {
        "task": task,
        "preset": preset,
        "spatial_dims": len(spacing),
        "in_channels": samples[0].image.shape[0],
        "num_classes": 2 if task == "instances" else number_of_classes(samples),
        "num_candidates": CANDIDATES,
        "spacing": spacing,
        "crop": _choose_crop(spacing, samples, chosen.get("resample", False)),
        "learning_rate": LEARNING_RATES.get(preset),
        "batch": BATCHES[len(spacing)],
    }
    settings = Settings(**{**found, **chosen})
    if settings.in_channels != found["in_channels"]:
        raise SettingsError(f"images must have {settings.in_channels} channels; got {found['in_channels']}")
    return settings


def _choose_crop(spacing: Sequence[float], samples: Sequence[Sample], resample: bool) -> tuple[int, ...]:
    """About as long in every direction, in physical units, and not longer than the images are as they are seen."""
    extent = CROPS[len(spacing)] * min(spacing)
    sizes = [size_at(s.labels.shape, s.spacing, spacing) if resample else s.labels.shape for s in samples]
    typical = np.median(sizes, axis=0)
    return tuple(max(1, min(round(extent / distance), int(n))) for distance, n in zip(spacing, typical, strict=True))


def differences(kept: Settings, chosen: Mapping[str, Any]) -> list[str]:
    """What was chosen otherwise than it is kept, one line each."""
    return [
        f"{name} is {getattr(kept, name)} in the checkpoint; got {value}"
        for name, value in chosen.items()
        if value != getattr(kept, name)
    ]


def build_network(settings: Settings, checkpoint: bool = False) -> nn.Module:
    """The network that settings describe, with new weights from torch's global random numbers.

    Args:
        settings: of the training.
        checkpoint: compute what lies within blocks and groupings again in the backward pass instead of keeping it.
    """
    preset = getattr(models, f"grouping_vit_{settings.preset}")
    keywords: dict[str, Any] = {"spacing": settings.spacing, "checkpoint": checkpoint, **_steps(preset, settings)}
    if settings.task == "instances":
        keywords |= {"num_candidates": settings.num_candidates, **FOR_INSTANCES}
    network: nn.Module = preset(settings.spatial_dims, settings.in_channels, settings.num_classes, **keywords)
    return network


def _steps(preset: Any, settings: Settings) -> dict[str, Any]:
    """Strides that make voxels isotropic as they become coarser; those of the preset where they are so already."""
    if max(settings.spacing) < 2 * min(settings.spacing):
        return {}
    defaults = {name: p.default for name, p in inspect.signature(preset).parameters.items()}
    patches, groupings = int(math.log2(defaults["stem_stride"])), len(defaults["dims"]) - 1
    return models.plan(settings.spacing, settings.crop, patches + groupings).with_stem(patches)._asdict()
