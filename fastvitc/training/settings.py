"""Every setting of a training run."""

from dataclasses import asdict, dataclass, field, fields
from math import inf
from typing import Annotated, Any, Literal

import tyro

from fastvitc.errors import UsageError
from fastvitc.models.config import preset
from fastvitc.tuning.machine import can_compile, fast_precision

Recipe = Literal[
    "digits", "small", "paper-50ep", "paper-50ep-sgd", "paper-100ep", "paper-200ep", "paper-400ep"
]


@dataclass(frozen=True)
class TrainSettings:
    """Train a vision transformer. Without arguments: vitc_nano on handwritten digits, about a minute on a CPU."""

    # Data
    data_dir: str | None = None
    """Folder with train/<class>/* and val/<class>/*; by default scikit-learn's digits, written once to the cache."""
    loader: Literal["auto", "dali", "pil", "synthetic"] = "auto"
    """Decoder: DALI, PIL in worker processes, or random images without any disk. auto: DALI on a GPU, else PIL."""
    workers: Annotated[int | None, tyro.conf.arg(aliases=["-j"])] = None
    """Decoding processes or threads per training process; by default its cores, or a quarter of them when it trains on
    them."""
    image_size: tuple[int, ...] | None = None
    """Side in pixels, or height and width; by default the model's."""
    crop_scale: tuple[float, float] = (0.35, 1.0)
    """Least and largest share of the image's area in a random crop."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest aspect ratio of a random crop."""
    hflip: float = 0.5
    """Chance of a horizontal flip."""
    augment: Literal["none", "autoaugment", "randaugment", "trivialaugment"] = "none"
    """Augmentation policy after crop and flip."""
    crop_ratio: float = 0.875
    """Validation: side of the centre crop over the side the image is resized to."""

    # Model
    model: str = "vitc_nano"
    """A preset, see fastvitc-info."""
    pool: Literal["token", "mean"] = "token"
    """What the head reads: the class token, or the mean of all tokens."""
    drop_path: float = 0.0
    """Stochastic depth in the last block, rising linearly from the first."""
    backend: str = "auto"
    """Implementation of the ops, see fastvitc-info: one name, or op=name,op=name. auto: the measured one; on a GPU that
    has not been measured, measure first."""
    grad_checkpointing: bool = False
    """Trade compute for memory."""

    # Optimisation
    recipe: Recipe | None = None
    """Defaults of what follows and of the augmentation: digits without --data-dir, small with it, or the paper's."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 64
    """Images per process and batch."""
    grad_accum_steps: int = 1
    """Batches per optimiser step."""
    opt: Literal["adamw", "sgd"] = "adamw"
    """Optimiser, PyTorch's fused form."""
    lr: float = 1e-3
    """Peak learning rate (never scaled with the batch size)."""
    weight_decay: float = 0.05
    """On all weights but biases and norms."""
    warmup_epochs: float = 3.0
    """Linear warm-up from 0.1 of the rate; then a half-cosine to 0.005 of it."""
    clip_grad: float | None = None
    """Largest norm of the gradient."""
    smoothing: float = 0.1
    """Label smoothing."""
    mixup: float = 0.0
    """Alpha of mixup; 0 for none. With CutMix on as well, each batch draws one of the two."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 for none."""
    model_ema: bool = False
    """Keep a moving average of the weights, evaluate and save that."""
    model_ema_rate: float | None = None
    """Share of the new weights in an update; by default the paper's code's in its recipes (1e-5 · total batch/epochs ·
    steps between updates), else such that an epoch's weights count half after another epoch."""
    model_ema_every: int = 1
    """Optimiser steps between updates of the average."""
    precise_bn: int = 0
    """Training images, over all processes, to recompute BatchNorm's statistics on before each evaluation; 0: none."""

    # Machine
    device: str = "auto"
    """cuda, cpu, or auto."""
    threads: int | None = None
    """CPU threads of the model; by default PyTorch's."""
    precision: Literal["bf16", "fp32"] = field(default_factory=fast_precision)
    """bf16: autocast; weights and statistics stay float32. By default where there is a GPU, or a CPU that
    multiplies in it."""
    compile: bool = field(default_factory=can_compile)
    """torch.compile of the training step and the evaluation; by default where there is a GPU, or a C++ compiler and
    Python's headers."""
    seed: int = 0
    """Fixes weights, order and augmentation."""

    # Run
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the run; by default runs/<model>-<date>-<time>."""
    resume: str | None = None
    """Continue a run in its folder, with its settings and backends; those of length, data folder and machine may be
    given anew."""
    log_every: int = 50
    """Steps between log points (the only ones that wait for the device)."""
    peak_tflops: float | None = None
    """Peak for the MFU, in 1e12 floating-point operations per second; by default the GPU's data sheet or a measured
    matrix product."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainSettings":
        """The settings that `to_dict` gave; UsageError for a name that there is not."""
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise UsageError(f"unknown settings: {', '.join(sorted(unknown))}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Names and values, plain enough for YAML and JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def continuing(self, saved: "TrainSettings") -> "TrainSettings":
        """These settings, for a run that began with the saved ones.

        Raises:
            UsageError: a setting that a run keeps to its end differs.
        """
        changed = [
            f"--{field.name.replace('_', '-')} was {getattr(saved, field.name)}, now {getattr(self, field.name)}"
            for field in fields(self)
            if field.name not in _MAY_CHANGE and getattr(self, field.name) != getattr(saved, field.name)
        ]
        if changed:
            raise UsageError(
                f"a resumed run keeps its settings: {'; '.join(changed)}. Start another run instead"
            )
        return self

    def size(self) -> tuple[int, int] | None:
        """(height, width) asked for, None for the model's own."""
        if self.image_size is None:
            return None
        if len(self.image_size) not in (1, 2):
            raise UsageError(f"--image-size takes one or two numbers, got {len(self.image_size)}")
        return self.image_size[0], self.image_size[-1]

    def check(self) -> None:
        """Raise UsageError for an unknown model and for numbers out of their range."""
        preset(self.model)
        ranges = {
            "epochs": (1, None),
            "batch_size": (1, None),
            "grad_accum_steps": (1, None),
            "log_every": (1, None),
            "model_ema_every": (1, None),
            "seed": (0, None),
            "warmup_epochs": (0, None),
            "precise_bn": (0, None),
            "workers": (0, None),
            "threads": (1, None),
            "weight_decay": (0, None),
            "mixup": (0, None),
            "cutmix": (0, None),
            "smoothing": (0, 1),
            "hflip": (0, 1),
            "drop_path": (0, 1),
            "crop_ratio": (0, 1),
            "model_ema_rate": (0, 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not (low <= value < inf if high is None else low <= value <= high):
                limit = f"at least {low}" if high is None else f"from {low} to {high}"
                raise UsageError(f"--{name.replace('_', '-')} must be {limit}, got {value}")
        for name in ("lr", "clip_grad", "crop_ratio", "model_ema_rate", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise UsageError(f"--{name.replace('_', '-')} must be greater than 0, got {value}")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UsageError(f"--crop-scale must be two shares with 0 < low <= high <= 1, got {low} {high}")
        low, high = self.crop_aspect
        if not 0 < low <= high < inf:
            raise UsageError(f"--crop-aspect must be two ratios with 0 < low <= high, got {low} {high}")
        self.size()


_MAY_CHANGE = {
    "epochs",
    "data_dir",
    "workers",
    "device",
    "backend",
    "compile",
    "log_every",
    "peak_tflops",
    "output",
    "resume",
}
