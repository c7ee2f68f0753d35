"""What the stem's convolution kernels load: tiles of the input patches and of the output's gradient.

For the letters see `fastvitc.kernels.conv_stem.triton.kernels`.
"""

import triton
import triton.language as tl

from fastvitc.kernels.gpu.triton import load, relu, rounded, row_vector


@triton.jit
def taps(step, C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BK: tl.constexpr, RUN_ON: tl.constexpr):
    """(tap, input channel, k, whether k exists) of the BK columns of a step of K; the tap is one for all or (1, BK)."""
    if RUN_ON:
        k = step * BK + tl.arange(0, BK)
        tap, channel, known = (k // C)[None, :], k % C, k < KH * KW * C
    else:
        CHUNKS: tl.constexpr = (C + BK - 1) // BK
        tap = step // CHUNKS
        channel = (step % CHUNKS) * BK + tl.arange(0, BK)
        k, known = tap * C + channel, channel < C
    return tap, channel, k, known


@triton.jit
def _mixed(
    tile,
    others,  # where the pixels of the image before lie
    mix,  # (5,) weight, top, bottom, left, right
    row,
    column,
    valid,
    INTERPRET: tl.constexpr,
):
    """w·tile + (1 − w)·others inside the box; outside it the tile, and the other pixels are not read."""
    rows = (row >= tl.load(mix + 1)) & (row < tl.load(mix + 2))
    box = valid & rows & (column >= tl.load(mix + 3)) & (column < tl.load(mix + 4))
    other = load(others, box, INTERPRET).to(tl.float32)
    weight = tl.load(mix)
    tile = tile.to(tl.float32)
    return tl.where(box, tile * weight + other * (1 - weight), tile)


@triton.jit
def patches(
    x,  # (B, H, W, C)
    vectors,  # (2, C) scale and shift, or None
    mix,  # (5,) weight, top, bottom, left, right; or None
    batch,  # B, of which the first image is mixed with the last
    image,  # (BM,) int64 offset of each row's image
    top,  # (BM,) first image row under the kernel
    left,  # (BM,)
    inside,  # (BM,)
    tap,
    channel,
    known,
    dtype: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    KW: tl.constexpr,
    RELU: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The (BM, BK) tile of the input patches at a step of K."""
    row = top[:, None] + tap // KW
    column = left[:, None] + tap % KW
    valid = inside[:, None] & (row >= 0) & (row < H) & (column >= 0) & (column < W) & known[None, :]
    offsets = (row * W + column) * C + channel[None, :]
    tile = load(x + image[:, None] + offsets, valid, INTERPRET)
    if mix is not None:
        partner = tl.where(image == 0, tl.cast(batch - 1, tl.int64) * (H * W * C), image - H * W * C)
        tile = _mixed(tile, x + partner[:, None] + offsets, mix, row, column, valid, INTERPRET)
    if vectors is not None:
        scale, shift = row_vector(vectors, 0, channel, known, C), row_vector(vectors, 1, channel, known, C)
        tile = tile.to(tl.float32) * scale + shift
        if RELU:
            tile = relu(tile)
        tile = tl.where(valid, tile, 0.0)
    return rounded(tile, dtype, INTERPRET)


@triton.jit
def output_gradient(
    dy,  # (rows, N), with rows before those of each image where there is no z
    z,  # (rows, N) or None
    coefficients,  # (3, N)
    offsets,  # of the tile in dy and z
    channel,
    valid,
    known,
    dtype: tl.constexpr,
    N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """A tile of dz = A·dy' + B·z + C, or of dy where no normalisation follows the convolution."""
    tile = load(dy + offsets, valid, INTERPRET)
    if z is not None:
        a = row_vector(coefficients, 0, channel, known, N)
        b = row_vector(coefficients, 1, channel, known, N)
        c = row_vector(coefficients, 2, channel, known, N)
        raw = load(z + offsets, valid, INTERPRET).to(tl.float32)
        tile = tl.where(valid, tile.to(tl.float32) * a + (raw * b + c), 0.0)
    return rounded(tile, dtype, INTERPRET)
