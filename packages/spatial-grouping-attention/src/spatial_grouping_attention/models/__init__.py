"""Networks for segmentation: transformers whose downsampling is grouping, and their uniform twins."""

from .matching import MatchingLosses, Objects, SetMatchingLoss, objects_of
from .output import SegmentationOutput
from .panoptic import PixelMemberships
from .plan import Plan, StemPlan, plan
from .presets import grouping_vit_base, grouping_vit_large, grouping_vit_nano, grouping_vit_tiny
from .segments import PanopticSegments, panoptic_segments
from .vit import GroupingViT

__all__ = [
    "GroupingViT",
    "MatchingLosses",
    "Objects",
    "PanopticSegments",
    "PixelMemberships",
    "Plan",
    "SegmentationOutput",
    "SetMatchingLoss",
    "StemPlan",
    "grouping_vit_base",
    "grouping_vit_large",
    "grouping_vit_nano",
    "grouping_vit_tiny",
    "objects_of",
    "panoptic_segments",
    "plan",
]
