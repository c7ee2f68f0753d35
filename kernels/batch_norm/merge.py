"""What the Triton kernels of `bn_relu` and `conv_stem` do once per layer: merge partial results, derive its vectors.

The statistics of a set of values are (count, mean, M2), M2 the sum of squared deviations. Kernels that read the values
leave one set per tile of rows; here they are merged by Chan, Golub and LeVeque (1983), equation 2.1, in a fixed order:
results repeat bitwise. So are the sums of the backward pass. Every set but the last has the same number of values.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastvitc.kernels.batch_norm.formulas import input_coefficients, layer_vectors
from fastvitc.kernels.batch_norm.group import mean_over_group, merged_statistics
from fastvitc.kernels.gpu.triton import launch

_SETS, _COLUMNS = 64, 16  # of a tile
_SPAN = 512  # sets that one program merges, whole tiles: thousands are merged side by side


@triton.jit
def merge(count, mean, m2, other_count, other_mean, other_m2):
    """Count, mean and M2 of two sets together; either may be empty."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    delta = other_mean - mean
    return total, mean + delta * share, m2 + other_m2 + delta * delta * count * share


@triton.jit
def tile_statistics(tile, inside, count):
    """Mean and M2 over the rows of a float32 tile (rows, columns), two-pass; `count` rows are inside."""
    mean = tl.sum(tl.where(inside, tile, 0.0), 0) / count
    deviation = tl.where(inside, tile - mean[None, :], 0.0)
    return mean, tl.sum(deviation * deviation, 0)


