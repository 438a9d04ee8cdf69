"""RoSE: rotary position embeddings in real-world coordinates, for any number of dimensions."""

from . import functional
from .__about__ import __version__
from .aliasing import AliasingWarning
from .attention import RoSEMultiHeadAttention, RoSEMultiHeadCrossAttention
from .augmentation import augment_coordinates
from .blocks import MultiResolutionBlock
from .embedding import RotarySpatialEmbedding
from .grid import Grid
from .training import frequency_groups

__all__ = [
    "AliasingWarning",
    "Grid",
    "MultiResolutionBlock",
    "RoSEMultiHeadAttention",
    "RoSEMultiHeadCrossAttention",
    "RotarySpatialEmbedding",
    "__version__",
    "augment_coordinates",
    "frequency_groups",
    "functional",
]
