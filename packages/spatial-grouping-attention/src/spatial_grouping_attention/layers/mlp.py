"""The two-layer perceptron of a transformer block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear, activation, dropout, linear, dropout, on the last axis.

    Args:
        dims: channels in and out.
        hidden_dims: channels in between.
        dropout: probability of both dropouts.
        bias: whether the linear layers have one.
        activation: makes the activation module.
    """

    def __init__(
        self,
        dims: int,
        hidden_dims: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.expand = nn.Linear(dims, hidden_dims, bias=bias)
        self.activation = activation()
        self.contract = nn.Linear(hidden_dims, dims, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dims) -> (..., dims)."""
        hidden = self.dropout(self.activation(self.expand(x)))
        out: Tensor = self.dropout(self.contract(hidden))
        return out
