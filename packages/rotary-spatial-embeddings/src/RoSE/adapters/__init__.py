"""RoSE in the place where other libraries keep their rotary embedding.

Those libraries rotate by themselves and ask their embedding for a table of cosines and sines (or angles). The modules
here make these tables from wave vectors and physical positions. None imports the library it is for.
"""

from .primus import PrimusRope
from .slot import RopeSlot
from .timm import TimmRope
from .transformers import DINOv3Rope
from .x_transformers import XTransformersRope

__all__ = ["DINOv3Rope", "PrimusRope", "RopeSlot", "TimmRope", "XTransformersRope"]
