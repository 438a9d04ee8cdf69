"""The presets as timm's models: importing this module registers them, and imports timm.

``timm.create_model("grouping_vit_tiny")`` classifies whole images by their pooled last groups;
``features_only=True`` gives the features of all stages, as grids, for the decoders of other libraries. Parameters are
named as in :class:`GroupingViT`, whose weights load into these models and the other way round, all but the heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from RoSE import Grid
from RoSE.validation import require_choice
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..geometry import Spacing
from .presets import grouping_vit_base, grouping_vit_large, grouping_vit_nano, grouping_vit_tiny
from .tokens import Tokens, as_image
from .vit import GroupingViT

__all__ = ["GroupingBackbone"]  # timm adds the names of the models


class GroupingBackbone(nn.Module):
    """Stem, stages and groupings of a network under timm's names, with a classifier of images for a head.

    Spacing is the constructor's of the network, or that of a call: ``forward`` and the methods it is made of take it as
    in :meth:`GroupingViT.forward`.

    Args:
        network: a network for images of two axes; its head is left out.
        num_classes: classes of an image; 0 for the pooled features alone.
        global_pool: timm's name of the pooling over the last groups; empty for none.
        drop_rate: dropout before the classifier.

    Raises:
        ValueError: the network is not for two axes, or the pooling is unknown.
    """

    def __init__(
        self, network: GroupingViT, num_classes: int = 1000, global_pool: str = "avg", drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        require_choice("spatial_dims of the network", network.spatial_dims, (2,))
        self.num_classes, self.global_pool, self.in_chans = num_classes, global_pool, network.in_channels
        self.spacing, self.grad_checkpointing = network.spacing, False
        self.num_features = self.head_hidden_size = network.dims[-1]
        self.stem, self.stages, self.downsamples = network.stem, network.stages, network.downsamples
        self.feature_info = _feature_info(network)
        made = {"device": network.stem.proj.weight.device, "dtype": network.stem.proj.weight.dtype}
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **made)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        spacing: Spacing | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the stages that are asked for.

        Args:
            x: images (B, in_chans, height, width).
            indices: how many of the last stages, or which; None for all.
            norm: nothing to choose: every stage ends with its own norm.
            stop_early: leave out the stages after the last that is asked for.
            output_fmt: ``"NCHW"``.
            intermediates_only: return the features alone.
            spacing: between pixels, see :meth:`GroupingViT.forward`.

        Returns:
            Features (B, dims of the stage, *grid of the stage), and before them, unless left out, those of the last
            stage that was computed.

        Raises:
            ValueError: the format is another.
        """
        require_choice("output_fmt", output_fmt, ("NCHW",))
        taken, last = feature_take_indices(len(self.stages), indices)
        found = []
        through = self.stages[: last + 1] if stop_early else self.stages
        tokens = self.stem(x, Grid(tuple(x.shape[2:]), self.spacing if spacing is None else spacing), None)
        stage: Any
        for i, stage in enumerate(through):
            if i > 0:
                tokens, _ = self._run(self.downsamples[i - 1], tokens)
            for block in stage.blocks:
                tokens = self._run(block, tokens)
            tokens = Tokens(stage.norm(tokens.x), tokens.grid, None)
            if i in taken:
                found.append(as_image(tokens.x, tokens.grid.shape))
        return found if intermediates_only else (as_image(tokens.x, tokens.grid.shape), found)

    def forward_features(self, x: Tensor, spacing: Spacing | None = None) -> Tensor:
        """Images (B, in_chans, height, width) -> features of the last stage (B, num_features, *its grid)."""
        features, _ = self.forward_intermediates(x, 1, spacing=spacing)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features of the last stage -> logits (B, num_classes), or the pooled features."""
        logits: Tensor = self.head(x, pre_logits=pre_logits)
        return logits

    def forward(self, x: Tensor, spacing: Spacing | None = None) -> Tensor:
        """Images (B, in_chans, height, width) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x, spacing))

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Leave out the stages after the last of ``indices``, and with them, or by ``prune_head``, the classifier.

        Norms stay: the next stage and the features need them.

        Returns:
            The indices, counted from the first stage.
        """
        taken, last = feature_take_indices(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        self.stages, self.downsamples = self.stages[: last + 1], self.downsamples[:last]
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if pruned or prune_head:
            self.reset_classifier(0, "")
        kept: list[int] = taken
        return kept

    def get_classifier(self) -> nn.Module:
        """The last layer of the head."""
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; ``num_classes`` 0 for none, ``global_pool`` None for the pooling as it is."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features)
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks and groupings again in the backward pass, or stop doing so."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters lie how deep, for rates of learning that fall with depth; a grouping is its stage's last."""
        blocks: str | list[tuple[str, tuple[int] | None]] = r"^(?:stages|downsamples)\.(\d+)"
        if not coarse:
            after = (99998,)  # 99999 would join it to the last block
            blocks = [
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", after),
                (r"^downsamples\.(\d+)", after),
            ]
        return {"stem": r"^stem", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Wave vectors, compactness and temperatures: 0 is no neutral value of theirs."""
        last = {"freqs", "raw_compactness", "log_temperature"}
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in last}

    def _run(self, part: nn.Module, tokens: Tokens) -> Any:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, tokens)
        return part(tokens)


def _feature_info(network: GroupingViT) -> list[dict[str, Any]]:
    """Channels and pixels per token of every stage; a single number as timm has it, the larger of the two axes."""
    step, found = network.stem.stride, []
    for i, dim in enumerate(network.dims):
        if i > 0:
            part: Any = network.downsamples[i - 1]
            step = tuple(a * s for a, s in zip(step, getattr(part, "layer", part).stride, strict=True))
        found.append({"num_chs": dim, "reduction": max(step), "module": f"stages.{i}"})
    return found


def _backbone(
    preset: Callable[..., GroupingViT],
    *,
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    **keywords: Any,
) -> GroupingBackbone:
    # The plainest of heads, which is dropped at once.
    network = preset(2, in_chans, 1, head="bilinear", head_width=1, drop_path=drop_path_rate, **keywords)
    return GroupingBackbone(network, num_classes, global_pool, drop_rate)


def _cfg(**settings: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": None, "fixed_input_size": False,
        "crop_pct": 0.9, "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj", "classifier": "head.fc", "license": "bsd-3-clause", **settings,
    }  # fmt: skip


# No weights: timm says so where pretrained ones are asked for.
default_cfgs = generate_default_cfgs(
    {
        "grouping_vit_nano.untrained": _cfg(),
        "grouping_vit_tiny.untrained": _cfg(paper_ids="arXiv:2505.16993"),
        "grouping_vit_base.untrained": _cfg(paper_ids="arXiv:2505.16993"),
        "grouping_vit_large.untrained": _cfg(paper_ids="arXiv:2505.16993"),
    }
)


def _register(preset: Callable[..., GroupingViT]) -> None:
    """Let timm know a preset by its own name."""
    stages = len(inspect.signature(preset).parameters["dims"].default)

    def create(pretrained: bool = False, **keywords: Any) -> nn.Module:
        of_stages = tuple(range(len(keywords.get("dims", range(stages)))))
        features = {"out_indices": keywords.pop("out_indices", of_stages), "feature_cls": "getter"}
        model: nn.Module = build_model_with_cfg(
            partial(_backbone, preset), preset.__name__, pretrained, feature_cfg=features, **keywords
        )
        return model

    create.__name__ = create.__qualname__ = preset.__name__
    create.__doc__ = f"The backbone of :func:`{preset.__name__}` for timm; keywords of both."
    register_model(create)


for _preset in (grouping_vit_nano, grouping_vit_tiny, grouping_vit_base, grouping_vit_large):
    _register(_preset)
