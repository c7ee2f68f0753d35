"""Time to accuracy: `python -m bench.race --data DIR --out DIR`, on a machine that does nothing else.

`fastvitc-train` and timm's parts train equal models on the same images with the same cores. Each run is a program of
its own from a cold start, compilation included, validated after each epoch; seeds alternate between the racers. The
figures are the time to the accuracy that the peer has at its end, and the accuracy when the peer ends. Ours runs once
for each of `--ours-epochs`: few for the first figure, as many as fit into the peer's time for the second. Flags after
`--` go to `fastvitc-train`. Runs that are in `--out` already are not made again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.race.curves import Curve, Point, draw, results, table, write_csv
from bench.report import machine_line
from fastvitc.errors import FastvitcError
from fastvitc.files import write_atomically
from fastvitc.programs.command import run_command
from fastvitc.training.process import pick_device
from fastvitc.tuning.machine import describe, fast_precision, versions

OURS, PEER = "fastvitc-train", "timm"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.race", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train/<class>/* and val/<class>/*"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for curves.csv, race.png, race.md and the runs"
    )
    parser.add_argument("--model", default="vitc_1gf", help="a preset")
    parser.add_argument("--image-size", type=int, default=96, help="side in pixels, of both racers")
    parser.add_argument("--epochs", type=int, default=15, help="of the peer")
    parser.add_argument(
        "--ours-epochs", type=int, nargs="+", default=[8, 18], help="of fastvitc-train, each a racer"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hflip", type=float, default=0.5, help="of both; 0 for letters")
    parser.add_argument("--recipe", default="fast", help="of fastvitc-train")
    parser.add_argument("--timm", default="", help="further flags of the peer, see bench.race.peer")
    parser.add_argument("ours", nargs="*", help="after --: further flags of fastvitc-train")
    return parser.parse_args(argv)


def racers(args: argparse.Namespace) -> dict[str, int | None]:
    """{racer: its epochs where it is ours, else None}."""
    return {PEER: None, **{f"{OURS}, {epochs} epochs": epochs for epochs in args.ours_epochs}}


def command_of(args: argparse.Namespace, epochs: int | None, folder: Path, seed: int) -> list[str]:
    """The command of a racer, see `racers`."""
    shared = ["--data-dir", args.data, "--model", args.model, "--image-size", args.image_size, "--seed", seed]
    shared += ["--hflip", args.hflip]
    if epochs is not None:
        ours = [*shared, "--epochs", epochs, "--recipe", args.recipe, "--output", folder, *args.ours]
        return [sys.executable, "-m", "fastvitc.programs.train", *map(str, ours)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    peer = [*shared, "--epochs", args.epochs, "--workers", cores, *args.timm.split()]
    if fast_precision() == "fp32":
        peer.append("--fp32")
    return [sys.executable, "-m", "bench.race.peer", *map(str, peer)]


def run(name: str, command: list[str], folder: Path) -> list[Point]:
    """The curve of a run; its output goes to log.txt.

    Raises:
        FastvitcError: it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cold:  # compiled code of an earlier run would make a start warm
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cold, "TRITON_CACHE_DIR": f"{cold}/triton"}
        start = time.time()
        with (folder / "log.txt").open("w") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        raise FastvitcError(f"{name} ended with {done.returncode}; {folder / 'log.txt'} says why")
    lines = (folder / ("log.txt" if name == PEER else "log.jsonl")).read_text().splitlines()
    epochs = [json.loads(line) for line in lines if line.startswith("{") and '"val_top1"' in line]
    return [Point(epoch["time"] - start, epoch["val_top1"]) for epoch in epochs]


def race(args: argparse.Namespace) -> dict[str, list[Curve]]:
    """{racer: the curve of each seed}; a curve that is there is read, not run."""
    names = racers(args)
    curves: dict[str, list[Curve]] = {name: [] for name in names}
    for seed in range(args.seeds):
        for name in names if seed % 2 == 0 else reversed(names):
            folder = args.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            kept = folder / "curve.json"
            if not kept.exists():
                curve = run(name, command_of(args, names[name], folder, seed), folder)
                points = json.dumps([[point.seconds, point.top1] for point in curve])
                write_atomically(kept, lambda path, text=points: path.write_text(text))
            curves[name].append([Point(*point) for point in json.loads(kept.read_text())])
            last = curves[name][-1][-1]
            print(f"{name}, seed {seed}: {last.top1:.2f}% after {last.seconds:.0f} s", flush=True)
    return curves


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    device = pick_device("auto")
    title = f"{args.model} at {args.image_size} pixels on {args.data.name}"
    machine = machine_line(describe(device), versions())
    heading = f"{machine}\n{title}, {torch.get_num_threads()} threads, {fast_precision()}"
    print(heading, flush=True)
    curves = race(args)
    text = table(results(curves, PEER), PEER, args.seeds)
    write_csv(curves, args.out / "curves.csv")
    draw(curves, PEER, title, args.out / "race.png")
    write_atomically(args.out / "race.md", lambda path: path.write_text(f"{heading}\n\n{text}\n"))
    print(f"\n{text}")


if __name__ == "__main__":
    run_command("python -m bench.race", main)
