"""`fastvitc-train`: trains a model on a folder of images, or on handwritten digits when given nothing."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from fastvitc.data import ImageIndex, digits_folder, read_class_names, synthetic_index, write_index
from fastvitc.errors import FastvitcError, UsageError
from fastvitc.kernels import BackendUnavailable, chosen
from fastvitc.models.config import preset
from fastvitc.models.saved import WEIGHTS, model_folder, read_config
from fastvitc.programs.command import parse, run_command
from fastvitc.programs.flags import check_known, spelled, with_config
from fastvitc.training.assembly import assemble, shares_statistics
from fastvitc.training.boards import check_wandb
from fastvitc.training.data_only import data_only
from fastvitc.training.folder import RunFolder
from fastvitc.training.images import shared_images
from fastvitc.training.process import Process, process_group
from fastvitc.training.recipes import recipe_settings
from fastvitc.training.run import Run
from fastvitc.training.settings import Recipe, RunSettings, TrainSettings
from fastvitc.training.state import RunState, newest_state, trained_states
from fastvitc.tuning.machine import PRECISIONS, can_compile, describe
from fastvitc.tuning.measure import Setting
from fastvitc.tuning.tune import measures_at_start, table, tune, unmeasured

PROGRAM = "fastvitc-train"


def read_settings(args: Sequence[str]) -> tuple[TrainSettings, RunState | None]:
    """The command line over the recipe's settings, or over those of the resumed run, whose state comes with them."""
    args = with_config(spelled(args))
    check_known(args)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--data-dir", "--model", "--recipe", "--resume", "--initial-checkpoint", "--experiment"):
        early.add_argument(flag)
    early.add_argument("--output", "-o")
    early.add_argument("--grad-accum-steps", type=int, default=1)
    try:
        known, _ = early.parse_known_args(args)
    except argparse.ArgumentError:
        return parse(TrainSettings, PROGRAM, args), None  # says what is wrong and exits
    if known.resume is not None:
        found = _resumed(known.resume, RunSettings(output=known.output, experiment=known.experiment).folder())
        if found is not None:
            folder, state = found
            saved = TrainSettings.from_dict(state.settings).changed(
                output=None, experiment=None, config=None, resume=None, resume_anyway=False
            )
            settings = parse(TrainSettings, PROGRAM, args, saved)
            settings.check_continues(saved)
            if known.resume == "auto" and state.epoch >= settings.optimisation.epochs:
                if os.environ.get("RANK", "0") == "0":
                    print(f"the run in {folder} has finished its {state.epoch} epochs; nothing is left to do")
                sys.exit(0)
            return settings.changed(resume=str(folder)), state
    begins = known.initial_checkpoint
    recipe = known.recipe or ("digits" if known.data_dir is None else "finetune" if begins else "small")
    if recipe not in get_args(Recipe):
        return parse(TrainSettings, PROGRAM, args), None  # prints the choices and exits
    shares = int(os.environ.get("WORLD_SIZE", "1")) * max(known.grad_accum_steps, 1)
    model = known.model or (None if begins is None else _model_of(Path(begins)))
    return parse(TrainSettings, PROGRAM, args, recipe_settings(recipe, model, shares)), None


def _model_of(checkpoint: Path) -> str:
    """The preset that a saved model of this library names."""
    ours = checkpoint.is_dir() or checkpoint.name == WEIGHTS
    name = read_config(model_folder(checkpoint)).get("name") if ours else None
    if name is None:
        raise UsageError(f"{checkpoint} does not name its model; give the preset with --model")
    return name


def _resumed(resume: str, output: str | None) -> tuple[Path, RunState] | None:
    """(folder, newest state) of the run to go on with; None where `auto` finds none yet."""
    if resume != "auto":
        if output is not None:
            raise UsageError(
                "a resumed run goes on in its own folder; leave out --output and --experiment, or copy the folder first"
            )
        return newest_state(Path(resume))
    if output is None:
        raise UsageError("--resume auto needs the run's folder: give it with --output or --experiment")
    return newest_state(Path(output)) if trained_states(Path(output)) else None


def find_images(settings: TrainSettings, process: Process) -> tuple[ImageIndex, ImageIndex]:
    """The training and validation images that the settings name."""
    data = settings.data
    if data.data_dir is None and data.loader == "synthetic":
        return synthetic_index("train"), synthetic_index("val")
    splits = data.train_split, data.val_split

    def write(place: Path) -> None:
        classes = None if data.class_map is None else read_class_names(Path(data.class_map))
        if classes is None and data.class_map is not None:
            raise UsageError(f"there is no file {data.class_map} for --class-map")
        write_index(data.data_dir or digits_folder(), place, splits=splits, classes=classes)

    return shared_images(process, write)


