"""The examples of the package's long-standing README, word for word, and the shapes their comments promise."""

import contextlib
import io
from typing import Any

import pytest
import torch

BASIC_USAGE = r"""
import torch
from RoSE import RoSEMultiHeadCrossAttention

# Create RoSE multi-head attention layer
layer = RoSEMultiHeadCrossAttention(
    dim=128,
    num_heads=8,
    spatial_dims=3,
    learnable=True,
    base_theta=1e4,
    rotary_ratio=1.0  # Apply rotation to all dimensions (default)
)

batch_size, seq_len = 2, 1000
q = torch.randn(batch_size, seq_len, 128)
k = torch.randn(batch_size, seq_len, 128)

# Define spatial grid properties
grid_shape = (10, 10, 10)  # 3D grid dimensions
spacing = (1.0, 1.0, 1.0)  # Physical size of each voxel

# Compute attention scores with spatial embeddings
attn_scores = layer(q, k, spacing, grid_shape)  # Shape: (batch_size, num_heads, seq_len, seq_len)
"""

PARTIAL_ROTATION = r"""
import torch
from RoSE import RotarySpatialEmbedding

# Apply rotation to only 50% of the embedding dimensions
embedding = RotarySpatialEmbedding(
    dim=128,
    num_heads=8,
    spatial_dims=2,
    rotary_ratio=0.5,  # Only rotate first 50% of dimensions per head
    learnable=False
)

batch_size, seq_len = 2, 100
x = torch.randn(batch_size, seq_len, 128)

# The first 64 dimensions (50% of 128) will be rotated
# The last 64 dimensions will be passed through unchanged
x_embedded = embedding(x, spacing=(0.5, 0.5), grid_shape=(10, 10))
"""

EMBEDDING_LAYER = r"""
import torch
from RoSE import RotarySpatialEmbedding

# Create just the rotary spatial embedding layer
embedding = RotarySpatialEmbedding(
    dim=128,
    num_heads=8,
    spatial_dims=2,
    learnable=False,
    frequency_scaling="sqrt",
    rotary_ratio=1.0  # Apply rotation to all dimensions (default)
)

batch_size, seq_len = 2, 100
x = torch.randn(batch_size, seq_len, 128)

# Define 2D grid
grid_shape = (10, 10)
spacing = (0.5, 0.5)

# Apply rotary spatial embeddings
x_embedded = embedding(x, spacing, grid_shape)  # Shape: (batch_size, seq_len, 128)
"""

MEDICAL_IMAGING = r"""
import torch
from RoSE import RotarySpatialEmbedding

# Example: 3D CT scan with anisotropic voxel spacing
batch_size, seq_len = 1, 8000  # 20x20x20 volume flattened
embedding_dim = 256
num_heads = 8

# Create embedding layer for 3D medical data
embedding = RotarySpatialEmbedding(
    dim=embedding_dim,
    num_heads=num_heads,
    spatial_dims=3,
    learnable=True,
    rotary_ratio=0.75,  # Rotate 75% of dimensions
    frequency_scaling="adaptive"
)

# Define anisotropic voxel spacing (common in medical imaging)
grid_shape = (20, 20, 20)
voxel_spacing = (0.5, 0.5, 2.0)  # 0.5mm x 0.5mm x 2mm

# Your input features (e.g., from a CNN backbone)
x = torch.randn(batch_size, seq_len, embedding_dim)

# Apply spatial embeddings
x_with_spatial = embedding(x, voxel_spacing, grid_shape)
print(f"Input shape: {x.shape}")
print(f"Output shape: {x_with_spatial.shape}")
"""

MULTI_SCALE = r"""
import torch
from RoSE import RoSEMultiHeadCrossAttention

# Example: Multi-scale microscopy with different zoom levels
def create_multiscale_attention():
    return RoSEMultiHeadCrossAttention(
        dim=512,
        num_heads=16,
        spatial_dims=2,
        learnable=True,
        base_theta=1e4,
        rotary_ratio=1.0  # Full rotation for spatial awareness
    )

# Different scales: 10x, 40x, 100x magnification
scales_and_spacings = [
    ((100, 100), (1.0, 1.0)),      # 10x: 1μm/pixel
    ((200, 200), (0.25, 0.25)),    # 40x: 0.25μm/pixel
    ((400, 400), (0.1, 0.1)),      # 100x: 0.1μm/pixel
]

attention_layer = create_multiscale_attention()

for i, (grid_shape, spacing) in enumerate(scales_and_spacings):
    seq_len = grid_shape[0] * grid_shape[1]

    # Simulate features from different magnifications
    q = torch.randn(1, seq_len, 512)
    k = torch.randn(1, seq_len, 512)

    # Compute attention with spatial awareness
    attn_scores = attention_layer(q, k, spacing, grid_shape)

    print(f"Scale {i+1}: {grid_shape} grid, {spacing} spacing")
    print(f"Attention shape: {attn_scores.shape}\n")
"""

CUSTOM_COORDINATES = r'''
import torch
from RoSE import RotarySpatialEmbedding

# Example: Geographic coordinate system (lat/lon/elevation)
class GeospatialEmbedding(torch.nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.spatial_embedding = RotarySpatialEmbedding(
            dim=dim,
            num_heads=num_heads,
            spatial_dims=3,  # lat, lon, elevation
            learnable=True,
            frequency_scaling="adaptive"
        )

    def forward(self, x, coordinates):
        """
        Args:
            x: Features [B, N, D]
            coordinates: [B, N, 3] tensor with [lat, lon, elevation]
        """
        # Normalize coordinates to reasonable scales
        lat_scale, lon_scale, elev_scale = 1/90, 1/180, 1/1000
        normalized_coords = coordinates * torch.tensor([lat_scale, lon_scale, elev_scale])

        # Convert to grid format (this is a simplified example)
        # In practice, you'd need proper coordinate-to-grid mapping
        batch_size, seq_len, _ = coordinates.shape
        grid_size = int(seq_len ** (1/3)) if seq_len ** (1/3) == int(seq_len ** (1/3)) else 10
        grid_shape = (grid_size, grid_size, grid_size)
        spacing = (lat_scale, lon_scale, elev_scale)

        return self.spatial_embedding(x, spacing, grid_shape)

# Usage
geo_embedding = GeospatialEmbedding(dim=256, num_heads=8)
features = torch.randn(2, 1000, 256)
coordinates = torch.randn(2, 1000, 3)  # Random lat/lon/elevation
result = geo_embedding(features, coordinates)
'''

