"""Every setting of a training run, in five groups. A field here is a flag of `fastvitc-train`.

To add a flag, add a field with its default, its range, and one line for the help.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastvitc.data import InterpolationName, LoaderKind, PolicyName
from fastvitc.errors import UsageError
from fastvitc.models.config import as_size, preset
from fastvitc.models.vit import Init
from fastvitc.ranges import Ascending, OneOrTwo, above, at_least, check_ranges, share
from fastvitc.training.optim import OptimizerName
from fastvitc.training.schedule import SchedName
from fastvitc.tuning.machine import Precision, fast_precision

Recipe = Literal[
    "digits",
    "small",
    "fast",
    "finetune",
    "paper-50ep",
    "paper-50ep-sgd",
    "paper-100ep",
    "paper-200ep",
    "paper-400ep",
]


def _optional(metavar: str | None, *aliases: str) -> object:
    """A flag that may be left out: its help says what happens then, so it does not say "default: None" as well."""

    def default(text: str) -> str:
        return "" if text == "None" else f"(default: {text})"

    return tyro.conf.arg(metavar=metavar, aliases=aliases, help_behavior_hint=default)


ImageSize = Annotated[tuple[int, ...] | None, at_least(1), OneOrTwo(), _optional("SIDE | HEIGHT WIDTH")]


@dataclass(frozen=True)
class DataSettings:
    """Which images, and what happens to them before the model."""

    data_dir: Annotated[str | None, _optional("DIR")] = None
    """Folder with class folders or tar shards in train/ and val/. Without it: scikit-learn's handwritten digits."""
    train_split: str = "train"
    """Name of the folder in --data-dir with the training images."""
    val_split: str = "val"
    """Name of the folder in --data-dir with the validation images."""
    class_map: Annotated[str | None, _optional("FILE")] = None
    """Text file with the name of a class in each line, in the order of the labels; other class folders are left out.
    Default: all, sorted."""
    loader: LoaderKind = "auto"
    """DALI, PIL in worker processes, or random pixels (synthetic). auto: DALI on a GPU, else PIL."""
    workers: Annotated[int | None, at_least(0), _optional("INT", "-j")] = None
    """Processes or threads that decode. Default: all of this process's cores beside a GPU, else a quarter."""
    image_size: ImageSize = None
    """Size of the images in pixels. Default: the model's."""
    low_res: ImageSize = None
    """Size of the training images until --low-res-until; the position embedding is interpolated. Default: none."""
    low_res_until: Annotated[float, share()] = 0.6
    """Share of the run until which the training images have the size --low-res."""
    crop_scale: Annotated[tuple[float, float], share(zero=False), Ascending()] = (0.35, 1.0)
    """A random crop takes a share of the image's area between these two."""
    crop_aspect: Annotated[tuple[float, float], above(0), Ascending()] = (3 / 4, 4 / 3)
    """The width of a random crop over its height is between these two."""
    hflip: Annotated[float, share()] = 0.5
    """Chance of a horizontal flip."""
    interpolation: InterpolationName = "bilinear"
    """How images are resized."""
    color_jitter: Annotated[float, share()] = 0.0
    """Brightness, contrast and colour each change by up to this share, after crop and flip."""
    augment: PolicyName = "none"
    """Augmentation policy after crop, flip and --color-jitter."""
    reprob: Annotated[float, share()] = 0.0
    """Chance of an image to have a random rectangle erased (Zhong et al. 2020)."""
    bad_share: Annotated[float, share()] = 0.01
    """Share of the images that may be unreadable before the run stops. Above 0, one may always be."""
    crop_ratio: Annotated[float, share(zero=False)] = 0.875
    """Validation: side of the centre crop over the side that the image is resized to."""
    mean: Annotated[tuple[float, ...] | None, _optional("FLOAT...")] = None
    """Mean of each channel, of pixel values from 0 to 1. Default: ImageNet's."""
    std: Annotated[tuple[float, ...] | None, above(0), _optional("FLOAT...")] = None
    """Standard deviation of each channel. Default: ImageNet's."""

    def size(self) -> tuple[int, int] | None:
        """(height, width) asked for, None for the model's own."""
        return None if self.image_size is None else as_size(self.image_size)