def output_folder(settings: TrainSettings, state: RunState | None) -> RunFolder:
    """The run's folder; it holds no other run, or one in which nothing was trained."""
    run = settings.run
    if state is not None:
        return RunFolder(Path(run.resume), run.keep)
    default = Path("runs", f"{settings.model.model}-{time.strftime('%Y%m%d-%H%M%S')}")
    path = default if run.folder() is None else Path(run.folder())
    if trained_states(path):
        raise UsageError(
            f"{path} already holds a run; choose another --output, or continue it with --resume {path}"
        )
    return RunFolder(path, run.keep)


def with_backends(settings: TrainSettings, process: Process, resumed: bool = False) -> TrainSettings:
    """The settings with a backend named for every op, equal on all processes.

    What auto takes is measured first where there is no measurement and `measures_at_start` says so.

    Raises:
        BackendUnavailable, UsageError: a backend that was asked for, or that the resumed run had, cannot run here.
    """
    dtype, backend = PRECISIONS[settings.machine.precision], settings.model.backend
    sharing = shares_statistics(settings, process)
    try:
        chosen(process.device, backend, dtype, sharing=sharing)
    except BackendUnavailable as error:
        if not resumed:
            raise
        raise UsageError(
            f"{error}. To go on with other backends than the run's, pass --backend auto"
        ) from error

    def choose() -> dict[str, str]:
        if measures_at_start(process.device) and unmeasured(process.device, dtype, backend):
            _measure(settings, process.device)
        return chosen(process.device, backend, dtype, sharing=sharing)

    picked = process.share(process.agree(choose))
    return settings.changed(backend=",".join(f"{op}={name}" for op, name in picked.items()))


def _measure(settings: TrainSettings, device: torch.device) -> None:
    """Measure the ops on the run's own shapes; a failure is a line in the log, and the fixed order holds."""
    model, size = settings.model, settings.data.size()
    config = preset(model.model)
    config = replace(config, pool=model.pool, image_size=size or config.image_size)
    print(
        f"measuring the backends of the ops on {describe(device)}, once for this device and these versions; "
        "fastvitc-tune measures again",
        flush=True,
    )
    setting = Setting(
        model.model,
        config,
        settings.optimisation.batch_size,
        PRECISIONS[settings.machine.precision],
        device,
        can_compile() if settings.machine.compile is None else settings.machine.compile,
    )
    try:
        print(table(tune(setting)), flush=True)
    except FastvitcError as error:
        print(f"not measured: {error}; auto takes the fixed order", flush=True)


def train(settings: TrainSettings, state: RunState | None = None) -> Path | None:
    """Train as the settings say, from the state where there is one; the run's folder, on the main process.

    With --data-only nothing is trained and there is no folder.

    Raises:
        Interrupted: the run was asked to stop; its state is saved.
    """
    settings.check()
    check_wandb(settings.run.board())
    if settings.machine.threads is not None:
        torch.set_num_threads(settings.machine.threads)
    with process_group(settings.machine.device) as process:
        _check_one_state(process, state)
        images = find_images(settings, process)
        if settings.run.data_only is not None:
            lines = data_only(settings, process, images[0])
            if process.is_main:
                print("\n".join(lines))
            return None
        settings = with_backends(settings, process, resumed=state is not None)
        parts = assemble(settings, process, *images, state)
        folder = process.agree(lambda: output_folder(settings, state))
        try:
            if folder is not None:
                folder.save_settings(parts.settings.to_dict())
            run = Run(parts, state, folder)
            if state is not None:
                for held in (state.model, state.ema or {}, *state.optimizers):
                    held.clear()  # it is in the parts now
            run.train()
        except KeyboardInterrupt:
            folder = None  # a second Ctrl-C waits for no write; the next run here removes what it left
            raise
        finally:
            if folder is not None:
                folder.close()
        return None if folder is None else folder.path


def _check_one_state(process: Process, state: RunState | None) -> None:
    """Raise UsageError where the processes, each of which looked by itself, found different states."""
    places = process.gather(None if state is None else (state.epoch, state.step))
    if len(set(places)) > 1:
        raise UsageError(
            f"the processes found different states of the run, (epoch, step): {places}; "
            "the folder must be one that all see, and no other run may write to it"
        )


def main() -> None:
    train(*read_settings(sys.argv[1:]))


def cli() -> None:
    def body() -> None:
        run_command(PROGRAM, main)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        body = record(body)  # a bug's traceback goes into torchrun's report
    body()


if __name__ == "__main__":
    cli()
