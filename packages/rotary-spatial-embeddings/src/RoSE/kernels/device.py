"""The kernels themselves: pairs of channels in and out, the rotation and its gradients.

Programs take a block of tokens of one head. Channels, planes and heads that do not rotate, and tokens without a
position, turn by exactly zero: they take the same path and come out unchanged.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .angles import TURN, base_of, position, rotation, wave_number
from .sealed import opened, opened_stride


@triton.jit
def half_channels(plane, CHANNELS: tl.constexpr, PLANES: tl.constexpr):
    """The two channels of every pair in the half layout; what does not rotate is paired up likewise behind."""
    if CHANNELS == 2 * PLANES:
        return plane, plane + PLANES
    else:
        rest = plane - PLANES
        behind = 2 * PLANES + rest
        rotates = plane < PLANES
        return (
            tl.where(rotates, plane, behind),
            tl.where(rotates, plane + PLANES, behind + (CHANNELS - 2 * PLANES + 1) // 2),
        )


@triton.jit
def half_mask(exists, plane, channel, CHANNELS: tl.constexpr):
    """Which elements of one channel of every pair exist."""
    return exists[:, None] & ((plane < (CHANNELS + 1) // 2) & (channel < CHANNELS))[None, :]


@triton.jit
def load_pairs(
    base,
    token,
    exists,
    plane,
    strides,
    CHANNELS: tl.constexpr,
    PLANES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """First and second channels of all pairs of a block of tokens, float32."""
    rows = token.to(tl.int64) if WIDE else token
    row_pointers = base + rows[:, None] * opened_stride(strides[2], ALIGNED)
    if INTERLEAVED:
        channel = tl.arange(0, 2 * plane.shape[0])
        mask = exists[:, None] & (channel < CHANNELS)[None, :]
        tile = tl.load(row_pointers + channel[None, :] * strides[3], mask=mask, other=0.0).to(tl.float32)
        return tl.split(tl.reshape(tile, (token.shape[0], plane.shape[0], 2)))
    else:
        first, second = half_channels(plane, CHANNELS, PLANES)
        a = tl.load(
            row_pointers + first[None, :] * strides[3], mask=half_mask(exists, plane, first, CHANNELS), other=0.0
        )
        b = tl.load(
            row_pointers + second[None, :] * strides[3], mask=half_mask(exists, plane, second, CHANNELS), other=0.0
        )
        return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_pairs(
    base,
    token,
    exists,
    plane,
    strides,
    a,
    b,
    CHANNELS: tl.constexpr,
    PLANES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The reverse of :func:`load_pairs`, rounding to the result's dtype."""
    rows = token.to(tl.int64) if WIDE else token
    row_pointers = base + rows[:, None] * opened_stride(strides[2], ALIGNED)
    if INTERLEAVED:
        channel = tl.arange(0, 2 * plane.shape[0])
        mask = exists[:, None] & (channel < CHANNELS)[None, :]
        tile = tl.reshape(tl.join(a, b), (token.shape[0], 2 * plane.shape[0]))
        tl.store(row_pointers + channel[None, :] * strides[3], tile.to(base.dtype.element_ty), mask=mask)
    else:
        first, second = half_channels(plane, CHANNELS, PLANES)
        first_mask = half_mask(exists, plane, first, CHANNELS)
        second_mask = half_mask(exists, plane, second, CHANNELS)
        tl.store(row_pointers + first[None, :] * strides[3], a.to(base.dtype.element_ty), mask=first_mask)
        tl.store(row_pointers + second[None, :] * strides[3], b.to(base.dtype.element_ty), mask=second_mask)


