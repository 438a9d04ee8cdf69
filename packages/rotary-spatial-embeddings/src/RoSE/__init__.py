"""RoSE: rotary position embeddings in real-world coordinates, for any number of dimensions."""

from . import functional
from .__about__ import __version__
from .attention import RoSEMultiHeadCrossAttention
from .embedding import AliasingWarning, RotarySpatialEmbedding
from .grid import Grid

__all__ = [
    "AliasingWarning",
    "Grid",
    "RoSEMultiHeadCrossAttention",
    "RotarySpatialEmbedding",
    "__version__",
    "functional",
]
