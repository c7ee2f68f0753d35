"""Registers, shared memory and instructions of every Triton kernel, compiled for GPUs that are not there.

`python -m bench.resources [--arch sm_90 ...] [--quick] [--json F]` prints a row for each kernel, configuration and
architecture at the widths of the paper's models, and exits with 1 if one of them spills, uses more shared memory than a
program may, lacks tensor-core instructions where it multiplies matrices in 16 bits, or loads its streams in less than
128 bits (pixels have too few channels for that). What it says is read from the compiled code; no GPU is used.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.aot import LIMITS, Kernel, compiled
from fastvitc.kernels import Pixels
from fastvitc.kernels.attention import triton as attention
from fastvitc.kernels.bn_relu import triton as bn_relu
from fastvitc.kernels.bn_relu.arguments import Norm
from fastvitc.kernels.conv_stem.arguments import Stem
from fastvitc.kernels.conv_stem.triton import stem as conv_stem
from fastvitc.models.config import ViTConfig, preset
from fastvitc.models.stems import ConvStem

MODELS = ("vitc_1gf", "vitc_4gf", "vitc_18gf", "vitc_36gf")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_BATCH = 128


def _attention(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    qkv = torch.empty(_BATCH, tokens, 3 * heads * head_dim, dtype=dtype, device="meta")
    out, lse = attention.forward(qkv, heads, head_dim**-0.5)
    attention.backward(torch.empty_like(out), qkv, out, lse, heads, head_dim**-0.5)


def _bn_relu(channels: int, side: int, dtype: torch.dtype) -> None:
    x = torch.empty(_BATCH, side, side, channels, dtype=dtype, device="meta").permute(0, 3, 1, 2)
    norm = Norm(*(torch.empty(channels, device="meta") for _ in range(4)), True, 1e-5, "")
    y, vectors = bn_relu.forward(x, norm)
    bn_relu.backward(torch.empty_like(y), x, vectors, True, 1e-5, "")


def _conv_stem(config: ViTConfig, dtype: torch.dtype, batch: int = _BATCH, mixed: bool = True) -> None:
    """The stem of a model: forward and backward in training, and evaluation.

    From a uint8 image that is mixed, or else from a normalised one with a gradient and with frozen statistics.
    """
    with torch.device("meta"):
        module = ConvStem(config.stem, config.in_chans).to(memory_format=torch.channels_last)
        shape = batch, *config.image_size, config.in_chans
        image = torch.empty(shape, dtype=torch.uint8 if mixed else dtype).permute(0, 3, 1, 2)
        ends = torch.empty(1, 1, config.width), torch.empty(1, config.tokens, config.width)
        dtokens = torch.empty(batch, config.tokens, config.width, dtype=torch.float32)
        pixels = module.pixels(image, torch.empty(5)) if mixed else Pixels()
    stem = Stem(module.layers(), pixels, mixed, 1e-5, "")
    narrow = stem.computing_in(dtype)
    _, zs, of_layers = conv_stem.forward(image, narrow, *ends)
    conv_stem.backward(dtokens, image, narrow, zs, of_layers, True, not mixed)
    plain = stem._replace(pixels=stem.pixels._replace(mix=None))
    conv_stem.infer(image, plain, *ends, dtype)


def _layers(config: ViTConfig) -> Iterator[tuple[int, int]]:
    """(channels, side of the square output) of each 3x3 convolution."""
    side = config.image_size[0]
    for channels, stride in zip(config.stem.channels[:-1], config.stem.strides, strict=False):
        side //= stride
        yield channels, side


def calls(quick: bool) -> dict[str, Callable[[], None]]:
    """Label → a call that launches an op's kernels forward and backward."""
    found: dict[str, Callable[[], None]] = {}
    dtypes = {"bf16": torch.bfloat16} if quick else _DTYPES
    for name, dtype in dtypes.items():
        # 197 tokens divide by nothing; for 256 the compiler drops masks and may need other registers.
        for tokens, head_dim in [(197, 64)] if quick else product((50, 197, 256, 577), (32, 64, 80, 96, 128)):
            label = f"attention, {tokens} tokens, heads of {head_dim}, {name}"
            found[label] = lambda n=tokens, d=head_dim, t=dtype: _attention(n, 6, d, t)
        shapes = {shape for model in MODELS for shape in _layers(preset(model))}
        for channels, side in sorted(shapes)[:1] if quick else sorted(shapes):
            label = f"bn_relu, {channels} channels of {side}x{side}, {name}"
            found[label] = lambda c=channels, s=side, t=dtype: _bn_relu(c, s, t)
        for model in MODELS[:1] if quick else MODELS:
            found[f"conv_stem, {model}, {name}"] = lambda m=model, t=dtype: _conv_stem(preset(m), t)
        for batch in () if quick else (16, 32, 64):
            label = f"conv_stem, vitc_4gf, batch {batch}, frozen, from a normalised image, {name}"
            found[label] = lambda n=batch, t=dtype: _conv_stem(preset("vitc_4gf"), t, n, mixed=False)
    return found


def faults(label: str, kernel: Kernel) -> list[str]:
    """Why a kernel must not ship; empty when it may."""
    found = kernel.faults()
    if kernel.multiplies and not label.endswith("fp32") and not kernel.tensor_core_instructions:
        found.append("no tensor-core instructions")
    if kernel.streams and kernel.load_bits < 128:
        found.append(f"loads of {kernel.load_bits} bits")
    return found


def _compile(arch: str, label: str) -> list[Kernel]:
    return list(compiled(arch, calls(quick=False)[label]))


def _line(label: str, kernel: Kernel) -> str:
    cells = (
        kernel.arch,
        kernel.num_warps,
        kernel.registers,
        kernel.spills,
        kernel.shared,
        kernel.resident_warps,
        f"{kernel.tensor_core_instructions} {kernel.tensor_core}".strip(),
        kernel.load_bits,
    )
    return f"{kernel.kernel:<28}" + "".join(f"{cell:>14}" for cell in cells) + f"  {label}"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--quick", action="store_true", help="one shape of each op, bf16")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(args)
    rows, failed = [], 0
    header = ("arch", "warps", "regs", "spill", "shared", "resident", "tensor cores", "load")
    print(f"{'kernel':<28}" + "".join(f"{word:>14}" for word in header))
    jobs = [(arch, label) for arch in options.arch for label in calls(options.quick)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for (_, label), kernels in zip(jobs, pool.map(_compile, *zip(*jobs, strict=True)), strict=True):
            for kernel in kernels:
                wrong = faults(label, kernel)
                failed += bool(wrong)
                rows.append({"configuration": label, **asdict(kernel), "faults": wrong})
                print(_line(label, kernel), flush=True)
                if wrong:
                    print(f"  FAULT: {'; '.join(wrong)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} kernels compiled, {failed} at fault")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
