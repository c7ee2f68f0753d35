"""Tile and launch sizes of the stem's kernels: chosen from what the compiled code uses, not from a measurement."""

from typing import NamedTuple

import torch
import triton

_PROGRAMS = 256  # that a weight gradient is split into: what a GPU of 132 multiprocessors holds at once
_LEAST_ROWS = 4096  # of a part of the weight gradient, which costs N·K floats of traffic


class Tiles(NamedTuple):
    """BM rows by BN columns, K in steps of BK; for a weight gradient K by BK and rows in steps of BM."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    maxnreg: int = 255  # left alone, the compiler spills a few registers to make room for more programs


def runs_on(channels: int) -> bool:
    """Whether a tile of K spans several taps: where a tap has fewer channels than a matrix unit's smallest tile."""
    return channels < 16


def _columns(channels: int, largest: int) -> int:
    return max(16, min(largest, triton.next_power_of_2(channels)))


def forward_tiles(dtype: torch.dtype, out_channels: int) -> Tiles:
    """Of the forward kernels: wide, since each tile of columns normalises its input anew.

    Steps of 32 pad 24 and 48 channels by a third, and other widths of the models not at all; steps of 64 or tiles twice
    as wide leave room for half as many warps.
    """
    if dtype == torch.float32:
        return Tiles(64, _columns(out_channels, 64), 16, 4, 1)
    return Tiles(128, _columns(out_channels, 128), 32, 8, 2)


def input_gradient_tiles(dtype: torch.dtype, channels: int) -> Tiles:
    """Of the gradient of the input, with K over the output's channels."""
    if dtype == torch.float32:
        return Tiles(64, _columns(channels, 64), 16, 8, 1)
    return Tiles(128, _columns(channels, 64), 32, 8, 2)


def weight_gradient_tiles(dtype: torch.dtype, k: int, out_channels: int) -> Tiles:
    """Of the gradient of the weight. There K runs on over the taps: a wide tile forms dz once for several of them."""
    if dtype == torch.float32:
        return Tiles(32, _columns(out_channels, 64), _columns(k, 64), 8, 1)
    return Tiles(32, _columns(out_channels, 64), _columns(k, 128), 8, 2)


def part_of_rows(rows: int, blocks: int, step: int) -> int:
    """Rows of a part of the weight gradient, a multiple of the step: enough parts of `blocks` programs each."""
    parts = max(1, min(_PROGRAMS // blocks, rows // _LEAST_ROWS))
    return triton.cdiv(triton.cdiv(rows, parts), step) * step