TRANSFORMER = r'''
import torch
import torch.nn as nn
from RoSE import RotarySpatialEmbedding

class SpatialTransformerBlock(nn.Module):
    """Transformer block with spatial awareness via RoSE."""

    def __init__(self, dim, num_heads, spatial_dims=2):
        super().__init__()
        self.spatial_embedding = RotarySpatialEmbedding(
            dim=dim,
            num_heads=num_heads,
            spatial_dims=spatial_dims,
            learnable=True
        )

        self.attention = nn.MultiheadAttention(
            embed_dim=dim,
            num_heads=num_heads,
            batch_first=True
        )

        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Linear(4 * dim, dim)
        )

    def forward(self, x, spacing, grid_shape):
        # Apply spatial embeddings
        x_spatial = self.spatial_embedding(x, spacing, grid_shape)

        # Self-attention with spatial embeddings
        attn_out, _ = self.attention(x_spatial, x_spatial, x_spatial)
        x = self.norm1(x + attn_out)

        # MLP
        mlp_out = self.mlp(x)
        x = self.norm2(x + mlp_out)

        return x

# Example usage
transformer = SpatialTransformerBlock(dim=256, num_heads=8, spatial_dims=2)
x = torch.randn(4, 100, 256)  # Batch of sequences
result = transformer(x, spacing=(1.0, 1.0), grid_shape=(10, 10))
print(f"Transformer output shape: {result.shape}")
'''


def run(code: str, device: str = "cpu") -> tuple[dict[str, Any], str]:
    """Execute an example; its names and what it printed."""
    names: dict[str, Any] = {"__name__": "example"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.device(device):
        exec(code, names)
    return names, printed.getvalue()


def test_basic_usage() -> None:
    names, _ = run(BASIC_USAGE)
    assert names["attn_scores"].shape == (2, 8, 1000, 1000)
    assert names["attn_scores"].isfinite().all()


def test_partial_rotation() -> None:
    names, _ = run(PARTIAL_ROTATION)
    x, out = names["x"], names["x_embedded"]
    assert out.shape == (2, 100, 128)
    # Half of the channels turn, and the rest passes: here the first half of every head ...
    assert torch.equal(out.unflatten(-1, (8, 16))[..., 8:], x.unflatten(-1, (8, 16))[..., 8:])
    assert not torch.equal(out[..., :64], x[..., :64])
    # ... and, as the example's comment counts them, the first half of all, when whole heads are asked for.
    names, _ = run(PARTIAL_ROTATION.replace("rotary_ratio=0.5", 'rotary_partition="heads", rotary_ratio=0.5'))
    x, out = names["x"], names["x_embedded"]
    assert torch.equal(out[..., 64:], x[..., 64:])
    assert (out[..., :64] != x[..., :64]).flatten(0, 1).any(0).all()


def test_embedding_layer() -> None:
    names, _ = run(EMBEDDING_LAYER)
    assert names["x_embedded"].shape == (2, 100, 128)


def test_medical_imaging() -> None:
    names, printed = run(MEDICAL_IMAGING)
    assert names["x_with_spatial"].shape == (1, 8000, 256)
    assert printed.count("torch.Size([1, 8000, 256])") == 2


def test_multi_scale_scores_stop_where_memory_does() -> None:
    """Shapes only (meta tensors): the first scale's scores take 6.4 GB, the second's would take 102 GB."""
    with pytest.raises(ValueError, match=r"got 102.4 GB for 40000 .* keys: call attend\(q, k, v, \.\.\.\)"):
        run(MULTI_SCALE, device="meta")
    first_scale = MULTI_SCALE.replace("enumerate(scales_and_spacings)", "enumerate(scales_and_spacings[:1])")
    names, printed = run(first_scale, device="meta")
    assert names["attn_scores"].shape == (1, 16, 10_000, 10_000)
    assert "Scale 1: (100, 100) grid, (1.0, 1.0) spacing" in printed


def test_multi_scale_attends_at_every_scale() -> None:
    """What the refusal recommends; values at the first scale, shapes at the others."""
    attend = MULTI_SCALE.replace("attention_layer(q, k, spacing", "attention_layer.attend(q, k, k, spacing")
    names, printed = run(attend, device="meta")
    assert names["attn_scores"].shape == (1, 160_000, 512)
    assert printed.count("Scale") == 3
    first_scale = attend.replace("enumerate(scales_and_spacings)", "enumerate(scales_and_spacings[:1])")
    with torch.no_grad():
        names, _ = run(first_scale)
    assert names["attn_scores"].shape == (1, 10_000, 512)
    assert names["attn_scores"].isfinite().all()


def test_custom_coordinates() -> None:
    names, _ = run(CUSTOM_COORDINATES)
    assert names["result"].shape == (2, 1000, 256)


def test_transformer() -> None:
    names, printed = run(TRANSFORMER)
    assert names["result"].shape == (4, 100, 256)
    assert "torch.Size([4, 100, 256])" in printed