@dataclass(frozen=True)
class ModelSettings:
    """Which model."""

    model: str = "vitc_nano"
    """A preset; fastvitc-info lists them."""
    initial_checkpoint: Annotated[str | None, _optional("FILE | DIR")] = None
    """Weights to begin with: a saved model's folder, or a file of fastvitc, pycls, torchvision or timm. The head is
    new where the number of classes is another one; the position embedding is interpolated for another size."""
    in_chans: Literal[1, 3] = 3
    """Channels of the images: 3 for RGB, 1 for grey."""
    init: Init = "paper"
    """How a new model begins: as in the paper's code, with a head of zeros, or with a drawn head."""
    freeze_stem: bool = False
    """Leave the stem's weights and statistics as they are."""
    pool: Literal["token", "mean"] = "token"
    """What the head reads: the class token, or the mean of all tokens."""
    drop_path: Annotated[float, share()] = 0.0
    """Rate of stochastic depth in the last block. It rises linearly from 0 in the first."""
    patch_drop: Annotated[float, share(one=False)] = 0.0
    """Share of the patches that training leaves out after the stem, drawn anew for each image."""
    patch_drop_until: Annotated[float, share()] = 1.0
    """Share of the run until which patches are left out."""
    backend: Annotated[str, tyro.conf.arg(metavar="NAME | OP=NAME,...")] = "auto"
    """What the ops run on, see fastvitc-info. auto takes what was measured fastest; a new GPU is measured first."""
    grad_checkpointing: bool = False
    """Save memory: compute each block again in the backward pass."""


@dataclass(frozen=True)
class OptimisationSettings:
    """How the weights move."""

    recipe: Recipe | None = None
    """Gives every setting that you leave out its value. Default: digits without --data-dir, small with it."""
    epochs: Annotated[int, at_least(1)] = 30
    """Passes over the training images."""
    batch_size: Annotated[int, at_least(1), tyro.conf.arg(aliases=["-b"])] = 64
    """Images of a batch in each process."""
    validation_batch_size: Annotated[int | None, at_least(1), _optional("INT", "-vb")] = None
    """Images of a validation batch in each process. Default: --batch-size."""
    grad_accum_steps: Annotated[int, at_least(1)] = 1
    """Batches of an optimiser step."""
    opt: OptimizerName = "adamw"
    """Optimiser. muon: for the blocks' matrices, and AdamW for the rest."""
    opt_betas: Annotated[tuple[float, float], share(one=False)] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's mean and of its square."""
    opt_eps: Annotated[float, above(0)] = 1e-8
    """AdamW's epsilon."""
    momentum: Annotated[float, share(one=False)] = 0.9
    """Momentum of SGD and Muon."""
    lr: Annotated[float, above(0)] = 1e-3
    """Highest learning rate. It is never scaled with the batch size."""
    weight_decay: Annotated[float, at_least(0)] = 0.05
    """Weight decay. Biases and norms have none."""
    layer_decay: Annotated[float, share(zero=False)] = 1.0
    """Each layer learns this many times as fast as the one above it; the stem is the lowest."""
    sched: SchedName = "cosine"
    """The learning rate's fall: a half-cosine over the run, or wsd, which falls in the run's last part alone."""
    decay_share: Annotated[float, share(zero=False)] = 0.2
    """Share of the run in which wsd falls."""
    warmup_epochs: Annotated[float, at_least(0)] = 3.0
    """Linear rise of the learning rate over these epochs."""
    warmup_lr: Annotated[float | None, at_least(0), _optional("FLOAT")] = None
    """Learning rate at the start of the rise. Default: 0.1 of --lr."""
    min_lr: Annotated[float | None, at_least(0), _optional("FLOAT")] = None
    """Learning rate at the end of the fall. Default: 0.005 of --lr."""
    cooldown_epochs: Annotated[float, at_least(0)] = 0.0
    """The last so many of --epochs have the lowest learning rate."""
    clip_grad: Annotated[float | None, above(0), _optional("FLOAT")] = None
    """Largest norm of the gradient. Default: any."""
    smoothing: Annotated[float, share()] = 0.1
    """Label smoothing."""
    bce_loss: bool = False
    """Binary cross-entropy of each class by itself, in place of cross-entropy (Wightman et al. 2021)."""
    mixup: Annotated[float, at_least(0)] = 0.0
    """Alpha of mixup; 0 turns it off. With CutMix on as well, each batch gets one of the two."""
    cutmix: Annotated[float, at_least(0)] = 0.0
    """Alpha of CutMix; 0 turns it off."""
    mixup_prob: Annotated[float, share()] = 1.0
    """Chance that a batch is mixed."""
    mixup_off_epoch: Annotated[int, at_least(0)] = 0
    """Mix nothing any more after so many epochs; 0: always mix."""
    model_ema: bool = False
    """Keep a moving average of the weights; evaluate and save the average."""
    model_ema_rate: Annotated[float | None, share(zero=False), _optional("FLOAT")] = None
    """Share of the new weights in an update of the average. Default: the recipe's, see fastvitc/README.md."""
    model_ema_every: Annotated[int, at_least(1)] = 1
    """Optimiser steps between updates of the average."""
    sync_bn: bool = False
    """BatchNorm's statistics are of the batches of all processes, for small batches. Default: of each one's own."""
    precise_bn: Annotated[int, at_least(0)] = 0
    """Before each evaluation, compute BatchNorm's statistics anew on this many training images; 0: do not."""


