"""Predicted times on GPUs that are not there, from counted bytes and FLOPs.

`python -m bench.roofline [--traffic F] [--json F]`; F is the JSON of `bench.traffic`, which is run in full without it.

Every time is predicted, none was measured on a GPU: a kernel takes max(bytes / bandwidth, FLOPs / peak), a row the sum
of its kernels. That is a lower bound: no launch latency, memory and tensor cores overlapped without loss and at their
data-sheet peaks. FLOPs are those of convolutions, matrix products and attention; ours count what the dot products
issue, padding and recomputation included, library calls what their formulas ask for.

A training step is stem, encoder blocks, head with loss and an AdamW update that reads four and writes three float32
values per parameter. Linear layers are the same library calls for all. Eager and inductor take every kernel of timm's
block; ours those of inductor on our block but for the attention op, and the stem as counted.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

from bench import parts, traffic
from bench.counting import Kernel, eager_counts, per_image
from bench.inductor import inductor_counts
from fastvitc.models.complexity import complexity
from fastvitc.models.config import preset


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 floating-point operations and bytes per second, and the data sheet that says so."""

    name: str
    flops: float
    bandwidth: float
    source: str


GPUS = (
    Gpu("A100", 312e12, 2.039e12, "NVIDIA A100 data sheet, 80GB SXM"),
    Gpu("H100", 989e12, 3.35e12, "NVIDIA H100 data sheet, SXM"),
    Gpu("B200", 2250e12, 8e12, "NVIDIA HGX and DGX B200 data sheets"),
)


@dataclass(frozen=True)
class Row:
    """Time of an op or of a part of the training step, for one image. `binds` is the term that takes most of it."""

    gpu: str
    model: str
    part: str
    what: str
    seconds_per_image: float
    bytes_per_image: float
    flops_per_image: float
    binds: str
    label: str = "predicted"


def predict(gpu: Gpu, kernels: Iterable[Kernel]) -> tuple[float, str]:
    """(seconds, "memory" or "tensor cores", whichever binds the kernels that take most of them)."""
    bound = {"memory": 0.0, "tensor cores": 0.0}
    for kernel in kernels:
        memory, cores = kernel.distinct / gpu.bandwidth, kernel.flops / gpu.flops
        bound["memory" if memory >= cores else "tensor cores"] += max(memory, cores)
    return sum(bound.values()), max(bound, key=bound.__getitem__)


def _row(gpu: Gpu, model: str, part: str, what: str, kernels: list[Kernel]) -> Row:
    seconds, binds = predict(gpu, kernels)
    moved, flops = sum(k.distinct for k in kernels), sum(k.flops for k in kernels)
    return Row(gpu.name, model, part, what, seconds, moved, flops, binds)


Counted = dict[tuple[str, str, str, str], list[Kernel]]  # by op, model, what and direction


def read(rows: Iterable[dict]) -> Counted:
    """The kernels of the rows of `bench.traffic`'s JSON."""
    return {
        (row["op"], row["model"], row["what"], row["direction"]): [
            Kernel(**kernel) for kernel in row["kernels"]
        ]
        for row in rows
    }


def _op_rows(counted: Counted) -> Iterator[Row]:
    for (op, model, what, direction), kernels in counted.items():
        if kernels and what != "least":
            for gpu in GPUS:
                yield _row(gpu, model, f"{op} {direction}", what, kernels)


def _per_image(counts: tuple) -> list[Kernel]:
    return [kernel for count in counts for kernel in per_image(count, traffic.BATCH).kernels]


def _step(model: str, what: str, counted: Counted) -> dict[str, list[Kernel]]:
    """Part of the training step → its kernels, per image at a batch of 128."""
    config = preset(model)
    count = eager_counts if what == "eager" else inductor_counts
    block = _per_image(count(*parts.block(config, ours=what == "ours")(traffic.BATCH)))
    attention = [k for k in block if "scaled_dot_product" in k.name or "fastvitc.attention" in k.name]
    rest = [k for k in block if k not in attention]
    if what == "ours":
        attention = counted["attention", model, "ours", "both"]
    return {
        "stem": counted["conv_stem", model, what, "both"],
        "attention": attention * config.depth,
        "rest of the encoder": rest * config.depth,
        "head and loss": _per_image(count(*parts.head(config)(traffic.BATCH))),
        "optimizer": [Kernel("AdamW", 28 * complexity(config).params / traffic.BATCH)],
    }


def _step_rows(counted: Counted) -> Iterator[Row]:
    """Steps of the models whose stem was counted; ours only where its stem and attention were."""
    for op, model, what, direction in list(counted):
        if (op, direction) != ("conv_stem", "both") or what == "least":
            continue
        kernels = _step(model, what, counted)
        whole = [kernel for part in kernels.values() for kernel in part]
        for gpu in GPUS:
            for part, own in kernels.items():
                yield _row(gpu, model, f"step: {part}", what, own)
            yield _row(gpu, model, "training step", what, whole)


def _line(row: Row) -> str:
    time = f"{1e3 * traffic.BATCH * row.seconds_per_image:10.3f} ms"
    size = f"{row.bytes_per_image / 1e6:10.3f} MB {row.flops_per_image / 1e9:9.3f} GFLOP"
    return f"{row.gpu:<5} {row.model:<10} {row.part:<25} {row.what:<9}{time} {size}  {row.binds}, {row.label}"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--traffic", type=Path, help="the JSON of bench.traffic")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(args)
    rows = (
        json.loads(options.traffic.read_text())
        if options.traffic
        else [asdict(row) for row in traffic.rows(quick=False)]
    )
    counted = read(rows)
    print(
        f"Predicted, not measured on a GPU: lower bounds for a batch of {traffic.BATCH}, bytes and FLOPs per image"
    )
    for gpu in GPUS:
        print(f"{gpu.name}: {gpu.flops / 1e12:g} TFLOP/s, {gpu.bandwidth / 1e12:g} TB/s ({gpu.source})")
    found = []
    for row in (*_op_rows(counted), *_step_rows(counted)):
        found.append(row)
        print(_line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
