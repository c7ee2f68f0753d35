"""The peer of the race: an equal model trained by timm's parts, put together as timm's own train script does.

    python -m bench.race.peer --data-dir DIR --model vitc_1gf --epochs 15

Prints a line of JSON after each epoch's validation: `time` (seconds since 1970), `epoch`, `train_loss`, `val_top1`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from timm.data import Mixup, create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import Tensor, nn

from bench.peers import timm_model
from fastvitc.models.config import preset


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.race.peer", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup-epochs", type=float, default=3)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--scale", type=float, nargs=2, default=(0.35, 1.0))
    parser.add_argument("--hflip", type=float, default=0.5)
    parser.add_argument("--auto-augment", default=None, help="as of timm's --aa")
    parser.add_argument("--mixup", type=float, default=0.0)
    parser.add_argument("--cutmix", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fp32", action="store_true", help="no autocast; else bfloat16")
    parser.add_argument(
        "--no-compile", action="store_true", help="without torch.compile, which short runs do not earn back"
    )
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> None:
    random_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = {split: create_dataset("", root=str(args.data_dir / split)) for split in ("train", "val")}
    classes = len(splits["train"].reader.class_to_idx)
    config = replace(preset(args.model), num_classes=classes, image_size=(args.image_size, args.image_size))
    model = timm_model(config).to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=args.weight_decay)
    mixes = args.mixup > 0 or args.cutmix > 0
    mixup = (
        Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=classes) if mixes else None
    )
    smoothed = SoftTargetCrossEntropy() if mixes else LabelSmoothingCrossEntropy(args.smoothing)
    shared = {
        "input_size": (3, args.image_size, args.image_size),
        "num_workers": args.workers,
        "device": device,
    }
    shared |= {"batch_size": args.batch_size, "use_prefetcher": device.type == "cuda"}
    train_loader = create_loader(
        splits["train"], is_training=True, scale=tuple(args.scale), hflip=args.hflip,
        auto_augment=args.auto_augment, color_jitter=0.0 if args.auto_augment is None else 0.4, **shared,
    )  # fmt: skip
    val_loader = create_loader(splits["val"], is_training=False, crop_pct=0.875, **shared)
    scheduler, epochs = create_scheduler_v2(
        optimizer, "cosine", num_epochs=args.epochs, warmup_epochs=args.warmup_epochs, warmup_lr=1e-5,
        step_on_epochs=False, updates_per_epoch=len(train_loader),
    )  # fmt: skip
    compiled = model if args.no_compile else torch.compile(model)
    autocast = nullcontext() if args.fp32 else torch.autocast(device.type, torch.bfloat16)
    for epoch in range(epochs):
        loss = _epoch(compiled, train_loader, epoch, optimizer, scheduler, mixup, smoothed, autocast, device)
        top1 = _validate(compiled, val_loader, autocast, device)
        figures = {"time": time.time(), "epoch": epoch + 1, "train_loss": loss, "val_top1": top1}
        print(json.dumps(figures), flush=True)


def _on(device: torch.device, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images.to(device).contiguous(memory_format=torch.channels_last), labels.to(device)


def _epoch(
    model: nn.Module,
    loader: torch.utils.data.DataLoader,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    scheduler: object,
    mixup: Mixup | None,
    criterion: nn.Module,
    autocast: AbstractContextManager,
    device: torch.device,
) -> float:
    """Train for an epoch; the mean loss."""
    model.train()
    total = torch.zeros((), device=device)
    for step, batch in enumerate(loader):
        images, labels = _on(device, *batch)
        if mixup is not None:
            images, labels = mixup(images, labels)
        with autocast:
            loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(epoch * len(loader) + step + 1)
        total += loss.detach()
    return (total / len(loader)).item()


@torch.inference_mode()
def _validate(
    model: nn.Module,
    loader: torch.utils.data.DataLoader,
    autocast: AbstractContextManager,
    device: torch.device,
) -> float:
    """Top-1 in percent."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    images_seen = 0
    for batch in loader:
        images, labels = _on(device, *batch)
        with autocast:
            logits = model(images)
        right += (logits.argmax(1) == labels).sum()
        images_seen += len(labels)
    return 100.0 * right.item() / images_seen


if __name__ == "__main__":
    train(arguments())
