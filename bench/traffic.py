"""Bytes that each op moves for an image, forward and backward, beside PyTorch eager, inductor and the least possible.

`python -m bench.traffic [--quick] [--json F]` exits with 1 if a target is missed. No GPU is used and no time is taken.

All figures are at a batch of 128. Ours: the loads and stores that Triton's interpreter runs on a small batch, launched
as on an H100, and the aten kernels around them; then the same launches at the sizes that their launchers give them for
128 images (see `bench.interpreted`). Requested bytes and FLOPs per image are those of the small batch. Eager and
inductor are counted at 128 images.

Distinct bytes count once per kernel that reads them and once per kernel that writes them: what must cross DRAM. That
flatters eager, whose kernels count their inputs once also where they read them twice.
Requested bytes are those of every lane of ours: what the caches must serve. Saved bytes are those of distinct storages
kept for backward, parameters and buffers excluded.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

from bench import parts
from bench.counting import Count, Kernel, eager_counts, per_image
from bench.inductor import inductor_counts
from bench.interpreted import triton_counts
from fastvitc.kernels import availability
from fastvitc.models.config import ViTConfig, preset

ARCHITECTURE = "sm_90"
BATCH = 128


@dataclass(frozen=True)
class Op:
    """What is counted, for which models, and the batch that the interpreter runs."""

    part: Callable[[ViTConfig], parts.Part]
    models: tuple[str, ...]
    interpreted: int


OPS = {
    "attention": Op(parts.attention_part, ("vitc_1gf", "vitc_4gf", "vitc_18gf", "vitc_36gf"), 1),
    "bn_relu": Op(parts.bn_relu_part, ("vitc_1gf", "vitc_4gf", "vitc_18gf"), 2),
    "conv_stem": Op(parts.stem_part, ("vitc_1gf", "vitc_4gf"), 1),
}


@dataclass(frozen=True)
class Target:
    """The largest ratio of ours to another's bytes, forward and backward together; None where it is only reported."""

    figure: str  # "distinct" or "saved"
    to: str
    ratio: float | None


TARGETS = {
    "attention": (Target("distinct", "least", 1.1),),
    "bn_relu": (Target("distinct", "inductor", None),),
    "conv_stem": (Target("distinct", "inductor", 0.55), Target("saved", "eager", 0.5)),
}


@dataclass(frozen=True)
class Row:
    """One contender of one op, per image at a batch of 128: forward, backward, both, or what is saved.

    `interpreted` is the batch that the interpreter ran. `ratio` is that of ours to `to`.
    """

    op: str
    model: str
    what: str
    direction: str
    distinct_bytes_per_image: float | None
    requested_bytes_per_image: float | None
    saved_bytes_per_image: float | None
    interpreted: int | None = None
    ratio: float | None = None
    to: str | None = None
    target: float | None = None
    ok: bool | None = None
    kernels: list[Kernel] = field(default_factory=list)


def _directions(forward: Count, backward: Count) -> dict[str, Count]:
    both = Count(forward.kernels + backward.kernels, forward.saved)
    return {"forward": forward, "backward": backward, "both": both}


def _ours(part: parts.Part, size: int) -> dict[str, dict]:
    """Direction → the fields of ours."""
    counts = _directions(*triton_counts(part.ours, ARCHITECTURE, size, BATCH))
    return {direction: _fields(count) | {"interpreted": size} for direction, count in counts.items()}


def _peer(part: parts.Part, counter: Callable[..., tuple[Count, Count]]) -> dict[str, dict]:
    counts = _directions(*counter(*part.peer(BATCH)))
    return {
        direction: _fields(count) | {"requested_bytes_per_image": None} for direction, count in counts.items()
    }


def _least(part: parts.Part) -> dict[str, dict]:
    counts = _directions(*(Count([Kernel("least", moved * BATCH)]) for moved in part.least))
    return {
        direction: _fields(count) | {"saved_bytes_per_image": None} for direction, count in counts.items()
    }


def _fields(count: Count) -> dict:
    count = per_image(count, BATCH)
    return {
        "distinct_bytes_per_image": count.distinct,
        "requested_bytes_per_image": count.requested,
        "saved_bytes_per_image": count.saved,
        "kernels": count.kernels,
    }


def _judged(op: str, model: str, contenders: dict[str, dict[str, dict]]) -> Iterator[Row]:
    """The rows of one op and model; those of ours that a target is about carry their ratio."""
    for what, directions in contenders.items():
        for direction, fields in directions.items():
            verdict = {}
            for target in TARGETS[op]:
                if (what, direction, target.figure) == ("ours", "both", "distinct"):
                    verdict = _verdict(target, contenders)
            yield Row(op, model, what, direction, **fields, **verdict)
    for target in TARGETS[op]:
        if target.figure == "saved" and "ours" in contenders:
            saved = contenders["ours"]["both"]["saved_bytes_per_image"]
            yield Row(op, model, "ours", "saved", None, None, saved, **_verdict(target, contenders))


def _verdict(target: Target, contenders: dict[str, dict[str, dict]]) -> dict:
    ours, other = (contenders[w]["both"][f"{target.figure}_bytes_per_image"] for w in ("ours", target.to))
    ok = None if target.ratio is None else ours <= target.ratio * other
    return {"ratio": ours / other, "to": target.to, "target": target.ratio, "ok": ok}


def rows(quick: bool) -> Iterator[Row]:
    """All rows, op by op; those of ours only where the op has a Triton backend."""
    for name, op in OPS.items():
        for model in op.models[:1] if quick else op.models:
            part = op.part(preset(model))
            contenders = {
                "least": _least(part),
                "inductor": _peer(part, inductor_counts),
                "eager": _peer(part, eager_counts),
            }
            if availability()[name].get("triton", "missing") is None:
                contenders["ours"] = _ours(part, op.interpreted)
            yield from _judged(name, model, contenders)


def _line(row: Row) -> str:
    figures = (row.distinct_bytes_per_image, row.requested_bytes_per_image, row.saved_bytes_per_image)
    cells = "".join("-".rjust(14) if f is None else f"{f / 1e6:14.4f}" for f in figures)
    line = f"{row.op:<10} {row.model:<10} {row.what:<9} {row.direction:<9}{cells}"
    if row.ratio is not None:
        line += f"  {row.ratio:.3f}x {row.to}"
    if row.ok is not None:
        line += f", target {row.target}x" + ("" if row.ok else "  MISSED")
    return line


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 1GF model alone")
    parser.add_argument("--json", type=Path, help="also write the rows and their kernels here")
    options = parser.parse_args(args)
    print(f"MB per image, bf16, training, at a batch of {BATCH}; counted, not measured on a GPU")
    print(
        f"{'op':<10} {'model':<10} {'what':<9} {'direction':<9}{'distinct':>14}{'requested':>14}{'saved':>14}"
    )
    found = []
    for row in rows(options.quick):
        found.append(row)
        print(_line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    missed = sum(row.ok is False for row in found)
    print(f"{sum(row.ok is not None for row in found)} targets, {missed} missed")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
