"""BatchNorm + ReLU on the GPU, in two stages each way over the NHWC matrix of M = B·H·W rows and C channels.

Forward: partial statistics of row chunks; their merge; relu(scale·x + shift). Backward: partial sums of dy' and
dy'·(x − mean); their merge; dx. In 16 bits that is 6 and 10 bytes an element: x twice and y; x and dy twice and dx. The
ReLU mask is computed again from x by the forward's own expression. Statistics are two-pass within a tile. The merges
are those of `fastvitc.kernels.batch_norm.merge`; between them the results of a process group come together.

Not measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvitc.kernels.batch_norm.formulas import layer_vectors
from fastvitc.kernels.batch_norm.merge import gradients_of, merge, tile_statistics, vectors_of
from fastvitc.kernels.bn_relu.arguments import Norm
from fastvitc.kernels.choice.layout import laid_out_as
from fastvitc.kernels.gpu.triton import launch, load, relu, row_vector, store

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
def _place(row, column, M, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """(offsets, mask) of a tile of the matrix, and (columns, mask) of its vectors."""
    rows = row + tl.arange(0, BR)
    columns = column + tl.arange(0, BC)
    inside = (rows[:, None] < M) & (columns[None, :] < C)
    return rows[:, None].to(tl.int64) * C + columns[None, :], inside, columns, columns < C


@triton.jit
def _bn_stats_kernel(
    x,  # (M, C)
    partial,  # (2, chunks, C): mean, M2
    M,
    chunk,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    first = tl.program_id(0) * chunk
    column = tl.program_id(1) * BC
    columns = column + tl.arange(0, BC)
    count = tl.zeros((), tl.float32)
    mean = tl.zeros((BC,), tl.float32)
    m2 = tl.zeros((BC,), tl.float32)
    for start in range(first, tl.minimum(first + chunk, M), BR):
        offsets, inside, _, _ = _place(start, column, M, C, BR, BC)
        tile = load(x + offsets, inside, INTERPRET).to(tl.float32)
        tile_count = tl.minimum(M - start, BR).to(tl.float32)
        tile_mean, tile_m2 = tile_statistics(tile, inside, tile_count)
        count, mean, m2 = merge(count, mean, m2, tile_count, tile_mean, tile_m2)
    out = partial + tl.program_id(0) * C + columns
    tl.store(out, mean, mask=columns < C)
    tl.store(out + tl.num_programs(0) * C, m2, mask=columns < C)


@triton.jit
def _bn_relu_apply_kernel(
    x,  # (M, C)
    vectors,  # (4, C)
    y,  # (M, C)
    M,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    offsets, inside, columns, known = _place(tl.program_id(0) * BR, tl.program_id(1) * BC, M, C, BR, BC)
    scale, shift = row_vector(vectors, 2, columns, known, C), row_vector(vectors, 3, columns, known, C)
    tile = load(x + offsets, inside, INTERPRET).to(tl.float32)
    store(y + offsets, relu(tile * scale + shift), inside, INTERPRET)


@triton.jit
def _masked(x, dy, offsets, inside, scale, shift, INTERPRET: tl.constexpr):
    """x and dy' = dy·[scale·x + shift > 0], in float32."""
    tile = load(x + offsets, inside, INTERPRET).to(tl.float32)
    grad = load(dy + offsets, inside, INTERPRET).to(tl.float32)
    return tile, tl.where(tile * scale + shift > 0, grad, 0.0)