@triton.jit
def _bn_merge_kernel(
    partial,  # (2, sets, C): mean, M2
    weight,  # (C,)
    bias,  # (C,)
    out,  # (2, programs, C): mean, M2; with LAST (4, C): mean, biased variance, scale, shift
    values,
    per_set,
    sets,
    eps,
    C: tl.constexpr,
    SPAN: tl.constexpr,
    LAST: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    count = tl.zeros((), tl.float32)
    mean = tl.zeros((BC,), tl.float32)
    m2 = tl.zeros((BC,), tl.float32)
    first = program * SPAN
    for start in range(first, tl.minimum(first + SPAN, sets), BS):
        index = start + tl.arange(0, BS)
        inside = (index < sets)[:, None] & (columns < C)[None, :]
        offsets = index[:, None] * C + columns[None, :]
        part_mean = tl.load(partial + offsets, mask=inside, other=0.0)
        part_m2 = tl.load(partial + sets * C + offsets, mask=inside, other=0.0)
        counts = tl.minimum(tl.maximum(values - index * per_set, 0), per_set).to(tl.float32)
        tile_count = tl.sum(counts, 0)
        pivot = tl.sum(tl.where((index == start)[:, None], part_mean, 0.0), 0)  # keeps a large mean's digits
        share = counts / tl.maximum(tile_count, 1.0)
        tile_mean = pivot + tl.sum((part_mean - pivot[None, :]) * share[:, None], 0)
        deviation = part_mean - tile_mean[None, :]
        tile_m2 = tl.sum(part_m2 + deviation * deviation * counts[:, None], 0)
        count, mean, m2 = merge(count, mean, m2, tile_count, tile_mean, tile_m2)
    known = columns < C
    if LAST:
        var = m2 / count
        scale = tl.load(weight + columns, mask=known, other=0.0).to(tl.float32) * tl.rsqrt(var + eps)
        shift = tl.load(bias + columns, mask=known, other=0.0).to(tl.float32) - mean * scale
        tl.store(out + columns, mean, mask=known)
        tl.store(out + C + columns, var, mask=known)
        tl.store(out + 2 * C + columns, scale, mask=known)
        tl.store(out + 3 * C + columns, shift, mask=known)
    else:
        tl.store(out + program * C + columns, mean, mask=known)
        tl.store(out + (programs + program) * C + columns, m2, mask=known)


@triton.jit
def _bn_bwd_merge_kernel(
    partial,  # (2, sets, C): Σdy', Σdy'·(x − mean)
    vectors,  # (4, C)
    out,  # (2, programs, C): the same sums; with LAST (5, C): dweight, dbias, and the A, B, C of dx
    values,
    sets,
    eps,
    C: tl.constexpr,
    SPAN: tl.constexpr,
    LAST: tl.constexpr,
    TRAINING: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    dbias = tl.zeros((BC,), tl.float32)
    centred = tl.zeros((BC,), tl.float32)
    first = program * SPAN
    for start in range(first, tl.minimum(first + SPAN, sets), BS):
        index = start + tl.arange(0, BS)
        inside = (index < sets)[:, None] & (columns < C)[None, :]
        offsets = index[:, None] * C + columns[None, :]
        dbias += tl.sum(tl.load(partial + offsets, mask=inside, other=0.0), 0)
        centred += tl.sum(tl.load(partial + sets * C + offsets, mask=inside, other=0.0), 0)
    known = columns < C
    if LAST:
        mean = tl.load(vectors + columns, mask=known, other=0.0)
        var = tl.load(vectors + C + columns, mask=known, other=0.0)
        scale = tl.load(vectors + 2 * C + columns, mask=known, other=0.0)
        rstd = tl.rsqrt(var + eps)
        dweight = centred * rstd
        tl.store(out + columns, dweight, mask=known)
        tl.store(out + C + columns, dbias, mask=known)
        slope = tl.zeros((BC,), tl.float32)
        constant = tl.zeros((BC,), tl.float32)
        if TRAINING:
            slope = -scale * rstd * dweight / values
            constant = -scale * dbias / values - slope * mean
        tl.store(out + 2 * C + columns, scale, mask=known)
        tl.store(out + 3 * C + columns, slope, mask=known)
        tl.store(out + 4 * C + columns, constant, mask=known)
    else:
        tl.store(out + program * C + columns, dbias, mask=known)
        tl.store(out + (programs + program) * C + columns, centred, mask=known)


def _grid(programs: int, channels: int) -> tuple[int, int]:
    return programs, triton.cdiv(channels, _COLUMNS)


_TILE = {"BS": _SETS, "BC": _COLUMNS, "num_warps": 4}


def vectors_of(
    partial: Tensor, values: int, per_set: int, weight: Tensor, bias: Tensor, eps: float, group: str
) -> Tensor:
    """(2, sets, C) partial means and M2, `per_set` of a channel's `values` each → the layer's (4, C) vectors."""
    _, sets, channels = partial.shape

    def merged(partial: Tensor, per_set: int, span: int, last: bool) -> Tensor:
        sets = partial.shape[1]
        programs = triton.cdiv(sets, span)
        out = partial.new_empty((4, channels) if last else (2, programs, channels))
        sizes = {"C": channels, "SPAN": span, "LAST": last, **_TILE}
        arguments = partial, weight, bias, out, values, per_set, sets, eps
        launch(_bn_merge_kernel, _grid(programs, channels), *arguments, **sizes)
        return out

    if sets > 2 * _SPAN:
        partial, per_set = merged(partial, per_set, _SPAN, last=False), per_set * _SPAN
    span = triton.next_power_of_2(partial.shape[1])
    if not group:
        return merged(partial, per_set, span, last=True)
    mean, m2 = merged(partial, per_set, span, last=False).squeeze(1)
    mean, var = merged_statistics(mean, m2 / values, values, group)
    return layer_vectors(mean, var, weight, bias, eps)


def gradients_of(
    partial: Tensor, values: int, vectors: Tensor, training: bool, eps: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(2, sets, C) partial Σdy' and Σdy'·(x − mean) → (dweight, dbias, the (3, C) coefficients of dx)."""
    channels = partial.shape[2]

    def merged(partial: Tensor, span: int, last: bool) -> Tensor:
        sets = partial.shape[1]
        programs = triton.cdiv(sets, span)
        out = partial.new_empty((5, channels) if last else (2, programs, channels))
        sizes = {"C": channels, "SPAN": span, "LAST": last, "TRAINING": training, **_TILE}
        launch(
            _bn_bwd_merge_kernel, _grid(programs, channels), partial, vectors, out, values, sets, eps, **sizes
        )
        return out

    if partial.shape[1] > 2 * _SPAN:
        partial = merged(partial, _SPAN, last=False)
    out = merged(partial, triton.next_power_of_2(partial.shape[1]), last=True)
    sums, coefficients = out[:2], out[2:]
    if training and group:
        coefficients = input_coefficients(vectors, *mean_over_group(sums / values, group), eps)
    return *sums, coefficients
