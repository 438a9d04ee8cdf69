"""The ``rotary_pos_emb`` slot of x-transformers' ``AttentionLayers`` (``Encoder``, ``Decoder``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..positions import Where
from ..validation import require_tensor
from .slot import RopeSlot, of_channels, spell_out_keywords

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..keywords import RotaryKeywords


@spell_out_keywords
class XTransformersRope(RopeSlot):
    """``encoder.rotary_pos_emb = XTransformersRope(64)`` instead of ``RotaryEmbedding``; all heads share its waves.

    Args:
        dim: Channels of a head, or the first so many of them that rotate (``rotary_emb_dim``).
        spatial_dims: Axes of a position.
        spacing: Distance between the tokens of a sequence; a number or one per axis.
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
        spatial_dims: int = 1,
        *,
        spacing: float | Iterable[float] = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **rotary: Unpack[RotaryKeywords],
    ) -> None:
        """Check the arguments and set up; see the class."""
        super().__init__(dim, 1, spatial_dims, spacing=spacing, device=device, dtype=dtype, **rotary)

    def forward(self, t: Tensor, offset: int = 0) -> tuple[Tensor, float]:
        """Angles of all channels; the library calls this at every forward pass.

        Args:
            t: Coordinates in physical units (floating point), ``(tokens, spatial_dims)`` or ``(batch, tokens,
                spatial_dims)``: what is given to ``encoder(x, pos=coordinates)``. Or whole numbers ``(tokens,)`` or
                ``(batch, tokens)``, the library's default, which count the tokens of a sequence; in more than one
                dimension these only stand for the positions given to :meth:`at`.
            offset: Of the library's signature, which does not use it either.

        Returns:
            Radians ``(batch or 1, tokens, dim)`` within half a turn, and 1.0, the factor of xPos.

        Raises:
            ValueError: Positions that are not given, or do not fit.
        """
        where = self._where_of(require_tensor("t", t))
        cos, sin = self._turned(self.rotary, where, t.shape[-2 if t.is_floating_point() else -1])
        angles = of_channels(torch.atan2(sin, cos), interleaved=True)
        return angles.squeeze(1), 1.0

    def forward_from_seq_len(self, seq_len: int) -> tuple[Tensor, float]:
        """Angles of a sequence of so many tokens."""
        angles: tuple[Tensor, float] = self(torch.arange(seq_len))
        return angles

    def _where_of(self, t: Tensor) -> Where:
        where = self._where
        if not t.is_floating_point():
            if where.coordinates is not None:
                return where
            if self.spatial_dims > 1:
                raise ValueError(
                    f"positions must be given for {self.spatial_dims}-D tokens: encoder(x, pos=coordinates), or "
                    f"slot.at(coordinates=...); got t of shape {tuple(t.shape)}"
                )
            steps = torch.as_tensor(where.spacing, dtype=torch.float64, device=t.device)
            t = t.to(torch.float64).unsqueeze(-1) * steps.unsqueeze(-2)
        return Where(where.spacing if self.transforms_spacing else None, None, t)
