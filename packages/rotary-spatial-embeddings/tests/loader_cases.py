"""A set of examples that are made by a module, as a loader's workers import it."""

import torch
from RoSE import RotarySpatialEmbedding
from torch import Tensor
from torch.utils.data import Dataset

SHAPE = (3, 4)


class Rotated(Dataset):
    """Features of a grid, rotated where they are asked for."""

    def __init__(self, module: RotarySpatialEmbedding) -> None:
        self.module = module

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            return self.module(x, 0.5 + 0.25 * index, SHAPE)[0]
