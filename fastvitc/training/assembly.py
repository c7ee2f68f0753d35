"""Puts a run together from its settings: data, model, optimisers, step and evaluation. Nothing is written here."""

from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from fastvitc.data import Augment, ImageIndex, Loader, LoaderConfig, create_loader
from fastvitc.errors import UsageError
from fastvitc.kernels import chosen
from fastvitc.models.saved import load_weights
from fastvitc.models.vit import VisionTransformer, create_model
from fastvitc.training.evaluation import Evaluator
from fastvitc.training.mix import Mix
from fastvitc.training.optim import ModelEma, Schedule, create_optimizers, paper_ema_rate
from fastvitc.training.process import Process
from fastvitc.training.settings import TrainSettings
from fastvitc.training.state import RunState
from fastvitc.training.step import TrainStep
from fastvitc.tuning.machine import PRECISIONS, autocast


@dataclass(frozen=True)
class Parts:
    """What a run is made of.

    `steps` are those of an epoch, `images_per_step` those of all processes. `backends` says what each op runs on.
    """

    settings: TrainSettings
    process: Process
    classes: tuple[str, ...]
    dtype: torch.dtype
    backends: dict[str, str]
    model: VisionTransformer
    ema: ModelEma | None
    train_loader: Loader
    val_loader: Loader
    steps: int
    images_per_step: int
    optimizers: list[Optimizer]
    schedule: Schedule
    mixing: Mix
    step: TrainStep
    evaluate: Evaluator

    @property
    def evaluated(self) -> VisionTransformer:
        """The model that is evaluated and saved: the average where one is kept."""
        return self.model if self.ema is None else self.ema.model

    def close(self) -> None:
        """Release the loaders' processes and threads."""
        self.train_loader.close()
        self.val_loader.close()


def assemble(
    settings: TrainSettings,
    process: Process,
    train: ImageIndex,
    val: ImageIndex,
    state: RunState | None = None,
) -> Parts:
    """The parts of a run; with a state those of a run that goes on from there.

    Raises:
        UsageError: settings that do not fit the data, the machine or the state.
        CheckpointError: the state's weights do not fit the model.
    """
    s, dtype = settings, PRECISIONS[settings.machine.precision]
    backends = chosen(process.device, s.model.backend, dtype)
    if state is not None:
        state.check_fits(s, list(train.classes), process.world_size)
    torch.manual_seed(s.machine.seed)
    model = create_model(
        s.model.model,
        num_classes=len(train.classes),
        image_size=s.data.size(),
        pool=s.model.pool,
        drop_path=s.model.drop_path,
        backend=backends,
        grad_checkpointing=s.model.grad_checkpointing,
    ).to(process.device, memory_format=torch.channels_last)
    if s.machine.compile:
        _try_ops(model, process.device, dtype)
    train_loader, val_loader = (
        _loader(s, process, model, index, training) for index, training in ((train, True), (val, False))
    )
    o = s.optimisation
    steps = len(train_loader) // o.grad_accum_steps
    if steps == 0:
        raise UsageError(
            f"an epoch has {len(train_loader)} batches per process, fewer than the "
            f"{o.grad_accum_steps} of --grad-accum-steps; lower it or --batch-size"
        )
    images_per_step = o.batch_size * o.grad_accum_steps * process.world_size
    optimizers = create_optimizers(model, o.opt, lr=o.lr, weight_decay=o.weight_decay)
    ema = _ema(s, model, steps, images_per_step) if o.model_ema else None
    if state is not None:
        _restore(state, model, ema, optimizers)
    return Parts(
        settings=s,
        process=process,
        classes=train.classes,
        dtype=dtype,
        backends=backends,
        model=model,
        ema=ema,
        train_loader=train_loader,
        val_loader=val_loader,
        steps=steps,
        images_per_step=images_per_step,
        optimizers=optimizers,
        schedule=Schedule(o.epochs, o.warmup_epochs),
        mixing=Mix(o.mixup, o.cutmix),
        step=TrainStep(
            model,
            optimizers,
            process,
            dtype=dtype,
            label_smoothing=o.smoothing,
            accumulate=o.grad_accum_steps,
            clip_grad=o.clip_grad,
            compile=s.machine.compile,
        ),
        evaluate=Evaluator(
            model if ema is None else ema.model,
            process,
            dtype=dtype,
            batch_size=o.batch_size,
            compile=s.machine.compile,
        ),
    )


def _try_ops(model: VisionTransformer, device: torch.device, dtype: torch.dtype) -> None:
    """One image outside torch.compile, which would wrap a backend's refusal of it in an error of its own."""
    config = model.config
    image = torch.zeros(1, config.in_chans, *config.image_size, device=device)
    with autocast(device, dtype):
        model.eval()(image.contiguous(memory_format=torch.channels_last))
    model.train()


def _loader(
    settings: TrainSettings, process: Process, model: VisionTransformer, index: ImageIndex, training: bool
) -> Loader:
    data = settings.data
    config = LoaderConfig(
        index,
        training=training,
        batch_size=settings.optimisation.batch_size,
        image_size=model.config.image_size,
        augment=Augment(data.crop_scale, data.crop_aspect, data.hflip, data.augment),
        crop_ratio=data.crop_ratio,
        device=process.device,
        seed=settings.machine.seed,
        rank=process.rank,
        world_size=process.world_size,
        workers=data.workers,
    )
    return create_loader(data.loader, config)


def _ema(settings: TrainSettings, model: VisionTransformer, steps: int, images_per_step: int) -> ModelEma:
    o = settings.optimisation
    rate = o.model_ema_rate
    if rate is None and (o.recipe or "").startswith("paper"):
        rate = paper_ema_rate(images_per_step, o.epochs, o.model_ema_every)
    elif rate is None:
        rate = 1.0 - 0.5 ** (o.model_ema_every / steps)
    return ModelEma(model, rate=rate, every=o.model_ema_every, warmup_steps=int(o.warmup_epochs * steps))


def _restore(
    state: RunState, model: VisionTransformer, ema: ModelEma | None, optimizers: list[Optimizer]
) -> None:
    load_weights(model, state.model)
    if ema is not None:
        load_weights(ema.model, state.ema or state.model)
    for optimizer, saved in zip(optimizers, state.optimizers, strict=True):
        optimizer.load_state_dict(saved)
