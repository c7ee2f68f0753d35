"""Puts a run together from its settings: data, model, optimisers, step and evaluation. Nothing is written here."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastvitc import convert
from fastvitc.data import Augment, ImageIndex, Loader, LoaderConfig, create_loader
from fastvitc.errors import UsageError
from fastvitc.kernels import chosen
from fastvitc.models.config import as_size, check_image_size, preset
from fastvitc.models.saved import WEIGHTS, begin_with, load_weights, model_folder
from fastvitc.models.vit import VisionTransformer, create_model
from fastvitc.training.compilation import Compilation, mark_of, seconds_of_a_pass, where_it_pays
from fastvitc.training.erase import Erasing
from fastvitc.training.evaluation import Evaluator
from fastvitc.training.mix import Mixing
from fastvitc.training.optim import ModelEma, create_optimizers, paper_ema_rate
from fastvitc.training.process import Process
from fastvitc.training.schedule import Curriculum, Schedule
from fastvitc.training.settings import TrainSettings
from fastvitc.training.state import RunState, on_host
from fastvitc.training.step import Objective, TrainStep
from fastvitc.tuning.machine import PRECISIONS, autocast, can_compile


@dataclass(frozen=True)
class Parts:
    """What a run is made of.

    `steps` are those of an epoch, `images_per_step` those of all processes. `backends` says what each op runs on.
    `compilation` is whether they are compiled, and why; the settings say the same.
    `data` is a digest of what decides which images come in which order and how they look. `new_head` says of a run that
    begins with given weights whether it has a head of its own.
    """

    settings: TrainSettings
    process: Process
    classes: tuple[str, ...]
    dtype: torch.dtype
    backends: dict[str, str]
    compilation: Compilation
    model: VisionTransformer
    ema: ModelEma | None
    train_loader: Loader
    val_loader: Loader
    steps: int
    images_per_step: int
    optimizers: list[Optimizer]
    schedule: Schedule
    curriculum: Curriculum
    mixing: Mixing
    erasing: Erasing
    step: TrainStep
    evaluate: Evaluator
    data: str
    new_head: bool | None

    @property
    def evaluated(self) -> VisionTransformer:
        """The model that is evaluated and saved: the average where one is kept."""
        return self.model if self.ema is None else self.ema.model

    def own_state(self) -> dict[str, Any]:
        """What is this process's own: the running statistics of its batches, and the loss's scale, on the host."""
        statistics = on_host([list(pair) for pair in self._statistics()])
        return {"statistics": statistics, "scaler": self.step.scaler.state_dict()}

    def restore(self, state: RunState) -> None:
        """Take over a state's weights, averages and optimisers, and what is this process's own.

        Raises:
            CheckpointError: the weights do not fit the model.
        """
        load_weights(self.model, state.model)
        if self.ema is not None:
            load_weights(self.ema.model, state.ema or state.model)
        for optimizer, saved in zip(self.optimizers, state.optimizers, strict=True):
            optimizer.load_state_dict(saved)
        own = state.processes[self.process.rank]
        for pair, values in zip(self._statistics(), own["statistics"], strict=True):
            for tensor, value in zip(pair, values, strict=True):
                tensor.copy_(value)
        self.step.scaler.load_state_dict(own.get("scaler", {}))

    def _statistics(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (norm.running_mean, norm.running_var)
            for model in dict.fromkeys((self.model, self.evaluated))
            for norm in model.modules()
            if isinstance(norm, nn.modules.batchnorm._BatchNorm)
        ]

    def begin_epoch(self, epoch: int) -> None:
        """Give the training images of an epoch their size, and the model what it takes of them."""
        progress = self.schedule.progress(epoch)
        size = self.curriculum.size_at(progress)
        self.train_loader.resize(size)
        self.model.image_size = size
        self.model.patch_drop = self.curriculum.patch_drop_at(progress)

    def changes_at(self, epoch: int) -> bool:
        """Whether the model meets other shapes than in the epoch before."""
        before, now = self.schedule.progress(epoch - 1), self.schedule.progress(epoch)
        c = self.curriculum
        return (c.size_at(before), c.patch_drop_at(before)) != (c.size_at(now), c.patch_drop_at(now))

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
    """The parts of a run; with a state those of a run that can go on from there, by `Parts.restore`.

    Raises:
        UsageError: settings that do not fit the data, the machine or the state.
    """
    s, dtype = settings, PRECISIONS[settings.machine.precision]
    sharing = shares_statistics(s, process)
    backends = chosen(process.device, s.model.backend, dtype, sharing=sharing)
    if state is not None:
        _check_fits(state, s, list(train.classes), process.world_size)
    torch.manual_seed(s.machine.seed)
    model = create_model(
        s.model.model,
        num_classes=len(train.classes),
        image_size=s.data.size(),
        in_chans=s.model.in_chans,
        mean=s.data.mean,
        std=s.data.std,
        pool=s.model.pool,
        drop_path=s.model.drop_path,
        backend=backends,
        grad_checkpointing=s.model.grad_checkpointing,
        init=s.model.init,
    ).to(process.device, memory_format=torch.channels_last)
    new_head = None
    if s.model.initial_checkpoint is not None and state is None:
        new_head = begin_with(model, _initial_weights(Path(s.model.initial_checkpoint)))
    if s.model.freeze_stem:
        model.stem.freeze()
    train_loader, val_loader = (
        loader_of(s, process, index, training) for index, training in ((train, True), (val, False))
    )
    o = s.optimisation
    steps = len(train_loader) // o.grad_accum_steps
    if steps == 0:
        raise UsageError(
            f"an epoch has {len(train_loader)} batches per process, fewer than the "
            f"{o.grad_accum_steps} of --grad-accum-steps; lower it or --batch-size"
        )
    images_per_step = o.batch_size * o.grad_accum_steps * process.world_size
    optimizers = create_optimizers(
        model,
        o.opt,
        lr=o.lr,
        weight_decay=o.weight_decay,
        layer_decay=o.layer_decay,
        betas=o.opt_betas,
        eps=o.opt_eps,
        momentum=o.momentum,
    )
    ema = _ema(s, model, steps, images_per_step) if o.model_ema else None
    data = _data_digest(train, val, train_loader, s, process.world_size)
    schedule = _schedule(s)
    if state is not None:
        if state.data != data and not s.run.resume_anyway:
            raise UsageError(
                "the images or the loader are not those that the run began with, so it cannot go on exactly. "
                "Give it the same, or add --resume-anyway to go on from the start of its epoch"
            )
        (_, first), *changes = state.lengths
        now = state.epoch + (state.step / steps if state.data == data else 0.0)
        schedule = replace(schedule, epochs=first, changes=tuple((a, b) for a, b in changes))
        schedule = schedule.to_last(o.epochs, now)
    curriculum = _curriculum(s, model)
    compilation = _compilation(s, process, model, curriculum, steps)
    s = s.changed(compile=compilation.compile)
    if compilation.compile:
        _try_ops(model, process.device, dtype)
    step = TrainStep(
        model,
        optimizers,
        process,
        dtype=dtype,
        label_smoothing=o.smoothing,
        bce=o.bce_loss,
        accumulate=o.grad_accum_steps,
        clip_grad=o.clip_grad,
        compile=compilation.compile,
    )
    if sharing:  # in place, and only now: DistributedDataParallel refuses such layers on a CPU
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return Parts(
        settings=s,
        process=process,
        classes=train.classes,
        dtype=dtype,
        backends=backends,
        compilation=compilation,
        model=model,
        ema=ema,
        train_loader=train_loader,
        val_loader=val_loader,
        steps=steps,
        images_per_step=images_per_step,
        optimizers=optimizers,
        schedule=schedule,
        curriculum=curriculum,
        mixing=Mixing(o.mixup, o.cutmix, o.mixup_prob),
        erasing=Erasing(s.data.reprob),
        step=step,
        evaluate=Evaluator(
            model if ema is None else ema.model,
            process,
            dtype=dtype,
            batch_size=validation_batch(s),
            compile=compilation.compile,
        ),
        data=data,
        new_head=new_head,
    )


def _schedule(settings: TrainSettings) -> Schedule:
    o = settings.optimisation
    return Schedule(
        o.epochs,
        o.warmup_epochs,
        0.1 if o.warmup_lr is None else o.warmup_lr / o.lr,
        0.005 if o.min_lr is None else o.min_lr / o.lr,
        o.sched,
        o.decay_share,
        o.cooldown_epochs,
    )


def _curriculum(settings: TrainSettings, model: VisionTransformer) -> Curriculum:
    data, m = settings.data, settings.model
    low_res = None if data.low_res is None else as_size(data.low_res)
    if low_res is not None:
        check_image_size(low_res, model.config.stem.stride)
    return Curriculum(model.config.image_size, low_res, data.low_res_until, m.patch_drop, m.patch_drop_until)


def _compilation(
    settings: TrainSettings, process: Process, model: VisionTransformer, curriculum: Curriculum, steps: int
) -> Compilation:
    """Whether a run is compiled, equal on all processes: as asked, else where it pays."""
    s, asked, o = settings, settings.machine.compile, settings.optimisation
    kind = (
        model.config,
        o.batch_size,
        validation_batch(s),
        s.machine.precision,
        process.device.type,
        curriculum,
    )
    mark = mark_of(*kind, s.model.grad_checkpointing, o.mixup > 0 or o.cutmix > 0, o.bce_loss, o.smoothing)
    if asked is not None:
        return Compilation(asked, "as the settings say", mark)
    if not can_compile():
        return Compilation(False, "torch.compile needs a C++ compiler and Python's headers on a CPU")

    def choose() -> Compilation:
        height, width = model.config.image_size
        shape = o.batch_size, height, width, s.model.in_chans
        images = torch.randint(256, shape, dtype=torch.uint8).permute(0, 3, 1, 2)
        labels = torch.zeros(o.batch_size, dtype=torch.int64)
        objective = Objective(model.train(), dtype=PRECISIONS[s.machine.precision])
        batch = images.to(process.device), labels.to(process.device), None
        passes = curriculum.cost() * steps * o.grad_accum_steps * o.epochs
        return where_it_pays(
            process.device, passes * seconds_of_a_pass(objective, batch), curriculum.shapes(), mark
        )

    return process.share(process.agree(choose))


def _initial_weights(path: Path) -> dict[str, Tensor]:
    return convert.load(model_folder(path) / WEIGHTS if path.is_dir() else path)


def shares_statistics(settings: TrainSettings, process: Process) -> bool:
    """Whether the run's BatchNorm statistics are of all processes together."""
    return settings.optimisation.sync_bn and process.world_size > 1


