"""The stem's convolution kernels: implicit matrix products on NHWC tensors, forward and both gradients.

B batch, C input and N output channels, (H, W) input and (OH, OW) output, (KH, KW) kernel, S stride, P padding. A
weight is the (N, KH·KW·C) matrix that its channels-last storage is: k = (kh·KW + kw)·C + c.

No activation is ever stored. A program makes its input y = relu(scale·x + shift) while it loads x, zero where the
kernel reaches over the border; the first convolution also mixes each image with the one before it. Likewise it forms
the gradient dz = A·dy' + B·z + C of a convolution's output z. K runs tap by tap, so that a row's place is checked once
for all channels of a tap. Where a tap has fewer channels than a tile, K runs on over the taps instead, and tiles stay
full. Every output element is written by one program: no atomics, results repeat bitwise.
"""

import triton
import triton.language as tl

from fastvitc.kernels.batch_norm.merge import tile_statistics
from fastvitc.kernels.conv_stem.triton.loads import output_gradient, patches, taps
from fastvitc.kernels.gpu.triton import load, relu, rounded, row_vector, store


@triton.jit
def _convolved(
    x,
    vectors,
    mix,
    batch,
    weight,  # (N, KH·KW·C)
    image,
    top,
    left,
    inside,
    columns,  # (BN,) output channels
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RUN_ON: tl.constexpr,
    STEPS: tl.constexpr,
    RELU: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """(BM, BN) tile of the convolution's output, in float32."""
    K: tl.constexpr = KH * KW * C
    dtype: tl.constexpr = weight.dtype.element_ty
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, STEPS):
        tap, channel, k, known = taps(step, C, KH, KW, BK, RUN_ON)
        tile = patches(
            x, vectors, mix, batch, image, top, left, inside, tap, channel, known,
            dtype, H, W, C, KW, RELU, INTERPRET,
        )  # fmt: skip
        mask = known[:, None] & (columns < N)[None, :]
        kernel = load(weight + columns[None, :] * K + k[:, None], mask, INTERPRET)
        acc = tl.dot(tile, kernel, acc, input_precision="ieee")
    return acc


