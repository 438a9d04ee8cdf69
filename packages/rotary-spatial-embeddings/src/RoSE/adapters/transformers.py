"""The ``rope_embeddings`` slot of transformers' DINOv3 vision transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..validation import require_ints
from .slot import RopeSlot, of_channels, spell_out_keywords, without_batch

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..keywords import RotaryKeywords


@spell_out_keywords
class DINOv3Rope(RopeSlot):
    """``model.rope_embeddings = DINOv3Rope(model.config)`` instead of ``DINOv3ViTRopePositionEmbedding``.

    Args:
        config: A ``DINOv3ViTConfig``, of which ``hidden_size``, ``num_attention_heads`` and ``patch_size`` are read.
        spacing: Distance between tokens in physical units (pixel size times patch size): a number or one per axis.
        device: Where to put the wave vectors.
        dtype: Of the wave vectors.
        **rotary: Keywords of :class:`RoSE.RotarySpatialEmbedding`.

    Raises:
        TypeError: Arguments of the wrong type.
        ValueError: Arguments that break a rule.
    """

    def __init__(
        self,
        config: Any,
        *,
        spacing: float | Iterable[float] = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **rotary: Unpack[RotaryKeywords],
    ) -> None:
        """Check the arguments and set up; see the class."""
        heads = config.num_attention_heads
        super().__init__(config.hidden_size, heads, 2, spacing=spacing, device=device, dtype=dtype, **rotary)
        self.patch_size = require_ints("config.patch_size", config.patch_size, 2, minimum=1)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all channels.

        Args:
            pixel_values: ``(batch, channels, height, width)``; its shape and dtype are looked at.

        Returns:
            Two tensors ``(heads, tokens, head size)``, or with the batch in front where samples have places of their
            own. Made in float32 at least, then of the images' dtype, which the library's attention needs.

        Raises:
            ValueError: Images that disagree with the positions given to :meth:`at`.
        """
        rows, columns = (size // step for size, step in zip(pixel_values.shape[2:], self.patch_size, strict=True))
        where = self._placed((rows, columns))
        cos, sin = (
            without_batch(of_channels(values, interleaved=False), where).to(pixel_values.dtype)
            for values in self._turned(self.rotary, where, rows * columns)
        )
        return cos, sin
