"""The ``rope`` slot of timm's vision transformers: EVA02, DINOv3, RoPE-ViT and others of its class ``Eva``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..validation import require_flag, require_shape
from .slot import RopeSlot, of_channels, spell_out_keywords, without_batch

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from ..keywords import RotaryKeywords


@spell_out_keywords
class TimmRope(RopeSlot):
    """What timm's attention rotates queries and keys by; :meth:`for_model` makes the one that fits a model.

    Args:
        dim: Channels over all heads.
        num_heads: Heads; see :class:`RopeSlot`.
        spatial_dims: Axes of a position.
        grid_shape: Tokens along each axis, where the caller of :meth:`get_embed` does not say it.
        depth: Blocks, where each has wave vectors of its own (timm's ``rope_mixed``); None otherwise.
        rotate_half: Whether the attention pairs channels half a head apart, as DINOv3, or neighbouring ones.
        spacing: Distance between tokens; see :class:`RopeSlot`.
        device: Where to put the wave vectors.
        dtype: Of the wave vectors.
        **rotary: Keywords of :class:`RoSE.RotarySpatialEmbedding`.

    Raises:
        TypeError: Arguments of the wrong type.
        ValueError: Arguments that break a rule.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        spatial_dims: int = 2,
        *,
        grid_shape: Iterable[int] | None = None,
        depth: int | None = None,
        rotate_half: bool = False,
        spacing: float | Iterable[float] = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **rotary: Unpack[RotaryKeywords],
    ) -> None:
        """Check the arguments and set up; see the class."""
        super().__init__(
            dim, num_heads, spatial_dims, depth=depth, spacing=spacing, device=device, dtype=dtype, **rotary
        )
        self.rotate_half = require_flag("rotate_half", rotate_half)
        # Not timm's name for it: timm takes an embedding that has a `feat_shape` for one that keeps its table.
        self.grid_shape = None if grid_shape is None else require_shape("grid_shape", grid_shape, spatial_dims)

    @classmethod
    def for_model(cls, model: nn.Module, **options: Any) -> Self:
        """The embedding that fits one of timm's models, on its device: ``model.rope = TimmRope.for_model(model)``.

        Args:
            model: Of timm's class ``Eva``, with rotary embeddings (``model.rope`` is not None). Where
                ``model.rope_mixed`` is true, every block gets wave vectors of its own. Where heads share keys
                (grouped queries), all heads get the same.
            **options: ``spacing`` and keywords of :class:`RoSE.RotarySpatialEmbedding`.

        Raises:
            TypeError: A model of another kind; unknown options.
            ValueError: A model that drops patches and is not ``rope_mixed``: timm then takes no table with heads.
        """
        parts: Any = model
        parts_of_eva = ("blocks", "patch_embed", "rope_mixed")
        if getattr(model, "rope", None) is None or not all(hasattr(model, name) for name in parts_of_eva):
            raise TypeError(f"model must be a timm Eva with a rope; got {type(model).__name__}")
        if getattr(model, "patch_drop", None) is not None and not parts.rope_mixed:
            raise ValueError("rope_mixed must be True, set before, where a model drops patches; got False")
        attentions = [block.attn for block in parts.blocks]
        heads = attentions[0].num_heads
        keys_are_shared = any(getattr(attention, "num_kv_heads", heads) != heads for attention in attentions)
        slot = cls(
            parts.embed_dim // heads if keys_are_shared else parts.embed_dim, 1 if keys_are_shared else heads,
            grid_shape=parts.patch_embed.grid_size, depth=len(attentions) if parts.rope_mixed else None,
            rotate_half=getattr(attentions[0], "rotate_half", False), **options,
        )  # fmt: skip
        return slot.to(next(model.parameters()).device)

    def get_embed(self, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Sines, then cosines, of all channels; timm calls this at every forward pass.

        Args:
            shape: Tokens along each axis; default ``grid_shape``.
            dtype: Of the result; default that of the wave vectors, float32 or float64.

        Returns:
            ``(heads, tokens, 2 * head size)``, with ``depth`` and the batch in front where there are such, in this
            order; for one head without either, ``(tokens, 2 * head size)``.

        Raises:
            ValueError: No shape at all, or one that disagrees with the positions given to :meth:`at`.
        """
        shape = self.grid_shape if shape is None else tuple(shape)
        if shape is None:
            raise ValueError("shape must be given where the module has no grid_shape; got None")
        where = self._placed(shape)
        tables = []
        for rotary in self.rotary if isinstance(self.rotary, nn.ModuleList) else (self.rotary,):
            cos, sin = self._turned(rotary, where, prod(shape))
            table = torch.cat([of_channels(values, interleaved=not self.rotate_half) for values in (sin, cos)], dim=-1)
            tables.append(without_batch(table, where))
        table = torch.stack(tables) if isinstance(self.rotary, nn.ModuleList) else tables[0]
        if self.num_heads == 1 and table.dim() == 3:  # neither blocks nor samples
            table = table.squeeze(0)
        return table if dtype is None else table.to(dtype)

    def update_feat_shape(self, feat_shape: Sequence[int]) -> None:
        """Take note of another number of tokens; timm's ``set_input_size`` calls this."""
        self.grid_shape = require_shape("feat_shape", feat_shape, self.spatial_dims)