@triton.jit
def _conv_fwd_kernel(
    x,  # (B, H, W, C)
    vectors,  # (2, C) scale and shift, or None
    mix,  # see `patches`
    weight,  # (N, KH·KW·C)
    bias,  # (N,) or None: bias and ReLU follow
    out,  # (B, OH, OW, N)
    partial,  # (2, tiles of rows, N): mean, M2 of out; or None
    M,
    S: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RUN_ON: tl.constexpr,
    STEPS: tl.constexpr,
    RELU: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    OH: tl.constexpr = (H + 2 * P - KH) // S + 1
    OW: tl.constexpr = (W + 2 * P - KW) // S + 1
    # Programs of one tile of rows and all columns are neighbours: they read the same input.
    COLUMN_TILES: tl.constexpr = (N + BN - 1) // BN
    row_tile = tl.program_id(0) // COLUMN_TILES
    columns = (tl.program_id(0) % COLUMN_TILES) * BN + tl.arange(0, BN)
    rows = row_tile * BM + tl.arange(0, BM)
    inside = rows < M
    image = (rows // (OH * OW)).to(tl.int64) * (H * W * C)
    top = rows // OW % OH * S - P
    left = rows % OW * S - P
    acc = _convolved(
        x, vectors, mix, M // (OH * OW), weight, image, top, left, inside, columns,
        H, W, C, N, KH, KW, BM, BN, BK, RUN_ON, STEPS, RELU, INTERPRET,
    )  # fmt: skip
    if bias is not None:
        acc = relu(acc + tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :])
    mask = inside[:, None] & (columns < N)[None, :]
    store(out + rows[:, None].to(tl.int64) * N + columns[None, :], acc, mask, INTERPRET)
    if partial is not None:
        # Of the rounded values: they are what the next layer normalises.
        kept = rounded(acc, out.dtype.element_ty, INTERPRET).to(tl.float32)
        mean, m2 = tile_statistics(kept, mask, tl.minimum(M - row_tile * BM, BM).to(tl.float32))
        place = partial + row_tile * N + columns
        tl.store(place, mean, mask=columns < N)
        tl.store(place + tl.num_programs(0) // COLUMN_TILES * N, m2, mask=columns < N)


@triton.jit
def _tokens_fwd_kernel(
    x,  # (B, H, W, C)
    vectors,  # (2, C) scale and shift, or None
    mix,  # see `patches`
    weight,  # (N, KH·KW·C)
    bias,  # (N,)
    class_token,  # (N,) or None
    pos_embed,  # (FIRST + OH·OW, N) or None
    out,  # (B, FIRST + OH·OW, N)
    M,
    S: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    FIRST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RUN_ON: tl.constexpr,
    STEPS: tl.constexpr,
    RELU: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    OH: tl.constexpr = (H + 2 * P - KH) // S + 1
    OW: tl.constexpr = (W + 2 * P - KW) // S + 1
    TOKENS: tl.constexpr = FIRST + OH * OW
    COLUMN_TILES: tl.constexpr = (N + BN - 1) // BN
    columns = (tl.program_id(0) % COLUMN_TILES) * BN + tl.arange(0, BN)
    rows = tl.program_id(0) // COLUMN_TILES * BM + tl.arange(0, BM)
    token = rows % TOKENS
    patch = token - FIRST
    image = (rows // TOKENS).to(tl.int64) * (H * W * C)
    inside = (rows < M) & (patch >= 0)
    acc = _convolved(
        x, vectors, mix, M // TOKENS, weight, image, patch // OW * S - P, patch % OW * S - P, inside, columns,
        H, W, C, N, KH, KW, BM, BN, BK, RUN_ON, STEPS, RELU, INTERPRET,
    )  # fmt: skip
    known = columns < N
    acc += tl.load(bias + columns, mask=known, other=0.0).to(tl.float32)[None, :]
    if class_token is not None:
        first = tl.load(class_token + columns, mask=known, other=0.0).to(tl.float32)
        acc = tl.where((patch < 0)[:, None], first[None, :], acc)
    mask = (rows < M)[:, None] & known[None, :]
    if pos_embed is not None:
        acc += load(pos_embed + token[:, None] * N + columns[None, :], mask, INTERPRET).to(tl.float32)
    store(out + rows[:, None].to(tl.int64) * N + columns[None, :], acc, mask, INTERPRET)


@triton.jit
def _conv_bwd_input_kernel(
    dy,  # (B, FIRST + OH·OW, N)
    z,  # (B, OH, OW, N) or None
    coefficients,  # (3, N)
    weight,  # (N, KH·KW·C)
    x,  # (B, H, W, C) what was normalised below
    vectors,  # (4, C) or None
    dx,  # (B, H, W, C): dy' of the layer below, or without vectors the gradient itself
    partial,  # (2, tiles, C): Σdy', Σdy'·(x − mean); or None
    sums,  # (IMAGES / BM, OH·OW, N) sums of dy over BM images; or None
    images,
    IMAGES,
    S: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    FIRST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Pixels fall into S·S classes by their residue: each sees its own taps, and no product is with zero.

    With `sums` a tile holds one pixel position of BM images (padded to IMAGES), so that the sum of its rows is the sum
    over the images. One program writes each position.
    """
    dtype: tl.constexpr = weight.dtype.element_ty
    OH: tl.constexpr = (H + 2 * P - KH) // S + 1
    OW: tl.constexpr = (W + 2 * P - KW) // S + 1
    K: tl.constexpr = KH * KW * C
    CHUNKS: tl.constexpr = (N + BK - 1) // BK
    COLUMN_TILES: tl.constexpr = (C + BN - 1) // BN
    HS: tl.constexpr = (H + S - 1) // S
    WS: tl.constexpr = (W + S - 1) // S
    columns = (tl.program_id(0) % COLUMN_TILES) * BN + tl.arange(0, BN)
    tile_index = tl.program_id(0) // COLUMN_TILES
    residue = tile_index % (S * S)
    row_residue, column_residue = residue // S, residue % S
    rows = tile_index // (S * S) * BM + tl.arange(0, BM)
    if sums is not None:
        place, image = rows // IMAGES, rows % IMAGES
    else:
        place, image = rows % (HS * WS), rows // (HS * WS)
    h = place // WS * S + (row_residue + P * (S - 1)) % S  # (h + P) % S is row_residue
    w = place % WS * S + (column_residue + P * (S - 1)) % S
    inside = (rows < IMAGES * (HS * WS)) & (image < images) & (h < H) & (w < W)
    last_row, last_column = (h + P) // S, (w + P) // S  # of the outputs that the pixel takes part in
    first_output = image.to(tl.int64) * ((FIRST + OH * OW) * N) + FIRST * N
    taps_down = (KH - row_residue + S - 1) // S
    taps_across = (KW - column_residue + S - 1) // S
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, taps_down * taps_across * CHUNKS):
        tap = step // CHUNKS
        channel = (step % CHUNKS) * BK + tl.arange(0, BK)
        known = channel < N
        down, across = tap // taps_across, tap % taps_across
        row, column = last_row - down, last_column - across
        valid = (inside & (row >= 0) & (row < OH) & (column >= 0) & (column < OW))[:, None] & known[None, :]
        offsets = first_output[:, None] + (((row * OW + column) * N)[:, None] + channel[None, :])
        if sums is not None:
            gradient = load(dy + offsets, valid, INTERPRET).to(tl.float32)
            if tl.program_id(0) % (COLUMN_TILES * S * S) == 0:
                first = tile_index // (S * S) * BM
                total = sums + ((first % IMAGES // BM) * (OH * OW) + first // IMAGES) * N + channel
                tl.store(total, tl.sum(gradient, 0), mask=known)
            tile = rounded(gradient, dtype, INTERPRET)
        else:
            tile = output_gradient(dy, z, coefficients, offsets, channel, valid, known, dtype, N, INTERPRET)
        k = ((row_residue + down * S) * KW + column_residue + across * S) * C + columns
        mask = known[:, None] & (columns < C)[None, :]
        kernel = load(weight + channel[:, None] * K + k[None, :], mask, INTERPRET)
        acc = tl.dot(tile, kernel, acc, input_precision="ieee")
    known = columns < C
    mask = inside[:, None] & known[None, :]
    offsets = image.to(tl.int64)[:, None] * (H * W * C) + (((h * W + w) * C)[:, None] + columns[None, :])
    if vectors is not None:
        mean = row_vector(vectors, 0, columns, known, C)
        scale, shift = row_vector(vectors, 2, columns, known, C), row_vector(vectors, 3, columns, known, C)
        raw = load(x + offsets, mask, INTERPRET).to(tl.float32)
        acc = tl.where(mask & (raw * scale + shift > 0), acc, 0.0)
        kept = rounded(acc, dx.dtype.element_ty, INTERPRET).to(tl.float32)
        out = partial + tile_index * C + columns
        tl.store(out, tl.sum(kept, 0), mask=known)
        centred = tl.sum(kept * (raw - mean), 0)
        tl.store(out + tl.num_programs(0) // COLUMN_TILES * C, centred, mask=known)
    store(dx + offsets, acc, mask, INTERPRET)


@triton.jit
def _conv_bwd_weight_kernel(
    x,  # (B, H, W, C)
    vectors,  # (2, C) scale and shift, or None
    mix,  # see `patches`
    dy,  # (B, FIRST + OH·OW, N)
    z,  # (B, OH, OW, N) or None
    coefficients,  # (3, N)
    partial,  # (parts, N, KH·KW·C) float32
    M,
    part,
    dtype: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    FIRST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RUN_ON: tl.constexpr,
    STEPS: tl.constexpr,
    RELU: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Sum over one part of the rows; the parts are added up afterwards, in order."""
    OH: tl.constexpr = (H + 2 * P - KH) // S + 1
    OW: tl.constexpr = (W + 2 * P - KW) // S + 1
    K: tl.constexpr = KH * KW * C
    COLUMN_TILES: tl.constexpr = (N + BN - 1) // BN
    TILES: tl.constexpr = COLUMN_TILES * STEPS
    tile_index = tl.program_id(0) % TILES
    tap, channel, k, known = taps(tile_index // COLUMN_TILES, C, KH, KW, BK, RUN_ON)
    columns = (tile_index % COLUMN_TILES) * BN + tl.arange(0, BN)
    known_columns = columns < N
    index = tl.program_id(0) // TILES
    acc = tl.zeros((BN, BK), tl.float32)
    for start in range(index * part, tl.minimum((index + 1) * part, M), BM):
        rows = start + tl.arange(0, BM)
        inside = rows < M
        number = rows // (OH * OW)
        tile = patches(
            x, vectors, mix, M // (OH * OW), number.to(tl.int64) * (H * W * C),
            rows // OW % OH * S - P, rows % OW * S - P, inside, tap, channel, known,
            dtype, H, W, C, KW, RELU, INTERPRET,
        )  # fmt: skip
        valid = inside[:, None] & known_columns[None, :]
        offsets = (rows + (number + 1) * FIRST)[:, None].to(tl.int64) * N + columns[None, :]
        gradient = output_gradient(
            dy, z, coefficients, offsets, columns, valid, known_columns, dtype, N, INTERPRET
        )
        acc = tl.dot(tl.trans(gradient), tile, acc, input_precision="ieee")
    offsets = index.to(tl.int64) * (N * K) + columns[:, None] * K + k[None, :]
    tl.store(partial + offsets, acc, mask=known_columns[:, None] & known[None, :])