def _check_fits(state: RunState, settings: TrainSettings, classes: list[str], world_size: int) -> None:
    """Raise UsageError where a run of these settings, classes and processes cannot go on from a state."""
    for what, then, now in (
        ("classes", state.classes, classes),
        ("number of processes", len(state.processes), world_size),
    ):
        if then != now:
            raise UsageError(
                f"a resumed run keeps its {what}: it was {then}, now {now}. Start another run instead"
            )
    if state.epoch >= settings.optimisation.epochs:
        raise UsageError(
            f"the run at {settings.run.resume} has finished its {state.epoch} epochs; ask for more with --epochs"
        )


def _data_digest(
    train: ImageIndex, val: ImageIndex, loader: Loader, settings: TrainSettings, world_size: int
) -> str:
    parts = train.digest, val.digest, loader.version(), loader.config.augment, loader.config.image_size
    order = settings.machine.seed, settings.optimisation.batch_size, world_size
    return hashlib.sha256(repr((parts, order)).encode()).hexdigest()


def _try_ops(model: VisionTransformer, device: torch.device, dtype: torch.dtype) -> None:
    """One image outside torch.compile, which would wrap a backend's refusal of it in an error of its own."""
    config = model.config
    image = torch.zeros(1, config.in_chans, *config.image_size, device=device)
    with autocast(device, dtype):
        model.eval()(image.contiguous(memory_format=torch.channels_last))
    model.train()


def validation_batch(settings: TrainSettings) -> int:
    """Images of a validation batch in each process."""
    o = settings.optimisation
    return o.batch_size if o.validation_batch_size is None else o.validation_batch_size


def loader_of(settings: TrainSettings, process: Process, index: ImageIndex, training: bool) -> Loader:
    """The loader of the training or validation images."""
    data = settings.data
    config = LoaderConfig(
        index,
        training=training,
        batch_size=settings.optimisation.batch_size if training else validation_batch(settings),
        image_size=data.size() or preset(settings.model.model).image_size,
        channels=settings.model.in_chans,
        interpolation=data.interpolation,
        augment=Augment(data.crop_scale, data.crop_aspect, data.hflip, data.augment, data.color_jitter),
        crop_ratio=data.crop_ratio,
        device=process.device,
        seed=settings.machine.seed,
        rank=process.rank,
        world_size=process.world_size,
        workers=data.workers,
        bad_share=data.bad_share,
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
