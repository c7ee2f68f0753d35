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

from fastvitc.checkpoint import STATE, load_state, state_file
from fastvitc.command import parse, run_command
from fastvitc.data import ImageIndex, digits_folder, index_folder, synthetic_index
from fastvitc.distributed import process_group
from fastvitc.errors import FastvitcError, UsageError
from fastvitc.files import write_atomically
from fastvitc.run import start
from fastvitc.settings import Recipe, TrainSettings, recipe_settings

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


def train(settings: TrainSettings) -> Path | None:
    """Train as the settings say; return the run's folder on the main process."""
    settings.check()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with process_group(settings.device) as process:
        run = start(settings, process, *find_images(settings))
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
