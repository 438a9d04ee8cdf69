"""Random crops of samples: item i of an epoch is the same whenever, and by whichever process, it is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from RoSE.validation import require_choice, require_int, require_shape
from skimage.segmentation import relabel_sequential
from torch import Tensor
from torch.utils.data import Dataset

from segmentation.augment import Piece, cut, normalise, relight, turn
from segmentation.pairs import Sample
from segmentation.resample import at_spacing


class Item(TypedDict):
    """A crop: ``image`` float32 (channels, *crop), ``labels`` int64 (*crop), ``spacing`` float32 (axes),
    ``valid`` bool (*crop), false where the crop is larger than the image, and ``sample``, the place of its sample.
    """

    image: Tensor
    labels: Tensor
    spacing: Tensor
    valid: Tensor
    sample: int


class Crops(Dataset[Item]):
    """Random crops, a pure function of seed, epoch and index.

    Every sample is visited once before any is visited twice; the place within it is uniform. A crop that is larger
    than its image is filled up at its end with zeros, label 0, and false in ``valid``.

    Args:
        samples: one at least, of one number of channels.
        size: pixels of a crop per axis.
        length: crops of an epoch.
        seed: other seeds give other crops.
        augment: vary the crops: mirrored, turned by 90 degrees between axes of equal spacing and size, rescaled with
            their spacing, lighter, darker, noisier.
        task: "semantic", or "instances", whose labels are re-numbered 1, 2, ... in every crop.
        spacing: that all samples are brought to first; None for their own.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: Sequence[int],
        length: int,
        seed: int,
        augment: bool = True,
        *,
        task: str = "semantic",
        spacing: Sequence[float] | None = None,
    ) -> None:
        if not samples:
            raise ValueError("samples must be at least one; got none")
        self.size = require_shape("size", size, samples[0].labels.ndim)
        self.length = require_int("length", length, minimum=1)
        self.seed = require_int("seed", seed, minimum=0)
        self.augment = augment
        self.task = require_choice("task", task, ("semantic", "instances"))
        pieces = [Piece(normalise(s.image).numpy(), s.labels, s.spacing) for s in samples]
        self.pieces = pieces if spacing is None else [at_spacing(piece, spacing) for piece in pieces]
        # In shared memory: a worker that lives on from one epoch to the next has a copy of everything else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """Which epoch the items are of, from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; workers of a DataLoader follow."""
        self._epoch.fill_(require_int("epoch", epoch, minimum=0))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.length:
            raise IndexError(f"index must be in 0 .. {self.length - 1}; got {index}")
        visit, place = divmod(self.epoch * self.length + index, len(self.pieces))
        # The first number keeps orders and crops apart, whatever the others are.
        chosen = int(np.random.default_rng((0, self.seed, visit)).permutation(len(self.pieces))[place])
        rng = np.random.default_rng((1, self.seed, self.epoch, index))
        piece = cut(self.pieces[chosen], self.size, rng, rescale=self.augment)
        if self.augment:
            piece = turn(piece, self.size, rng)
            piece = piece._replace(image=relight(piece.image, rng))
        labels = piece.labels
        if self.task == "instances":
            labels = relabel_sequential(labels)[0]
        missing = [(0, s - n) for s, n in zip(self.size, labels.shape, strict=True)]
        return {
            "image": torch.from_numpy(np.pad(piece.image, [(0, 0), *missing])),
            "labels": torch.from_numpy(np.pad(labels, missing).astype(np.int64)),
            "spacing": torch.tensor(piece.spacing, dtype=torch.float32),
            "valid": torch.from_numpy(np.pad(np.ones(labels.shape, bool), missing)),
            "sample": chosen,
        }
