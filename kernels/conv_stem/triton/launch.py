"""One convolution of the stem on the GPU: what launches its kernels."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvitc.kernels.conv_stem.arguments import output_size
from fastvitc.kernels.conv_stem.triton.kernels import (
    _conv_bwd_input_kernel,
    _conv_bwd_weight_kernel,
    _conv_fwd_kernel,
    _tokens_fwd_kernel,
)
from fastvitc.kernels.conv_stem.triton.tiles import (
    forward_tiles,
    input_gradient_tiles,
    part_of_rows,
    runs_on,
    weight_gradient_tiles,
)
from fastvitc.kernels.gpu.triton import launch

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Input(NamedTuple):
    """What a convolution reads: relu(scale·mixed(x) + shift), or less of that. x is dense in NHWC order."""

    x: Tensor
    scale_shift: Tensor | None = None  # (2, C) float32
    relu: bool = False
    mix: Tensor | None = None  # (5,) float32: x is mixed with itself rolled by one image, see `Pixels`


class Gradient(NamedTuple):
    """The gradient of a convolution's output: dy, or A·dy' + B·z + C with `coefficients` (3, N) float32.

    dy is (B, first + OH·OW, N); the first rows of an image are no outputs of the convolution.
    """

    dy: Tensor
    z: Tensor | None = None
    coefficients: Tensor | None = None
    first: int = 0


class Convolution:
    """A convolution of a (B, C, H, W) input with a weight (N, C, KH, KW): what launches its kernels."""

    def __init__(self, input_shape: Sequence[int], weight: Tensor, stride: int, padding: int) -> None:
        self._batch, channels, height, width = input_shape
        kernel = weight.shape[2:]
        self._grid = output_size((height, width), weight, stride, padding)
        self._weight = weight.contiguous(memory_format=torch.channels_last)
        self._sizes = {
            "S": stride,
            "P": padding,
            "H": height,
            "W": width,
            "C": channels,
            "N": weight.shape[0],
            "KH": kernel[0],
            "KW": kernel[1],
        }

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self._weight.dtype, device=self._weight.device)

    def _output(self) -> Tensor:
        """Uninitialised (B, N, OH, OW), channels-last."""
        return self._new(self._batch, *self._grid, self._sizes["N"]).permute(0, 3, 1, 2)

    @property
    def _outputs(self) -> int:
        return self._batch * prod(self._grid)

    def _k_steps(self, block: int, run_on: bool) -> dict[str, int | bool]:
        """How a kernel walks along K."""
        channels, area = self._sizes["C"], self._sizes["KH"] * self._sizes["KW"]
        steps = triton.cdiv(area * channels, block) if run_on else area * triton.cdiv(channels, block)
        return {"RUN_ON": run_on, "STEPS": steps}

    def _run_forward(
        self, source: Input, bias: Tensor | None, statistics: bool
    ) -> tuple[Tensor, Tensor | None, int]:
        channels, outputs = self._sizes["N"], self._outputs
        tiles = forward_tiles(self._weight.dtype, channels)
        sets = triton.cdiv(outputs, tiles.BM)
        out = self._output()
        partial = self._new(2, sets, channels, dtype=torch.float32) if statistics else None
        launch(
            _conv_fwd_kernel,
            (sets * triton.cdiv(channels, tiles.BN),),
            source.x,
            source.scale_shift,
            source.mix,
            self._weight,
            bias,
            out,
            partial,
            outputs,
            **self._sizes,
            **self._k_steps(tiles.BK, runs_on(self._sizes["C"])),
            **tiles._asdict(),
            RELU=source.relu,
        )
        return out, partial, tiles.BM

    def forward(self, source: Input) -> tuple[Tensor, Tensor, int]:
        """(z, the (2, sets, N) partial means and M2 of z, how many values of a channel a set is of)."""
        z, partial, per_set = self._run_forward(source, None, statistics=True)
        assert partial is not None
        return z, partial, per_set

    def forward_raw(self, source: Input) -> Tensor:
        """z, where its statistics are not asked for."""
        return self._run_forward(source, None, statistics=False)[0]

    def forward_relu(self, source: Input, bias: Tensor) -> Tensor:
        """relu(convolution + bias)."""
        return self._run_forward(source, bias, statistics=False)[0]

    def tokens(
        self,
        source: Input,
        bias: Tensor,
        class_token: Tensor | None,
        pos_embed: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """(B, S, N) in `dtype`: class token first, then convolution + bias row by row, positions added."""
        first, channels = int(class_token is not None), self._sizes["N"]
        tiles = forward_tiles(self._weight.dtype, channels)
        out = self._new(self._batch, first + prod(self._grid), channels, dtype=dtype)
        rows = out.shape[0] * out.shape[1]
        launch(
            _tokens_fwd_kernel,
            (triton.cdiv(rows, tiles.BM) * triton.cdiv(channels, tiles.BN),),
            source.x,
            source.scale_shift,
            source.mix,
            self._weight,
            bias,
            class_token,
            pos_embed,
            out,
            rows,
            **self._sizes,
            **self._k_steps(tiles.BK, runs_on(self._sizes["C"])),
            **tiles._asdict(),
            FIRST=first,
            RELU=source.relu,
        )
        return out

    @property
    def disjoint(self) -> bool:
        """Whether the kernel's places cover the input without overlap, so that each input belongs to one output."""
        sizes = self._sizes
        tiled = sizes["H"] % sizes["S"] == sizes["W"] % sizes["S"] == 0
        return sizes["KH"] == sizes["KW"] == sizes["S"] and sizes["P"] == 0 and tiled

    def input_gradient(
        self, gradient: Gradient, x: Tensor, vectors: Tensor | None, *, sum_images: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(the gradient of the input, in the shape of x; partial sums; sums over the images).

        With the `vectors` (4, C) of the layer below, whose output is x, the gradient is dy' = dy·[scale·x + shift > 0],
        and beside it come the (2, sets, C) partial sums of dy' and dy'·(x − mean). With `sum_images`, where
        `disjoint`, also the sum of dy over the batch, (1, OH·OW, N) float32, from the same pass.
        """
        sizes = self._sizes
        channels, stride = sizes["C"], sizes["S"]
        tiles = input_gradient_tiles(self._weight.dtype, channels)
        images = self._batch
        sums = None
        if sum_images:
            tiles = tiles._replace(BM=min(tiles.BM, max(16, triton.next_power_of_2(images))))
            images = triton.cdiv(images, tiles.BM) * tiles.BM
            sums = self._new(images // tiles.BM, prod(self._grid), sizes["N"], dtype=torch.float32)
        # Every class of pixels gets the tiles of the largest.
        rows = images * triton.cdiv(sizes["H"], stride) * triton.cdiv(sizes["W"], stride)
        sets = triton.cdiv(rows, tiles.BM) * stride**2
        dx = self._new(self._batch, sizes["H"], sizes["W"], channels).permute(0, 3, 1, 2)
        partial = None if vectors is None else self._new(2, sets, channels, dtype=torch.float32)
        launch(
            _conv_bwd_input_kernel,
            (sets * triton.cdiv(channels, tiles.BN),),
            gradient.dy,
            gradient.z,
            gradient.coefficients,
            self._weight,
            x if vectors is not None else None,
            vectors,
            dx,
            partial,
            sums,
            self._batch,
            images,
            **sizes,
            **tiles._asdict(),
            FIRST=gradient.first,
        )
        if sums is not None and len(sums) > 1:
            sums = sums.sum(0, keepdim=True)
        return dx, partial, sums

    def weight_gradient(self, source: Input, gradient: Gradient) -> Tensor:
        """(N, C, KH, KW) float32, channels-last."""
        sizes, outputs = self._sizes, self._outputs
        k, channels = sizes["KH"] * sizes["KW"] * sizes["C"], sizes["N"]
        tiles = weight_gradient_tiles(self._weight.dtype, k, channels)
        walk = self._k_steps(tiles.BK, run_on=True)
        blocks = walk["STEPS"] * triton.cdiv(channels, tiles.BN)
        part = part_of_rows(outputs, blocks, tiles.BM)
        parts = triton.cdiv(outputs, part)
        partial = self._new(parts, channels, k, dtype=torch.float32)
        launch(
            _conv_bwd_weight_kernel,
            (blocks * parts,),
            source.x,
            source.scale_shift,
            source.mix,
            gradient.dy,
            gradient.z,
            gradient.coefficients,
            partial,
            outputs,
            part,
            **sizes,
            **walk,
            **tiles._asdict(),
            FIRST=gradient.first,
            RELU=source.relu,
            dtype=_TRITON_DTYPES[self._weight.dtype],
        )
        total = partial[0] if parts == 1 else partial.sum(0)
        return total.view(channels, sizes["KH"], sizes["KW"], sizes["C"]).permute(0, 3, 1, 2)
