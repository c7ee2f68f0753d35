"""Attention on the GPU: forward with online softmax, backward without atomics, on the packed projection in place.

B batch, T tokens, N heads, D head dim. Forward: one program per block of BM queries of one (image, head). Backward, one
launch in one of two forms, both of which recompute P from the row log-sum-exp:

- resident, where a head's K, V and their gradients fit on chip: one program per (image, head) walks over the queries;
- in roles, for everything else: some programs make dK and dV of a block of keys, the others dQ of a block of queries.
  The scores are made twice, which takes 7 matrix products instead of 5; reads that both make come from the cache.

What crosses DRAM is qkv, out, dout and lse once, and dqkv. Each element of the gradient is written by one program:
results repeat bitwise. Limit: keys past the last token are computed and masked, 256 for 197 tokens where resident.

Not measured on a GPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvitc.kernels.gpu.triton import LOG2E, architecture, launch, load, rounded, store


@dataclass(frozen=True)
class Blocks:
    """Tile and launch sizes: BM queries by BN keys."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    maxnreg: int = 255  # left alone, the compiler spills a few registers to make room for more programs


def forward_blocks(dtype: torch.dtype, head_dim: int) -> Blocks:
    """Sizes of the forward kernel: the largest that spill on no architecture."""
    if dtype == torch.float32:
        return Blocks(32, 32, 4, 1) if head_dim <= 64 else Blocks(16, 16, 4, 1)
    if head_dim <= 32:
        return Blocks(128, 64, 8, 2)
    return Blocks(64, 64 if head_dim <= 64 else 32, 4, 2)


def backward_blocks(dtype: torch.dtype, head_dim: int, architecture: str) -> Blocks:
    """Sizes of the backward kernel: as large as registers allow; 64 rows make warp-group instructions on sm_90."""
    if dtype == torch.float32:
        side = 32 if head_dim <= 32 else 16  # tiles that give each lane of gfx942 128 bits to load
        return Blocks(side, side, 4, 1) if head_dim <= 64 else Blocks(16, 32, 8, 1)
    if head_dim > 64:
        return Blocks(32, 32, 4, 1)
    return Blocks(64, 64, 4, 1) if architecture in ("sm_90", "sm_100") else Blocks(64, 32, 4, 1)


def _padded(head_dim: int) -> int:
    """Columns of a tile: a matrix unit takes 16 at least."""
    return max(16, triton.next_power_of_2(head_dim))


def resident_blocks(dtype: torch.dtype, head_dim: int, tokens: int, architecture: str) -> Blocks | None:
    """Sizes of the resident backward kernel, None where it would spill registers."""
    if architecture not in ("sm_90", "sm_100") or dtype == torch.float32 or head_dim > 64 or tokens > 256:
        return None
    return Blocks(32, max(32, triton.next_power_of_2(tokens)), 8, 1)


@triton.jit
def _tile(base, rows, columns, stride, T, D: tl.constexpr, INTERPRET: tl.constexpr):
    """Rows of one head's matrix: (rows, columns), zero past the T-th row and the D-th column."""
    mask = (rows[:, None] < T) & (columns[None, :] < D)
    return load(base + rows[:, None] * stride + columns[None, :], mask, INTERPRET)


@triton.jit
def _put(base, x, rows, columns, stride, T, D: tl.constexpr, INTERPRET: tl.constexpr):
    """Store what `_tile` would load."""
    mask = (rows[:, None] < T) & (columns[None, :] < D)
    store(base + rows[:, None] * stride + columns[None, :], x, mask, INTERPRET)


