"""BatchNorm + ReLU on the GPU, in two stages each way over the NHWC matrix of M = B·H·W rows and C channels.

Forward: partial statistics of row chunks; their merge; relu(a·x + b). Backward: partial sums of dy' and dy'·x̂; their
merge; dx. In 16 bits that is 6 and 10 bytes an element: x twice and y; x and dy twice and dx. The ReLU mask is computed
again from x by the forward's own expression. Statistics are two-pass within a tile and merged by Chan, Golub and
LeVeque (1983), equation 2.1, in a fixed order: results repeat bitwise. The stages are apart so that a process
group can gather the partial results between them.

Not measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvitc.kernels._batch_norm import scale_shift
from fastvitc.kernels._triton import launch, load, store

_ROWS, _WARPS = 64, 4
_CHUNKS = 512  # row chunks, at most: enough programs to fill any GPU, few enough to merge in one


def _columns(channels: int) -> int:
    """Channels of a tile: 128-bit loads for each thread, and no more than the matrix has."""
    return min(64, triton.next_power_of_2(channels))


def _chunking(rows: int) -> tuple[int, int]:
    """(rows of a chunk, a multiple of the tile's; number of chunks)."""
    tiles = triton.cdiv(rows, _ROWS)
    chunk = triton.cdiv(tiles, _CHUNKS) * _ROWS
    return chunk, triton.cdiv(rows, chunk)


@triton.jit
def _merge(count, mean, m2, other_count, other_mean, other_m2):
    """Count, mean and sum of squared deviations of two sets together; either may be empty."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    delta = other_mean - mean
    return total, mean + delta * share, m2 + other_m2 + delta * delta * count * share


@triton.jit
def _bn_stats_kernel(
    x,  # (M, C)
    partial_mean,  # (chunks, C)
    partial_m2,  # (chunks, C)
    M,
    chunk,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.program_id(0) * chunk
    count = tl.zeros((), tl.float32)
    mean = tl.zeros((BC,), tl.float32)
    m2 = tl.zeros((BC,), tl.float32)
    for start in range(first, tl.minimum(first + chunk, M), BR):
        rows = start + tl.arange(0, BR)
        inside = (rows[:, None] < M) & (columns[None, :] < C)
        offsets = rows[:, None].to(tl.int64) * C + columns[None, :]
        tile = load(x + offsets, inside, INTERPRET).to(tl.float32)
        tile_count = tl.minimum(M - start, BR).to(tl.float32)
        tile_mean = tl.sum(tile, 0) / tile_count
        deviation = tl.where(inside, tile - tile_mean[None, :], 0.0)
        count, mean, m2 = _merge(count, mean, m2, tile_count, tile_mean, tl.sum(deviation * deviation, 0))
    out = tl.program_id(0) * C + columns
    tl.store(partial_mean + out, mean, mask=columns < C)
    tl.store(partial_m2 + out, m2, mask=columns < C)


@triton.jit
def _bn_finalize_kernel(
    partial_mean,  # (chunks, C)
    partial_m2,  # (chunks, C)
    mean_out,  # (C,)
    var_out,  # (C,) biased
    M,
    chunk,
    chunks,
    C: tl.constexpr,
    BC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    count = tl.zeros((), tl.float32)
    mean = tl.zeros((BC,), tl.float32)
    m2 = tl.zeros((BC,), tl.float32)
    for i in range(0, chunks):
        part_mean = tl.load(partial_mean + i * C + columns, mask=columns < C, other=0.0)
        part_m2 = tl.load(partial_m2 + i * C + columns, mask=columns < C, other=0.0)
        part_count = tl.minimum(M - i * chunk, chunk).to(tl.float32)
        count, mean, m2 = _merge(count, mean, m2, part_count, part_mean, part_m2)
    tl.store(mean_out + columns, mean, mask=columns < C)
    tl.store(var_out + columns, m2 / count, mask=columns < C)


@triton.jit
def _bn_relu_apply_kernel(
    x,  # (M, C)
    a,  # (C,)
    b,  # (C,)
    y,  # (M, C)
    M,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (rows[:, None] < M) & (columns[None, :] < C)
    offsets = rows[:, None].to(tl.int64) * C + columns[None, :]
    scale = tl.load(a + columns, mask=columns < C, other=0.0)
    shift = tl.load(b + columns, mask=columns < C, other=0.0)
    tile = load(x + offsets, inside, INTERPRET).to(tl.float32)
    store(y + offsets, tl.maximum(tile * scale[None, :] + shift[None, :], 0.0), inside, INTERPRET)


@triton.jit
def _masked(x, dy, offsets, inside, scale, shift, INTERPRET: tl.constexpr):
    """x and dy' = dy·[a·x + b > 0], in float32."""
    tile = load(x + offsets, inside, INTERPRET).to(tl.float32)
    grad = load(dy + offsets, inside, INTERPRET).to(tl.float32)
    return tile, tl.where(tile * scale[None, :] + shift[None, :] > 0, grad, 0.0)


@triton.jit
def _bn_relu_bwd_sums_kernel(
    dy,  # (M, C)
    x,  # (M, C)
    a,  # (C,)
    b,  # (C,)
    mean,  # (C,)
    partial_dy,  # (chunks, C)
    partial_dy_x,  # (chunks, C): Σdy'·(x − mean)
    M,
    chunk,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    scale = tl.load(a + columns, mask=columns < C, other=0.0)
    shift = tl.load(b + columns, mask=columns < C, other=0.0)
    centre = tl.load(mean + columns, mask=columns < C, other=0.0)
    first = tl.program_id(0) * chunk
    sum_dy = tl.zeros((BC,), tl.float32)
    sum_dy_x = tl.zeros((BC,), tl.float32)
    for start in range(first, tl.minimum(first + chunk, M), BR):
        rows = start + tl.arange(0, BR)
        inside = (rows[:, None] < M) & (columns[None, :] < C)
        offsets = rows[:, None].to(tl.int64) * C + columns[None, :]
        tile, grad = _masked(x, dy, offsets, inside, scale, shift, INTERPRET)
        sum_dy += tl.sum(grad, 0)
        sum_dy_x += tl.sum(grad * (tile - centre[None, :]), 0)
    out = tl.program_id(0) * C + columns
    tl.store(partial_dy + out, sum_dy, mask=columns < C)
    tl.store(partial_dy_x + out, sum_dy_x, mask=columns < C)


@triton.jit
def _bn_relu_bwd_apply_kernel(
    dy,  # (M, C)
    x,  # (M, C)
    a,  # (C,)
    b,  # (C,)
    slope,  # (C,)
    offset,  # (C,)
    dx,  # (M, C) = a·dy' + slope·x + offset
    M,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (rows[:, None] < M) & (columns[None, :] < C)
    offsets = rows[:, None].to(tl.int64) * C + columns[None, :]
    scale = tl.load(a + columns, mask=columns < C, other=0.0)
    shift = tl.load(b + columns, mask=columns < C, other=0.0)
    per_x = tl.load(slope + columns, mask=columns < C, other=0.0)
    constant = tl.load(offset + columns, mask=columns < C, other=0.0)
    tile, grad = _masked(x, dy, offsets, inside, scale, shift, INTERPRET)
    result = grad * scale[None, :] + (tile * per_x[None, :] + constant[None, :])
    store(dx + offsets, result, inside, INTERPRET)


def _matrix(x: Tensor) -> Tensor:
    """(B, C, H, W) → the dense (B·H·W, C) matrix of its NHWC form; a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (C,) float32, of a (M, C) matrix."""
    rows, channels = x.shape
    chunk, chunks = _chunking(rows)
    block = _columns(channels)
    blocks = triton.cdiv(channels, block)
    partial = x.new_empty(2, chunks, channels, dtype=torch.float32)
    sizes = {"C": channels, "BR": _ROWS, "BC": block, "num_warps": _WARPS}
    launch(_bn_stats_kernel, (chunks, blocks), x, *partial.unbind(), rows, chunk, **sizes)
    mean, var = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    launch(
        _bn_finalize_kernel,
        (blocks,),
        *partial.unbind(),
        mean,
        var,
        rows,
        chunk,
        chunks,
        C=channels,
        BC=block,
        num_warps=1,
    )
    return mean, var


def forward(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    matrix = _matrix(x)
    mean, var = statistics(matrix) if training else (running_mean.clone(), running_var.clone())
    y = torch.empty_like(matrix)
    rows, channels = matrix.shape
    block = _columns(channels)
    launch(
        _bn_relu_apply_kernel,
        (triton.cdiv(rows, _ROWS), triton.cdiv(channels, block)),
        matrix,
        *scale_shift(mean, var, weight, bias, eps),
        y,
        rows,
        C=channels,
        BR=_ROWS,
        BC=block,
        num_warps=_WARPS,
    )
    return _like(y, x), mean, var


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    matrix, dy_matrix = _matrix(x), _matrix(dy)
    rows, channels = matrix.shape
    chunk, chunks = _chunking(rows)
    block = _columns(channels)
    blocks = triton.cdiv(channels, block)
    a, b = scale_shift(mean, var, weight, bias, eps)
    partial = x.new_empty(2, chunks, channels, dtype=torch.float32)
    sizes = {"C": channels, "BR": _ROWS, "BC": block, "num_warps": _WARPS}
    launch(
        _bn_relu_bwd_sums_kernel,
        (chunks, blocks),
        dy_matrix,
        matrix,
        a,
        b,
        mean,
        *partial.unbind(),
        rows,
        chunk,
        **sizes,
    )
    rstd = torch.rsqrt(var + eps)
    dbias, centred = (part.sum(0) for part in partial)
    dweight = centred * rstd
    # dx = a·(dy' − dbias/n − x̂·dweight/n) = a·dy' + slope·x + offset
    slope = -a * rstd * dweight / rows if training else torch.zeros_like(a)
    offset = -a * dbias / rows - slope * mean if training else torch.zeros_like(a)
    dx = torch.empty_like(matrix)
    launch(
        _bn_relu_bwd_apply_kernel,
        (triton.cdiv(rows, _ROWS), blocks),
        dy_matrix,
        matrix,
        a,
        b,
        slope,
        offset,
        dx,
        rows,
        **sizes,
    )
    return _like(dx, x), dweight, dbias


def _like(matrix: Tensor, x: Tensor) -> Tensor:
    """The (B·H·W, C) matrix in the shape and strides of x; a view where x is channels-last."""
    batch, channels, height, width = x.shape
    image = matrix.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return image if image.stride() == x.stride() else torch.empty_like(x).copy_(image)
