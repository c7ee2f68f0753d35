"""`fastvitc-train`: trains a model on a folder of images, or on handwritten digits when given nothing."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
import yaml
from torch.distributed.elastic.multiprocessing.errors import record

from fastvitc.data import ImageIndex, digits_folder, index_folder, synthetic_index
from fastvitc.errors import FastvitcError, UsageError
from fastvitc.files import write_atomically
from fastvitc.kernels import BackendUnavailable, chosen
from fastvitc.models.config import preset
from fastvitc.programs.command import parse, run_command
from fastvitc.training.process import Process, process_group
from fastvitc.training.recipes import recipe_settings
from fastvitc.training.run import start
from fastvitc.training.settings import Recipe, TrainSettings
from fastvitc.training.state import STATE, load_state, state_file
from fastvitc.tuning.machine import PRECISIONS, describe
from fastvitc.tuning.measure import Setting
from fastvitc.tuning.tune import measures_at_start, table, tune, unmeasured

PROGRAM = "fastvitc-train"


def read_settings(args: Sequence[str]) -> TrainSettings:
    """The command line over the recipe's settings, or over the resumed run's."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--data-dir", "--model", "--recipe", "--resume"):
        early.add_argument(flag)
    early.add_argument("--grad-accum-steps", type=int, default=1)
    try:
        known, _ = early.parse_known_args([_with_hyphens(arg) for arg in args])
    except argparse.ArgumentError:
        return parse(TrainSettings, PROGRAM, args)  # says what is wrong and exits
    if known.resume is not None:
        saved = TrainSettings.from_dict(load_state(Path(known.resume))["settings"])
        saved = replace(saved, resume=known.resume, output=None)
        return parse(TrainSettings, PROGRAM, args, saved).continuing(saved)
    recipe = known.recipe or ("digits" if known.data_dir is None else "small")
    if recipe not in get_args(Recipe):
        return parse(TrainSettings, PROGRAM, args)  # prints the choices and exits
    shares = int(os.environ.get("WORLD_SIZE", "1")) * max(known.grad_accum_steps, 1)
    return parse(TrainSettings, PROGRAM, args, recipe_settings(recipe, known.model, shares))


def _with_hyphens(arg: str) -> str:
    """--data_dir=some_folder, which the parser takes as well, as --data-dir=some_folder."""
    flag, equals, value = arg.partition("=")
    return (flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value


def find_images(settings: TrainSettings) -> tuple[ImageIndex, ImageIndex]:
    """The training and validation images that the settings name."""
    if settings.data_dir is not None:
        return index_folder(settings.data_dir)
    if settings.loader == "synthetic":
        return synthetic_index("train"), synthetic_index("val")
    return index_folder(digits_folder())


def output_folder(settings: TrainSettings) -> Path:
    """The run's folder, made and known to be writable; it holds no other run."""
    if settings.resume is not None:
        if settings.output is not None:
            raise UsageError(
                "a resumed run goes on in its own folder; leave out --output, or copy the folder first"
            )
        folder = state_file(Path(settings.resume)).parent.parent
    else:
        default = Path("runs", f"{settings.model}-{time.strftime('%Y%m%d-%H%M%S')}")
        folder = default if settings.output is None else Path(settings.output)
        if (folder / "last" / STATE).exists():
            raise UsageError(
                f"{folder} already holds a run; choose another --output, or continue it with --resume {folder}"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FastvitcError(
            f"cannot write to the output folder {folder} ({error.strerror}); choose another --output"
        ) from error
    return folder


def with_backends(settings: TrainSettings, process: Process) -> TrainSettings:
    """The settings with a backend named for every op, equal on all processes.

    What auto takes is measured first where there is no measurement and `measures_at_start` says so.

    Raises:
        BackendUnavailable, UsageError: a backend that was asked for, or that the resumed run had, cannot run here.
    """
    dtype = PRECISIONS[settings.precision]
    try:
        chosen(process.device, settings.backend, dtype)
    except BackendUnavailable as error:
        if settings.resume is None:
            raise
        raise UsageError(
            f"{error}. To go on with other backends than the run's, pass --backend auto"
        ) from error

    def choose() -> dict[str, str]:
        if measures_at_start(process.device) and unmeasured(process.device, dtype, settings.backend):
            _measure(settings, process.device)
        return chosen(process.device, settings.backend, dtype)

    picked = process.share(process.agree(choose))
    return replace(settings, backend=",".join(f"{op}={name}" for op, name in picked.items()))


def _measure(settings: TrainSettings, device: torch.device) -> None:
    """Measure the ops on the run's own shapes; a failure is a line in the log, and the fixed order holds."""
    config, size = preset(settings.model), settings.size()
    config = replace(config, pool=settings.pool, image_size=size or config.image_size)
    print(
        f"measuring the backends of the ops on {describe(device)}, once for this device and these versions; "
        "fastvitc-tune measures again",
        flush=True,
    )
    dtype = PRECISIONS[settings.precision]
    try:
        results = tune(Setting(settings.model, config, settings.batch_size, dtype, device, settings.compile))
        print(table(results), flush=True)
    except FastvitcError as error:
        print(f"not measured: {error}; auto takes the fixed order", flush=True)


def train(settings: TrainSettings) -> Path | None:
    """Train as the settings say; return the run's folder on the main process."""
    settings.check()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with process_group(settings.device) as process:
        images = find_images(settings)
        settings = with_backends(settings, process)
        run = start(settings, process, *images)
        folder = process.agree(lambda: output_folder(settings))
        if folder is not None:
            text = yaml.safe_dump(settings.to_dict(), sort_keys=False)
            write_atomically(folder / "args.yaml", lambda path: path.write_text(text))
        run.train(folder)
        return folder


def main() -> None:
    train(read_settings(sys.argv[1:]))


def cli() -> None:
    def body() -> None:
        run_command(PROGRAM, main)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        body = record(body)  # a bug's traceback goes into torchrun's report
    body()


if __name__ == "__main__":
    cli()