@triton.jit
def _bn_relu_bwd_sums_kernel(
    dy,  # (M, C)
    x,  # (M, C)
    vectors,  # (4, C)
    partial,  # (2, chunks, C): Σdy', Σdy'·(x − mean)
    M,
    chunk,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    first = tl.program_id(0) * chunk
    column = tl.program_id(1) * BC
    columns = column + tl.arange(0, BC)
    known = columns < C
    mean = row_vector(vectors, 0, columns, known, C)
    scale, shift = row_vector(vectors, 2, columns, known, C), row_vector(vectors, 3, columns, known, C)
    sum_dy = tl.zeros((BC,), tl.float32)
    sum_dy_x = tl.zeros((BC,), tl.float32)
    for start in range(first, tl.minimum(first + chunk, M), BR):
        offsets, inside, _, _ = _place(start, column, M, C, BR, BC)
        tile, grad = _masked(x, dy, offsets, inside, scale, shift, INTERPRET)
        sum_dy += tl.sum(grad, 0)
        sum_dy_x += tl.sum(grad * (tile - mean), 0)
    out = partial + tl.program_id(0) * C + columns
    tl.store(out, sum_dy, mask=known)
    tl.store(out + tl.num_programs(0) * C, sum_dy_x, mask=known)


@triton.jit
def _bn_relu_bwd_apply_kernel(
    dy,  # (M, C)
    x,  # (M, C)
    vectors,  # (4, C)
    coefficients,  # (3, C): A, B, C
    dx,  # (M, C) = A·dy' + B·x + C
    M,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    offsets, inside, columns, known = _place(tl.program_id(0) * BR, tl.program_id(1) * BC, M, C, BR, BC)
    scale, shift = row_vector(vectors, 2, columns, known, C), row_vector(vectors, 3, columns, known, C)
    tile, grad = _masked(x, dy, offsets, inside, scale, shift, INTERPRET)
    per_dy, per_x = (
        row_vector(coefficients, 0, columns, known, C),
        row_vector(coefficients, 1, columns, known, C),
    )
    constant = row_vector(coefficients, 2, columns, known, C)
    store(dx + offsets, grad * per_dy + (tile * per_x + constant), inside, INTERPRET)


def _matrix(x: Tensor) -> Tensor:
    """(B, C, H, W) → the dense (B·H·W, C) matrix of its NHWC form; a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def _image(matrix: Tensor, x: Tensor) -> Tensor:
    """The (B·H·W, C) matrix in the shape and strides of x; a view where x is channels-last."""
    batch, channels, height, width = x.shape
    return laid_out_as(matrix.view(batch, height, width, channels).permute(0, 3, 1, 2), x)


def _reduced(kernel, rows: int, channels: int, *tensors: Tensor) -> Tensor:
    """(2, chunks, C) partial results of a kernel over chunks of rows."""
    chunk, chunks = _chunking(rows)
    block = _columns(channels)
    partial = tensors[0].new_empty(2, chunks, channels, dtype=torch.float32)
    grid = chunks, triton.cdiv(channels, block)
    launch(kernel, grid, *tensors, partial, rows, chunk, C=channels, BR=_ROWS, BC=block, num_warps=_WARPS)
    return partial


def _applied(kernel, *tensors: Tensor) -> Tensor:
    """What a kernel writes over the whole matrix, the first of the tensors."""
    rows, channels = tensors[0].shape
    block = _columns(channels)
    out = torch.empty_like(tensors[0])
    grid = triton.cdiv(rows, _ROWS), triton.cdiv(channels, block)
    launch(kernel, grid, *tensors, out, rows, C=channels, BR=_ROWS, BC=block, num_warps=_WARPS)
    return out


def forward(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    matrix = _matrix(x)
    rows, channels = matrix.shape
    if norm.training:
        partial = _reduced(_bn_stats_kernel, rows, channels, matrix)
        vectors = vectors_of(partial, rows, _chunking(rows)[0], norm.weight, norm.bias, norm.eps, norm.group)
    else:
        vectors = layer_vectors(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    return _image(_applied(_bn_relu_apply_kernel, matrix, vectors), x), vectors


def backward(
    dy: Tensor, x: Tensor, vectors: Tensor, training: bool, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    dy_matrix, matrix = _matrix(dy), _matrix(x)
    partial = _reduced(_bn_relu_bwd_sums_kernel, *matrix.shape, dy_matrix, matrix, vectors)
    dweight, dbias, coefficients = gradients_of(partial, len(matrix), vectors, training, eps, group)
    dx = _applied(_bn_relu_bwd_apply_kernel, dy_matrix, matrix, vectors, coefficients)
    return _image(dx, x), dweight, dbias
