"""`fastvitc-evaluate`: accuracy of a saved model, ours or another library's, on a folder of images."""

import sys
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import tyro

from fastvitc import convert
from fastvitc.data import LoaderConfig, create_loader, digits_folder, index_split
from fastvitc.errors import UsageError
from fastvitc.kernels import chosen
from fastvitc.models.config import as_size
from fastvitc.models.saved import load_model, load_weights, model_folder, read_config
from fastvitc.models.vit import VisionTransformer, create_model
from fastvitc.programs.command import parse, run_command
from fastvitc.ranges import at_least, check_ranges, share
from fastvitc.training.evaluation import Accuracy, Evaluator
from fastvitc.training.process import Process, pick_device
from fastvitc.training.settings import ImageSize
from fastvitc.tuning.machine import PRECISIONS, Precision, fast_precision

PROGRAM = "fastvitc-evaluate"


@dataclass(frozen=True)
class EvaluateSettings:
    """Accuracy of a saved model on a folder of images."""

    checkpoint: tyro.conf.Positional[str]
    """Folder of a saved model (a run's best/ or last/), or another library's file with --source."""
    data_dir: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder with class folders or tar shards, in val/ or in itself; by default scikit-learn's digits."""
    source: Literal["fastvitc", "pycls", "torchvision", "timm"] = "fastvitc"
    """Which library wrote the checkpoint."""
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Preset of another library's checkpoint."""
    ema: bool = False
    """Take the moving average of a pycls checkpoint."""
    image_size: ImageSize = None
    """Size in pixels of another library's model; by default the preset's."""
    crop_ratio: Annotated[float | None, share(zero=False), tyro.conf.arg(metavar="FLOAT")] = None
    """Side of the centre crop over the side the image is resized to; by default as in training, else 0.875."""
    loader: Literal["auto", "dali", "pil"] = "auto"
    """Decoder: DALI, or PIL in worker processes. auto: DALI on a GPU, else PIL."""
    workers: Annotated[int | None, at_least(0), tyro.conf.arg(aliases=["-j"], metavar="INT")] = None
    """Decoding processes or threads; by default the CPU cores."""
    batch_size: Annotated[int, at_least(1), tyro.conf.arg(aliases=["-b"])] = 64
    """Images per batch."""
    backend: str = "auto"
    """What the ops run on, see fastvitc-info: one name, or op=name,op=name."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    precision: Precision = field(default_factory=fast_precision)
    """bf16: autocast. By default where there is a GPU, or a CPU that multiplies in it."""
    compile: bool = False
    """torch.compile; pays for itself on large sets."""


def load(settings: EvaluateSettings) -> tuple[VisionTransformer, tuple[str, ...] | None, dict[str, Any]]:
    """(the model, its classes where the checkpoint names them, what it says of the preprocessing)."""
    if settings.source == "fastvitc":
        if settings.model is not None or settings.image_size is not None or settings.ema:
            raise UsageError(
                "--model, --image-size and --ema are for other libraries' checkpoints; ours know their own"
            )
        folder = model_folder(settings.checkpoint)
        model, config = load_model(folder, backend=settings.backend), read_config(folder)
        classes = config.get("classes")
        return model, None if classes is None else tuple(classes), config.get("preprocessing", {})
    if settings.model is None:
        raise UsageError(
            f"a checkpoint of {settings.source} does not name its model; give the preset with --model"
        )
    weights = convert.load(settings.checkpoint, settings.source, ema=settings.ema)
    size = settings.image_size
    model = create_model(
        settings.model,
        num_classes=len(weights["head.bias"]) if "head.bias" in weights else 0,
        image_size=None if size is None else as_size(size),
        pool="token" if "class_token" in weights else "mean",
        backend=settings.backend,
    )
    load_weights(model, weights)
    return model.eval(), None, {}


def evaluate(settings: EvaluateSettings) -> Accuracy:
    """Evaluate as the settings say, every image once."""
    check_ranges(settings, flags=True)
    process = Process(0, 1, pick_device(settings.device))
    dtype = PRECISIONS[settings.precision]
    chosen(process.device, settings.backend, dtype)
    model, classes, preprocessing = load(settings)
    index = index_split(settings.data_dir if settings.data_dir is not None else digits_folder())
    if classes is not None and classes != index.classes and set(classes) <= set(index.classes):
        print(
            f"{len(classes)} of the folder's {len(index.classes)} classes are evaluated: those of the model"
        )
        index = index_split(index.root, classes=classes)
    if classes is not None and classes != index.classes:
        raise UsageError(
            f"the model was trained on {len(classes)} classes ({', '.join(classes[:3])}, ...), the folder has "
            f"{len(index.classes)} ({', '.join(index.classes[:3])}, ...); give the data it was trained for"
        )
    if model.config.num_classes != len(index.classes):
        raise UsageError(
            f"the model has {model.config.num_classes} outputs, the folder {len(index.classes)} classes"
        )
    config = LoaderConfig(
        index,
        training=False,
        batch_size=settings.batch_size,
        image_size=model.config.image_size,
        device=process.device,
        channels=model.config.in_chans,
        interpolation=preprocessing.get("interpolation", "bilinear"),
        workers=settings.workers,
        crop_ratio=preprocessing.get("crop_ratio", 0.875)
        if settings.crop_ratio is None
        else settings.crop_ratio,
    )
    loader = create_loader(settings.loader, config)
    model = model.to(process.device, memory_format=torch.channels_last)
    evaluator = Evaluator(
        model, process, dtype=dtype, batch_size=settings.batch_size, compile=settings.compile
    )
    try:
        accuracy = evaluator(loader)
        for reason in loader.bad.values():
            print(f"warning: {reason}; it counts as not seen", file=sys.stderr)
        return accuracy
    finally:
        loader.close()


def main() -> None:
    settings = parse(EvaluateSettings, PROGRAM, sys.argv[1:])
    start = time.perf_counter()
    accuracy = evaluate(settings)
    seconds = time.perf_counter() - start
    print(
        f"top-1 {accuracy.top1:.2f}% ({accuracy.correct} of {accuracy.images}), top-5 {accuracy.top5:.2f}%, "
        f"loss {accuracy.loss:.4f}, {accuracy.images / seconds:,.0f} images/s with start-up"
    )


def cli() -> None:
    run_command(PROGRAM, main)


if __name__ == "__main__":
    cli()