@triton.jit
def _head(index, lse, T, N, D: tl.constexpr, BD: tl.constexpr):
    """Of a head, the index-th of all images: its offsets in qkv and in out, its lse, the width of a token, columns."""
    image, head = (index // N).to(tl.int64), index % N
    width = N * D
    packed = image * T * 3 * width + head * D
    plain = image * T * width + head * D
    return packed, plain, lse + (image * N + head) * T, width, tl.arange(0, BD)


@triton.jit
def _attention_fwd_kernel(
    qkv,  # (B, T, 3, N, D)
    out,  # (B, T, N, D)
    lse,  # (B, N, T) float32
    T,
    N,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    # One axis: the others end at 65535 programs.
    blocks = tl.cdiv(T, BM)
    packed, plain, lse_base, width, columns = _head(tl.program_id(0) // blocks, lse, T, N, D, BD)
    dtype: tl.constexpr = qkv.dtype.element_ty
    q_base = qkv + packed
    rows = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    q = _tile(q_base, rows, columns, 3 * width, T, D, INTERPRET)  # (BM, BD)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    for start in range(0, T, BN):
        keys = start + tl.arange(0, BN)
        k = _tile(q_base + width, keys, columns, 3 * width, T, D, INTERPRET)  # (BN, BD)
        v = _tile(q_base + 2 * width, keys, columns, 3 * width, T, D, INTERPRET)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(keys[None, :] < T, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(rounded(p, dtype, INTERPRET), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    _put(out + plain, acc / total[:, None], rows, columns, width, T, D, INTERPRET)
    tl.store(lse_base + rows, (top + tl.log2(total)) / LOG2E, mask=rows < T)


@triton.jit
def _attention_bwd_kernel(
    dout,  # (B, T, N, D)
    qkv,  # (B, T, 3, N, D)
    out,  # (B, T, N, D)
    lse,  # (B, N, T) float32
    dqkv,  # (B, T, 3, N, D)
    T,
    N,
    scale,
    key_blocks,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    blocks = key_blocks + tl.cdiv(T, BM)
    packed, plain, lse_base, width, columns = _head(tl.program_id(0) // blocks, lse, T, N, D, BD)
    dtype: tl.constexpr = qkv.dtype.element_ty
    block = tl.program_id(0) % blocks
    if block < key_blocks:
        keys = block * BN + tl.arange(0, BN)
        k = _tile(qkv + packed + width, keys, columns, 3 * width, T, D, INTERPRET)  # (BN, BD)
        v = _tile(qkv + packed + 2 * width, keys, columns, 3 * width, T, D, INTERPRET)
        dk = tl.zeros((BN, BD), tl.float32)
        dv = tl.zeros((BN, BD), tl.float32)
        for start in range(0, T, BM):
            rows = start + tl.arange(0, BM)
            q = _tile(qkv + packed, rows, columns, 3 * width, T, D, INTERPRET)  # (BM, BD)
            do = _tile(dout + plain, rows, columns, width, T, D, INTERPRET)
            o = _tile(out + plain, rows, columns, width, T, D, INTERPRET)
            delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
            # A row past the end has q = do = 0: with lse = 0 its p is 1, and all it adds is 0.
            row_lse = tl.load(lse_base + rows, mask=rows < T, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)  # (BN, BM)
            scores = tl.where((keys < T)[:, None], scores, float("-inf"))
            p = tl.exp2(scores - (row_lse * LOG2E)[None, :])
            dv = tl.dot(rounded(p, dtype, INTERPRET), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(rounded(ds, dtype, INTERPRET), q, dk, input_precision="ieee")
        _put(dqkv + packed + width, dk * scale, keys, columns, 3 * width, T, D, INTERPRET)
        _put(dqkv + packed + 2 * width, dv, keys, columns, 3 * width, T, D, INTERPRET)
    else:
        rows = (block - key_blocks) * BM + tl.arange(0, BM)
        q = _tile(qkv + packed, rows, columns, 3 * width, T, D, INTERPRET)
        do = _tile(dout + plain, rows, columns, width, T, D, INTERPRET)
        o = _tile(out + plain, rows, columns, width, T, D, INTERPRET)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        row_lse = tl.load(lse_base + rows, mask=rows < T, other=0.0)
        dq = tl.zeros((BM, BD), tl.float32)
        for start in range(0, T, BN):
            keys = start + tl.arange(0, BN)
            k = _tile(qkv + packed + width, keys, columns, 3 * width, T, D, INTERPRET)
            v = _tile(qkv + packed + 2 * width, keys, columns, 3 * width, T, D, INTERPRET)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # (BM, BN)
            scores = tl.where((keys < T)[None, :], scores, float("-inf"))
            p = tl.exp2(scores - (row_lse * LOG2E)[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            dq = tl.dot(rounded(ds, dtype, INTERPRET), k, dq, input_precision="ieee")
        _put(dqkv + packed, dq * scale, rows, columns, 3 * width, T, D, INTERPRET)


@triton.jit
def _attention_bwd_resident_kernel(
    dout,  # (B, T, N, D)
    qkv,  # (B, T, 3, N, D)
    out,  # (B, T, N, D)
    lse,  # (B, N, T) float32
    dqkv,  # (B, T, 3, N, D)
    T,
    N,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    packed, plain, lse_base, width, columns = _head(tl.program_id(0), lse, T, N, D, BD)
    dtype: tl.constexpr = qkv.dtype.element_ty
    keys = tl.arange(0, BN)
    k = _tile(qkv + packed + width, keys, columns, 3 * width, T, D, INTERPRET)  # (BN, BD)
    v = _tile(qkv + packed + 2 * width, keys, columns, 3 * width, T, D, INTERPRET)
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    for start in range(0, T, BM):
        rows = start + tl.arange(0, BM)
        q = _tile(qkv + packed, rows, columns, 3 * width, T, D, INTERPRET)  # (BM, BD)
        do = _tile(dout + plain, rows, columns, width, T, D, INTERPRET)
        o = _tile(out + plain, rows, columns, width, T, D, INTERPRET)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        row_lse = tl.load(lse_base + rows, mask=rows < T, other=0.0)
        # A key past the end would have p = exp(−lse), which may overflow; a row there has q = do = 0 and adds nothing.
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)  # (BN, BM)
        scores = tl.where((keys < T)[:, None], scores, float("-inf"))
        p = tl.exp2(scores - (row_lse * LOG2E)[None, :])
        dv = tl.dot(rounded(p, dtype, INTERPRET), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = rounded(p * (dp - delta[None, :]), dtype, INTERPRET)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee")  # (BM, BD)
        _put(dqkv + packed, dq * scale, rows, columns, 3 * width, T, D, INTERPRET)
    _put(dqkv + packed + width, dk * scale, keys, columns, 3 * width, T, D, INTERPRET)
    _put(dqkv + packed + 2 * width, dv, keys, columns, 3 * width, T, D, INTERPRET)


def forward(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, packed = qkv.shape
    head_dim = packed // (3 * num_heads)
    out = qkv.new_empty(batch, tokens, packed // 3)
    lse = qkv.new_empty(batch, num_heads, tokens, dtype=torch.float32)
    blocks = forward_blocks(qkv.dtype, head_dim)
    launch(
        _attention_fwd_kernel,
        (triton.cdiv(tokens, blocks.BM) * batch * num_heads,),
        qkv,
        out,
        lse,
        tokens,
        num_heads,
        scale,
        D=head_dim,
        BD=_padded(head_dim),
        **vars(blocks),
    )
    return out, lse


def backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float) -> Tensor:
    batch, tokens, packed = qkv.shape
    head_dim = packed // (3 * num_heads)
    dqkv = torch.empty_like(qkv)
    tensors = dout.contiguous(), qkv, out, lse, dqkv
    sizes = {"D": head_dim, "BD": _padded(head_dim)}
    arch = architecture(qkv.device)
    resident = resident_blocks(qkv.dtype, head_dim, tokens, arch)
    if resident is not None:
        grid = (batch * num_heads,)
        launch(
            _attention_bwd_resident_kernel,
            grid,
            *tensors,
            tokens,
            num_heads,
            scale,
            **sizes,
            **vars(resident),
        )
        return dqkv
    blocks = backward_blocks(qkv.dtype, head_dim, arch)
    key_blocks = triton.cdiv(tokens, blocks.BN)
    grid = ((key_blocks + triton.cdiv(tokens, blocks.BM)) * batch * num_heads,)
    arguments = *tensors, tokens, num_heads, scale, key_blocks
    launch(_attention_bwd_kernel, grid, *arguments, **sizes, **vars(blocks))
    return dqkv