@dataclass(frozen=True)
class MachineSettings:
    """What computes, and how."""

    device: str = "auto"
    """cuda, cpu, or auto."""
    threads: Annotated[int | None, at_least(1), _optional("INT")] = None
    """CPU threads of the model. Default: PyTorch's."""
    precision: Annotated[Precision, tyro.conf.arg(aliases=["--amp-dtype"])] = field(
        default_factory=fast_precision
    )
    """bf16 and fp16 keep weights and statistics in float32; fp16 scales the loss, so that small gradients are not lost.
    Default: bf16 where the device multiplies in it, else fp32."""
    compile: Annotated[bool | None, _optional(None)] = None
    """torch.compile training and evaluation. Default: where that is expected to take less time."""
    seed: Annotated[int, at_least(0)] = 0
    """Fixes the weights at the start, the order of the images and every random draw."""


@dataclass(frozen=True)
class RunSettings:
    """Where the run is kept, and what it says."""

    output: Annotated[str | None, _optional("DIR", "-o")] = None
    """Folder of the run. Default: runs/<model>-<date>-<time>."""
    experiment: Annotated[str | None, _optional("NAME")] = None
    """Name of the run: its folder is this one in --output, or in runs."""
    config: Annotated[str | None, _optional("FILE")] = None
    """Settings as YAML, such as a run's args.yaml; the flags given here come before them."""
    resume: Annotated[str | None, _optional("DIR | auto")] = None
    """Continue the run in this folder with its settings. auto: that of --output, or begin it where there is none."""
    resume_anyway: bool = False
    """Resume though the images or the loader changed. The run then goes on from the start of its epoch."""
    save_every: Annotated[int | None, at_least(1), _optional("STEPS")] = None
    """Save the run's state every so many steps, besides each epoch's end. Default: by time alone."""
    save_minutes: Annotated[float, above(0)] = 10.0
    """Save the run's state after so many minutes without a save."""
    keep: Annotated[int, at_least(1), tyro.conf.arg(aliases=["--checkpoint-hist"])] = 2
    """How many of the newest states are kept."""
    max_rollbacks: Annotated[int, at_least(0)] = 3
    """How often in a row the run goes back to its last state, and leaves out some steps, for a loss or weight that
    is not finite."""
    val_interval: Annotated[int, at_least(1)] = 1
    """Epochs from one validation to the next; there is one after the last epoch."""
    log_every: Annotated[int, at_least(1), tyro.conf.arg(aliases=["--log-interval"])] = 50
    """Steps between log points. Only log points wait for the device."""
    data_only: Annotated[float | None, above(0), _optional("SECONDS")] = None
    """Train nothing: run the training loader alone for so long, an epoch at most, and tell its rate."""
    profile: Annotated[int | None, at_least(1), _optional("STEPS")] = None
    """Write a trace of so many steps, after the first few, to trace.json in the run's folder. Default: none."""
    wandb: Annotated[str | None, _optional("PROJECT")] = None
    """Send the figures to this project of Weights & Biases as well. Needs pip install 'fastvitc[wandb]'."""
    log_wandb: bool = False
    """As --wandb fastvitc."""
    peak_tflops: Annotated[float | None, above(0), _optional("FLOAT")] = None
    """Peak of the device for the MFU, in 1e12 operations per second. Default: data sheet, or a measured product."""

    def board(self) -> str | None:
        """The project of Weights & Biases; None for none."""
        return self.wandb or ("fastvitc" if self.log_wandb else None)

    def folder(self) -> str | None:
        """The run's folder where it is given."""
        if self.experiment is None:
            return self.output
        return str(Path(self.output or "runs", self.experiment))


