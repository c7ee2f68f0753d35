"""A training run: data, model and step put together, and the loop over epochs."""

import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvitc.data import Augment, ImageIndex, Loader, create_loader
from fastvitc.errors import FastvitcError, UsageError
from fastvitc.kernels import chosen
from fastvitc.models.complexity import complexity
from fastvitc.models.saved import load_weights, save_model
from fastvitc.models.stems import IMAGENET_MEAN, IMAGENET_STD
from fastvitc.models.vit import VisionTransformer, create_model
from fastvitc.training.evaluation import Accuracy, Evaluator, precise_batch_norm
from fastvitc.training.meter import Meter
from fastvitc.training.mix import Mixing
from fastvitc.training.optim import ModelEma, Schedule, create_optimizer, paper_ema_rate, set_learning_rate
from fastvitc.training.process import Process
from fastvitc.training.report import EpochRow, Reporter
from fastvitc.training.settings import TrainSettings
from fastvitc.training.state import STATE, load_state, save_state
from fastvitc.training.step import TrainStep, compiled_graphs
from fastvitc.tuning.machine import PRECISIONS, describe, flops_peak, versions


class Run:
    """Everything a run needs, from its settings; nothing is written before `train`.

    Args:
        settings: of the run.
        process: this process.
        train, val: the images.
        state: of an earlier part of the run, see `fastvitc.models.saved.load_state`.
    """

    def __init__(
        self,
        settings: TrainSettings,
        process: Process,
        train: ImageIndex,
        val: ImageIndex,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.settings, self.process, self.classes = settings, process, train.classes
        self.dtype = PRECISIONS[settings.precision]
        self.backends = chosen(process.device, settings.backend, self.dtype)
        torch.manual_seed(settings.seed)
        self.model = create_model(
            settings.model,
            num_classes=len(train.classes),
            image_size=settings.size(),
            pool=settings.pool,
            drop_path=settings.drop_path,
            backend=self.backends,
            grad_checkpointing=settings.grad_checkpointing,
        ).to(process.device, memory_format=torch.channels_last)
        if settings.compile:
            self._try_ops()
        self.train_loader, self.val_loader = self._loader(train, True), self._loader(val, False)
        self.steps = len(self.train_loader) // settings.grad_accum_steps
        if self.steps == 0:
            raise UsageError(
                f"an epoch has {len(self.train_loader)} batches per process, fewer than the "
                f"{settings.grad_accum_steps} of --grad-accum-steps; lower it or --batch-size"
            )
        self.images_per_step = settings.batch_size * settings.grad_accum_steps * process.world_size
        self.optimizer = create_optimizer(
            self.model, settings.opt, lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.schedule = Schedule(settings.lr, settings.epochs, settings.warmup_epochs)
        self.mixing = Mixing(settings.mixup, settings.cutmix)
        self.ema = self._ema() if settings.model_ema else None
        self.first_epoch, self.best, self._graphs = 0, -1.0, 0
        if state is not None:
            self._restore(state)
        self.step = TrainStep(
            self.model,
            self.optimizer,
            process,
            dtype=self.dtype,
            label_smoothing=settings.smoothing,
            accumulate=settings.grad_accum_steps,
            clip_grad=settings.clip_grad,
            compile=settings.compile,
        )
        self.evaluate = Evaluator(
            self.evaluated,
            process,
            dtype=self.dtype,
            batch_size=settings.batch_size,
            compile=settings.compile,
        )

    @property
    def evaluated(self) -> VisionTransformer:
        """The model that is evaluated and saved: the average where one is kept."""
        return self.ema.model if self.ema is not None else self.model

    def train(self, folder: Path | None) -> float:
        """Run all epochs; return the best validation top-1 in percent. The process with a folder reports and saves."""
        reporter = None
        if folder is not None:
            done = self.first_epoch
            reporter = Reporter(folder, resumed_epochs=done, resumed_steps=done * self.steps)
            # On the main process alone: several at once would share the cores that they measure.
            self.peak = self._peak()
            self._announce(reporter, folder)
        try:
            for epoch in range(self.first_epoch, self.settings.epochs):
                self._epoch(epoch, folder, reporter)
        finally:
            self.train_loader.close()
            self.val_loader.close()
            if reporter is not None:
                reporter.close()
        if reporter is not None and folder is not None:
            reporter.line(f"best validation top-1: {self.best:.2f}%; curves: {folder / 'curves.png'}")
        return self.best

    def _try_ops(self) -> None:
        """One image outside torch.compile, which would wrap a backend's refusal of it in an error of its own."""
        config, device = self.model.config, self.process.device
        image = torch.zeros(1, config.in_chans, *config.image_size, device=device)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            self.model.eval()(image.contiguous(memory_format=torch.channels_last))
        self.model.train()

    def _loader(self, index: ImageIndex, training: bool) -> Loader:
        s, process = self.settings, self.process
        return create_loader(
            s.loader,
            index,
            training=training,
            batch_size=s.batch_size,
            image_size=self.model.config.image_size,
            augment=Augment(scale=s.crop_scale, ratio=s.crop_aspect, hflip=s.hflip, policy=s.augment),
            crop_ratio=s.crop_ratio,
            device=process.device,
            seed=s.seed,
            rank=process.rank,
            world_size=process.world_size,
            workers=s.workers,
        )

    def _ema(self) -> ModelEma:
        s = self.settings
        rate = s.model_ema_rate
        if rate is None and (s.recipe or "").startswith("paper"):
            rate = paper_ema_rate(self.images_per_step, s.epochs, s.model_ema_every)
        elif rate is None:
            rate = 1.0 - 0.5 ** (s.model_ema_every / self.steps)
        return ModelEma(
            self.model, rate=rate, every=s.model_ema_every, warmup_steps=int(s.warmup_epochs * self.steps)
        )

    def _restore(self, state: dict[str, Any]) -> None:
        for what, then, now in (
            ("classes", state["classes"], list(self.classes)),
            ("number of processes", state["world_size"], self.process.world_size),
        ):
            if then != now:
                raise UsageError(
                    f"a resumed run keeps its {what}: it was {then}, now {now}. Start another run instead"
                )
        load_weights(self.model, state["model"])
        if self.ema is not None:
            load_weights(self.ema.model, state["ema"] or state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.first_epoch, self.best = state["epoch"], state["best"]
        if self.first_epoch >= self.settings.epochs:
            raise UsageError(
                f"the run at {self.settings.resume} has finished its {self.first_epoch} epochs; "
                "ask for more with --epochs"
            )

    def _peak(self) -> tuple[float, str]:
        """Floating-point operations per second of all processes' devices, and the source of the figure."""
        if self.settings.peak_tflops is not None:
            return self.settings.peak_tflops * 1e12 * self.process.world_size, "as given"
        peak, source = flops_peak(self.process.device, self.dtype)
        return peak * self.process.world_size, source

    def _mfu(self, images_per_second: float) -> float:
        return 3 * 2 * complexity(self.model).flops * images_per_second / self.peak[0]

    def _announce(self, reporter: Reporter, folder: Path) -> None:
        s, counts = self.settings, complexity(self.model)
        height, width = self.model.config.image_size
        images = self.train_loader.num_samples * self.process.world_size
        for line in (
            f"{s.model}: {counts.params:,} parameters, {counts.flops / 1e9:.4f} GFLOPs at {height}x{width} "
            "(multiply-adds and bias adds)",
            f"device: {describe(self.process.device)}, {s.precision}",
            f"versions: {', '.join(f'{name} {version}' for name, version in versions().items())}",
            f"ops: {', '.join(f'{op} {backend}' for op, backend in self.backends.items())}",
            f"data: {images:,} training images per epoch in {len(self.classes)} classes, "
            f"{type(self.train_loader).__name__}",
            f"recipe {s.recipe}: {s.opt}, learning rate {s.lr:g}, weight decay {s.weight_decay:g}, {s.epochs} epochs "
            f"of {self.steps} steps, {self.images_per_step} images per step",
            f"MFU: 3 x forward FLOPs x 2 / peak of {self.peak[0] / 1e12:.3g}e12 per second ({self.peak[1]})",
            f"output: {folder}",
        ):
            reporter.line(line)

    def _epoch(self, epoch: int, folder: Path | None, reporter: Reporter | None) -> None:
        s, start = self.settings, time.perf_counter()
        # One random stream per epoch and process: it does not depend on where the run was resumed.
        stream = np.random.SeedSequence((s.seed, epoch, self.process.rank))
        torch.manual_seed(int(stream.generate_state(1)[0]))
        train_loss, images_per_second, data_wait = self._train_epoch(epoch, reporter)
        if s.precise_bn:
            batches = islice(
                self.train_loader, max(1, s.precise_bn // (s.batch_size * self.process.world_size))
            )
            precise_batch_norm(self.evaluated, batches, dtype=self.dtype)
        for model in dict.fromkeys((self.model, self.evaluated)):  # in the same order on every process
            self.process.average_buffers(model)
        accuracy = self.evaluate(self.val_loader)
        is_best = accuracy.top1 > self.best
        self.best = max(self.best, accuracy.top1)
        if reporter is None or folder is None:
            return
        self._save(epoch, folder, accuracy, is_best)
        row = EpochRow(
            epoch=epoch + 1,
            train_loss=train_loss,
            val_loss=accuracy.loss,
            val_top1=accuracy.top1,
            val_top5=accuracy.top5,
            lr=self.optimizer.param_groups[0]["lr"],
            images_per_second=images_per_second,
            data_wait=data_wait,
            mfu=self._mfu(images_per_second),
            seconds=time.perf_counter() - start,
        )
        reporter.end_epoch(
            row,
            (epoch + 1) * self.steps,
            f"epoch {row.epoch}/{s.epochs}: loss {row.train_loss:.4f}, validation loss {row.val_loss:.4f}, "
            f"top-1 {row.val_top1:.2f}%, top-5 {row.val_top5:.2f}% of {accuracy.images}, "
            f"{row.images_per_second:,.0f} images/s, data wait {row.data_wait:.0%}, MFU {row.mfu:.1%}, "
            f"{row.seconds:.1f} s",
        )
        graphs = compiled_graphs()
        if epoch > self.first_epoch and graphs > self._graphs:
            reporter.line(f"warning: {graphs - self._graphs} graphs were compiled anew in epoch {row.epoch}")
        self._graphs = graphs

    def _train_epoch(self, epoch: int, reporter: Reporter | None) -> tuple[float, float, float]:
        """(mean loss, images per second, share of time spent waiting for data) of one epoch."""
        s, meter = self.settings, Meter(self.images_per_step, self.process)
        self.train_loader.set_epoch(epoch)
        if reporter is not None:
            reporter.start_epoch(epoch + 1, s.epochs, self.steps)
        batches = iter(self.train_loader)
        for step in range(self.steps):
            done = epoch * self.steps + step
            with meter.waiting():
                group = [
                    (images, labels, self._mix(done * s.grad_accum_steps + i))
                    for i, (images, labels) in enumerate(islice(batches, s.grad_accum_steps))
                ]
            lr = self.schedule.at(done / self.steps)
            set_learning_rate(self.optimizer, lr)
            meter.add(self.step(group))
            if self.ema is not None:
                self.ema.update(done)
            if reporter is not None:
                reporter.step()
            if done == self.first_epoch * self.steps:
                seconds = meter.restart()
                if reporter is not None:
                    reporter.line(f"first step, compilation included: {seconds:.1f} s")
            elif (step + 1) % s.log_every == 0 and step + 1 < self.steps:
                loss = self._finite(meter.mean_loss(), epoch)
                rate, wait = meter.rates()
                if reporter is not None:
                    text = (
                        f"  step {step + 1}/{self.steps}: loss {loss:.4f}, learning rate {lr:.2e}, "
                        f"{rate:,.0f} images/s, data wait {wait:.0%}, MFU {self._mfu(rate):.1%}"
                    )
                    reporter.point(done + 1, text, loss=loss, lr=lr, images_per_second=rate)
        return self._finite(meter.mean_loss(), epoch), *meter.rates()

    def _mix(self, batch: int) -> Tensor | None:
        if not self.mixing.enabled:
            return None
        mix = self.mixing.sample(self.model.config.image_size, (self.settings.seed, self.process.rank, batch))
        return mix.to(self.process.device, non_blocking=True)

    def _finite(self, loss: float, epoch: int) -> float:
        if not math.isfinite(loss):
            raise FastvitcError(
                f"the training loss became {loss} in epoch {epoch + 1}; what was saved is that of the epochs before. "
                "Lower --lr, lengthen --warmup-epochs or set --clip-grad"
            )
        return loss

    def _save(self, epoch: int, folder: Path, accuracy: Accuracy, is_best: bool) -> None:
        s = self.settings
        notes = {
            "name": s.model,
            "classes": list(self.classes),
            "preprocessing": {
                "mean": IMAGENET_MEAN,
                "std": IMAGENET_STD,
                "crop_ratio": s.crop_ratio,
            },
            "backends": self.backends,
            "epoch": epoch + 1,
            "val_top1": accuracy.top1,
            "versions": versions(),
        }
        save_model(folder / "last", self.evaluated, **notes)
        if is_best:
            save_model(folder / "best", self.evaluated, **notes)
        save_state(
            folder / "last" / STATE,
            {
                "epoch": epoch + 1,
                "best": self.best,
                "model": self.model.state_dict(),
                "ema": None if self.ema is None else self.ema.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "settings": s.to_dict(),
                "classes": list(self.classes),
                "world_size": self.process.world_size,
                "backends": self.backends,
            },
        )


def start(settings: TrainSettings, process: Process, train: ImageIndex, val: ImageIndex) -> Run:
    """A run from its settings, continued where they name one to resume."""
    state = load_state(Path(settings.resume)) if settings.resume else None
    return Run(settings, process, train, val, state)