@triton.jit
def program(heads, BLOCK_N: tl.constexpr):
    """Head, sample, block and tokens of a program."""
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads
    return head, tl.program_id(1), block, block * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def turn(
    x, out, x_strides, out_strides, c, s, batch, head, token, exists, plane,
    CHANNELS: tl.constexpr, PLANES: tl.constexpr, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Turn the pairs of one tensor."""
    base = base_of(x, batch, head, x_strides, ALIGNED)
    a, b = load_pairs(base, token, exists, plane, x_strides, CHANNELS, PLANES, INTERLEAVED, WIDE, ALIGNED)
    out_base = base_of(out, batch, head, out_strides, ALIGNED)
    store_pairs(
        out_base,
        token,
        exists,
        plane,
        out_strides,
        a * c - b * s,
        a * s + b * c,
        CHANNELS,
        PLANES,
        INTERLEAVED,
        WIDE,
        ALIGNED,
    )


@triton.jit(do_not_specialize=["heads", "tokens", "rotary_heads", "prefix"])
def rotate_forward(
    q, k, q_out, k_out, cos, sin, coordinates, freqs,
    q_strides, k_strides, q_out_strides, k_out_strides, cos_strides, sin_strides, coordinates_strides, freqs_strides,
    heads, tokens, rotary_heads, prefix,
    CHANNELS: tl.constexpr, PLANES: tl.constexpr, AXES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_ANGLES: tl.constexpr,
):  # fmt: skip
    """Turn q, and k if there is one, by the same angles."""
    head, batch, _, token = program(heads, BLOCK_N)
    exists = token < tokens
    plane = tl.arange(0, BLOCK_P)
    c, s = rotation(
        cos, sin, coordinates, freqs, cos_strides, sin_strides, coordinates_strides, freqs_strides,
        batch, head, token, exists, plane, rotary_heads, prefix, AXES, PLANES, WIDE, ALIGNED_ANGLES,
    )  # fmt: skip
    turn(
        q, q_out, q_strides, q_out_strides, c, s, batch, head, token, exists, plane,
        CHANNELS, PLANES, INTERLEAVED, WIDE, ALIGNED,
    )  # fmt: skip
    if k is not None:
        turn(
            k, k_out, k_strides, k_out_strides, c, s, batch, head, token, exists, plane,
            CHANNELS, PLANES, INTERLEAVED, WIDE, ALIGNED,
        )  # fmt: skip


@triton.jit
def turn_back(
    x, grad, dx, x_strides, grad_strides, dx_strides, c, s, batch, head, token, exists, plane,
    CHANNELS: tl.constexpr, PLANES: tl.constexpr, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Store the gradient of x; with x also the sums <g, x> and <g, i x> of every pair, which the angles need."""
    grad_base = base_of(grad, batch, head, grad_strides, ALIGNED)
    g, h = load_pairs(grad_base, token, exists, plane, grad_strides, CHANNELS, PLANES, INTERLEAVED, WIDE, ALIGNED)
    dx_base = base_of(dx, batch, head, dx_strides, ALIGNED)
    store_pairs(
        dx_base,
        token,
        exists,
        plane,
        dx_strides,
        g * c + h * s,
        h * c - g * s,
        CHANNELS,
        PLANES,
        INTERLEAVED,
        WIDE,
        ALIGNED,
    )
    if x is not None:
        x_base = base_of(x, batch, head, x_strides, ALIGNED)
        a, b = load_pairs(x_base, token, exists, plane, x_strides, CHANNELS, PLANES, INTERLEAVED, WIDE, ALIGNED)
        return g * a + h * b, h * a - g * b
    else:
        return c * 0.0, c * 0.0


@triton.jit
def store_given_angles(
    dcos, dsin, strides, real, imaginary, batch, head, token, exists, plane,
    PLANES: tl.constexpr, ALIGNED_ANGLES: tl.constexpr,
):  # fmt: skip
    """Store the gradients of given cosines and sines."""
    mask = exists[:, None] & (plane < PLANES)[None, :]
    offsets = token[:, None].to(tl.int64) * opened_stride(strides[2], ALIGNED_ANGLES) + plane[None, :]
    tl.store(base_of(dcos, batch, head, strides, ALIGNED_ANGLES) + offsets, real, mask=mask)
    tl.store(base_of(dsin, batch, head, strides, ALIGNED_ANGLES) + offsets, imaginary, mask=mask)


@triton.jit
def store_waves(
    dfreqs, strides, dangle, coordinates, coordinates_strides, batch, head, block, token, exists, plane,
    rotary_heads, prefix, AXES: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store this block's share of the gradient of the wave vectors."""
    pointers = dfreqs + batch.to(tl.int64) * opened(strides[0]) + block.to(tl.int64) * opened(strides[1])
    pointers += head * opened(strides[2]) + plane * opened(strides[3])
    rotates = plane < tl.where(head < rotary_heads, PLANES, 0)
    for axis in tl.static_range(AXES):
        p, _ = position(coordinates, batch, token, exists, axis, prefix, coordinates_strides, WIDE)
        tl.store(pointers + axis, tl.sum(dangle * p[:, None], 0), mask=rotates)


@triton.jit
def store_positions(
    dcoordinates, strides, dangle, freqs, freqs_strides, batch, head, token, exists, plane,
    rotary_heads, prefix, AXES: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Store this head's share of the gradient of the coordinates."""
    rows = (token - prefix).to(tl.int64) * opened(strides[2])
    pointers = base_of(dcoordinates, batch, head, strides, False) + rows
    for axis in tl.static_range(AXES):
        w, _ = wave_number(freqs, head, plane, axis, freqs_strides, rotary_heads, PLANES)
        tl.store(pointers + axis, tl.sum(dangle * w[None, :], 1) * TURN, mask=exists & (token >= prefix))


@triton.jit(do_not_specialize=["heads", "tokens", "rotary_heads", "prefix"])
def rotate_backward(
    q, k, grad_q, grad_k, dq, dk, cos, sin, coordinates, freqs, dcos, dsin, dcoordinates, dfreqs,
    q_strides, k_strides, grad_q_strides, grad_k_strides, dq_strides, dk_strides, cos_strides, sin_strides,
    coordinates_strides, freqs_strides, dcos_strides, dcoordinates_strides, dfreqs_strides,
    heads, tokens, rotary_heads, prefix,
    CHANNELS: tl.constexpr, PLANES: tl.constexpr, AXES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_ANGLES: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k, and of whatever the angles came from.

    Wave vectors are shared by tokens and coordinates by heads: every program stores its own share, and the shares
    are summed afterwards, so the result does not depend on the order of programs.
    """
    head, batch, block, token = program(heads, BLOCK_N)
    exists = token < tokens
    plane = tl.arange(0, BLOCK_P)
    c, s = rotation(
        cos, sin, coordinates, freqs, cos_strides, sin_strides, coordinates_strides, freqs_strides,
        batch, head, token, exists, plane, rotary_heads, prefix, AXES, PLANES, WIDE, ALIGNED_ANGLES,
    )  # fmt: skip
    real, imaginary = turn_back(
        q, grad_q, dq, q_strides, grad_q_strides, dq_strides, c, s, batch, head, token, exists, plane,
        CHANNELS, PLANES, INTERLEAVED, WIDE, ALIGNED,
    )  # fmt: skip
    if grad_k is not None:
        k_real, k_imaginary = turn_back(
            k, grad_k, dk, k_strides, grad_k_strides, dk_strides, c, s, batch, head, token, exists, plane,
            CHANNELS, PLANES, INTERLEAVED, WIDE, ALIGNED,
        )  # fmt: skip
        real += k_real
        imaginary += k_imaginary
    if dcos is not None:
        store_given_angles(
            dcos, dsin, dcos_strides, real, imaginary, batch, head, token, exists, plane,
            PLANES, ALIGNED_ANGLES,
        )  # fmt: skip
    # The angle's derivative is <g, i R x>, with R = c + i s.
    dangle = imaginary * c - real * s
    if dfreqs is not None:
        store_waves(
            dfreqs, dfreqs_strides, dangle, coordinates, coordinates_strides, batch, head, block, token, exists, plane,
            rotary_heads, prefix, AXES, PLANES, WIDE,
        )  # fmt: skip
    if dcoordinates is not None:
        store_positions(
            dcoordinates, dcoordinates_strides, dangle, freqs, freqs_strides, batch, head, token, exists, plane,
            rotary_heads, prefix, AXES, PLANES,
        )  # fmt: skip
