"""What the log says of a run in words: its first lines, the yardstick of the MFU."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastvitc.data import Loader, LoaderKind, choose_loader
from fastvitc.models.complexity import complexity
from fastvitc.models.vit import VisionTransformer
from fastvitc.training.assembly import Parts
from fastvitc.training.compilation import Compilation
from fastvitc.training.process import Process
from fastvitc.tuning.machine import describe, flops_peak, versions


@dataclass(frozen=True)
class Yardstick:
    """What an MFU (model FLOPs utilisation) is a share of.

    Attributes:
        peak: floating-point operations per second of all processes' devices; a multiply-add is two.
        source: where the peak comes from.
        model: whose operations are counted: three times those of the forward pass, at the size of its images now.
    """

    peak: float
    source: str
    model: VisionTransformer

    @property
    def per_image(self) -> float:
        """Floating-point operations of training on one image, counted alike; patches left out count as computed."""
        return 3 * 2 * complexity(self.model, self.model.image_size).flops

    def share(self, images_per_second: float) -> float:
        """The MFU at a rate over all processes."""
        return self.per_image * images_per_second / self.peak


def yardstick(parts: Parts) -> Yardstick:
    """The yardstick of a run: its settings' peak, else the device's."""
    given = parts.settings.run.peak_tflops
    if given is not None:
        peak, source = given * 1e12, "as given"
    else:
        peak, source = flops_peak(parts.process.device, parts.dtype)
    return Yardstick(peak * parts.process.world_size, source, parts.model)


def introduction(parts: Parts, yardstick: Yardstick, folder: Path) -> list[str]:
    """The lines that open a run's log."""
    s, o, counts = parts.settings, parts.settings.optimisation, complexity(parts.model)
    height, width = parts.model.config.image_size
    images = parts.train_loader.num_samples * parts.process.world_size
    return [
        f"{s.model.model}: {counts.params:,} parameters, {counts.flops / 1e9:.4f} GFLOPs forward at {height}x{width} "
        "(a multiply-add or bias add is one)",
        f"device: {describe(parts.process.device)}, {s.machine.precision}{unused_devices(parts.process)}",
        f"versions: {', '.join(f'{name} {version}' for name, version in versions().items())}",
        f"ops: {', '.join(f'{op} {backend}' for op, backend in parts.backends.items())}",
        f"data: {images:,} training images per epoch in {len(parts.classes)} classes, "
        f"{explain_loader(parts.train_loader, s.data.loader)}",
        f"recipe {o.recipe}: {o.opt}, learning rate {o.lr:g}, weight decay {o.weight_decay:g}, {o.epochs} epochs "
        f"of {parts.steps} steps, {parts.images_per_step} images per step",
        f"MFU: {yardstick.per_image / 1e9:.3g} GFLOP per training image (three times forward, a multiply-add is two), "
        f"as a share of {yardstick.peak / 1e12:.3g} TFLOP/s ({yardstick.source})",
        f"compile: {_yes_or_no(parts.compilation)}",
        f"output: {folder}",
    ] + ([] if parts.new_head is None else [_beginning(parts)])


def _yes_or_no(choice: Compilation) -> str:
    return f"{'yes' if choice.compile else 'no'}, {choice.why}"


def _beginning(parts: Parts) -> str:
    head = "a new head" if parts.new_head else "their head"
    return f"begins with the weights in {parts.settings.model.initial_checkpoint}, {head}"


def explain_loader(loader: Loader, asked: LoaderKind) -> str:
    """What loads the images, and why."""
    _, why = choose_loader(asked, loader.config.device)
    return f"{loader.description()} ({why})"


def unused_devices(process: Process) -> str:
    """What to add where the machine has more GPUs than the run's one; else nothing."""
    count = torch.cuda.device_count() if process.device.type == "cuda" else 1
    if process.world_size > 1 or count == 1:
        return ""
    return f"; one of {count} GPUs. All of them: torchrun --nproc-per-node {count} -m fastvitc.train, then your flags"
