"""The command line of `fastvitc-train` before it is parsed: a file of settings, and timm's names for what is here."""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from fastvitc.errors import UsageError
from fastvitc.training.settings import TrainSettings

#: A flag of timm's train script → what to do here.
_TIMM = {
    "aa": "use --augment",
    "amp": "use --precision bf16 (or fp16)",
    "amp-impl": "leave it out: mixed precision is PyTorch's",
    "channels-last": "leave it out: images and weights always are",
    "crop-pct": "use --crop-ratio",
    "data": "use --data-dir",
    "dataset": "use --data-dir",
    "decay-rate": "use --sched wsd and --decay-share",
    "drop": "use --drop-path",
    "eval-metric": "leave it out: top-1 chooses the best",
    "gp": "use --pool",
    "img-size": "use --image-size",
    "input-size": "use --image-size",
    "learning-rate": "use --lr",
    "local-rank": "leave it out: torchrun sets it",
    "lr-base": "use --lr, which is never scaled",
    "model-ema-decay": "use --model-ema-rate, which is 1 minus the decay",
    "no-aug": "use --augment none --hflip 0 --crop-scale 1 1",
    "num-classes": "leave it out: the class folders are counted",
    "pin-mem": "leave it out: it is on beside a GPU",
    "pretrained": "use --initial-checkpoint FILE",
    "ratio": "use --crop-aspect",
    "recovery-interval": "use --save-every",
    "scale": "use --crop-scale",
    "sched-on-updates": "leave it out: the rate changes at every step",
    "start-epoch": "use --resume",
    "torchcompile": "use --compile",
    "train-interpolation": "use --interpolation",
    "wandb-project": "use --wandb",
}
_AMP_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
#: What a file of settings does not pass on: a run of its own has its own folder.
_OF_A_RUN = {"output", "experiment", "resume", "resume_anyway", "config"}


def spelled(args: Sequence[str]) -> list[str]:
    """The arguments with hyphens in the flags' names, each flag apart from its value, and dtypes by our names."""
    found: list[str] = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        if flag.startswith("--") and len(flag) > 2:
            found += [flag.replace("_", "-"), *([value] if equals else [])]
        else:
            found.append(arg)
    for place, arg in enumerate(found[1:], start=1):
        if found[place - 1] == "--amp-dtype":
            found[place] = _AMP_DTYPES.get(arg, arg)
    return found


def check_known(args: Sequence[str]) -> None:
    """Raise UsageError for a flag that there is not, with what to use in its place.

    Args:
        args: `spelled` ones.
    """
    known = {*_flags(), "--help"}
    for arg in args:
        if arg.startswith("--") and arg not in known and not arg.startswith("--tyro-"):
            name = arg.removeprefix("--")
            near = difflib.get_close_matches(arg, known, n=2, cutoff=0.6)
            hint = _TIMM.get(name) or (
                f"did you mean {' or '.join(near)}?" if near else "fastvitc-train --help lists all"
            )
            raise UsageError(f"there is no flag {arg}; {hint}")


def with_config(args: Sequence[str]) -> list[str]:
    """The arguments with those of the file that --config names before them, but for what they give themselves.

    Args:
        args: `spelled` ones.

    Raises:
        UsageError: the file cannot be read, or holds something else than settings.
    """
    if "--config" not in args[:-1]:
        return list(args)
    if "--resume" in args:
        raise UsageError("a resumed run keeps its settings; leave out --config")
    flags = _flags()
    given = {flags.get(arg) for arg in args}
    found: list[str] = []
    for name, value in _read(Path(args[args.index("--config") + 1])).items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or name in _OF_A_RUN or flags.get(flag, name) in given:
            continue
        if isinstance(value, bool):
            found.append(flag if value else f"--no-{flag.removeprefix('--')}")
        else:
            found += [flag, *map(str, value if isinstance(value, list) else [value])]
    return found + list(args)


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read the settings in {file}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UsageError(
            f"{file} holds no settings; expected lines such as 'epochs: 100', as in a run's args.yaml"
        )
    return values


def _flags() -> dict[str, str]:
    """{flag, or another name of it: the setting}."""
    found = {}
    for group in fields(TrainSettings):
        for name, hint in get_type_hints(group.type, include_extras=True).items():
            flag = name.replace("_", "-")
            aliases = [
                alias
                for extra in getattr(hint, "__metadata__", ())
                for alias in getattr(extra, "aliases", None) or ()
            ]
            found.update(dict.fromkeys((f"--{flag}", f"--no-{flag}", *aliases), name))
    return found