@dataclass(frozen=True)
class TrainSettings:
    """Train a vision transformer. Without arguments: vitc_nano on handwritten digits, about a minute on a CPU."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optimisation: OptimisationSettings = field(default_factory=OptimisationSettings)
    machine: MachineSettings = field(default_factory=MachineSettings)
    run: RunSettings = field(default_factory=RunSettings)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainSettings":
        """The settings that `to_dict` gave; UsageError for a name that there is not."""
        return cls().changed(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """{flag: value} over all groups, plain enough for YAML and JSON."""
        flat = {name: value for group in asdict(self).values() for name, value in group.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}

    def changed(self, **values: Any) -> "TrainSettings":
        """These settings with some of another value, named by their flags.

        Raises:
            UsageError: a name that there is not.
        """
        groups = {group.name: getattr(self, group.name) for group in fields(self)}
        for name, group in groups.items():
            own = {field.name: values.pop(field.name) for field in fields(group) if field.name in values}
            groups[name] = replace(group, **own)
        if values:
            raise UsageError(f"unknown settings: {', '.join(sorted(values))}")
        return TrainSettings(**groups)

    def check_continues(self, saved: "TrainSettings") -> None:
        """Raise UsageError where these settings cannot go on with a run that began with the saved ones."""
        before, now = saved.to_dict(), self.to_dict()
        changed = [
            f"--{name.replace('_', '-')} was {_as_given(before[name])}, now {_as_given(now[name])}"
            for name in now
            if name not in _MAY_CHANGE and now[name] != before[name]
        ]
        if changed:
            raise UsageError(
                f"a resumed run keeps its settings: {'; '.join(changed)}. Start another run instead"
            )

    def check(self) -> None:
        """Raise UsageError for an unknown model and for numbers out of their range."""
        preset(self.model.model)
        for group in fields(self):
            check_ranges(getattr(self, group.name), flags=True)


def _as_given(value: Any) -> str:
    """A value as it stands on a command line."""
    if value is None:
        return "not set"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


_MAY_CHANGE = {
    "epochs",
    "data_dir",
    "bad_share",
    "workers",
    "device",
    "backend",
    "compile",
    "log_every",
    "peak_tflops",
    "profile",
    "wandb",
    "log_wandb",
    "validation_batch_size",
    "val_interval",
    "output",
    "experiment",
    "config",
    "resume",
    "resume_anyway",
    "save_every",
    "save_minutes",
    "data_only",
    "keep",
    "max_rollbacks",
}
