"""The whole model: one training step (forward, loss, backward, AdamW), and inference."""

from functools import partial

import torch

from bench.contest import Candidate, Contest
from bench.models import image_batch, models, trained_like
from bench.runtimes import runtimes
from fastvitc import complexity, optimize_for_inference
from fastvitc.training.optim import create_optimizers
from fastvitc.training.process import Process
from fastvitc.training.step import Objective, TrainStep, input_of


def _labels(config, batch_size, device):
    return torch.arange(batch_size, device=device) % config.num_classes


def _loss_and_gradient_norm(objective, images, labels):
    loss = objective(images, labels, None)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    return loss.detach(), torch.linalg.vector_norm(torch.stack([g.float().norm() for g in gradients]))


def _truth_of_training(config, batch_size, device):
    model = trained_like(config, backend="reference").to(device)
    objective = Objective(model, dtype=torch.float32, label_smoothing=0.1).to(device)
    images = image_batch(config, batch_size, device)
    return _loss_and_gradient_norm(objective, images, _labels(config, batch_size, device))


def training_step(build, config, batch_size, device, dtype, compile):
    model = build(config).to(device, memory_format=torch.channels_last)
    images, labels = image_batch(config, batch_size, device), _labels(config, batch_size, device)
    optimizers = create_optimizers(model, "adamw", lr=1e-6, weight_decay=0.0)
    step = TrainStep(
        model, optimizers, Process(0, 1, device), dtype=dtype, label_smoothing=0.1, compile=compile
    )
    return Candidate(
        run=lambda: step([(images, labels, None)]),
        tensors=lambda: _loss_and_gradient_norm(step.objective, images, labels),
    )


def _logits(model, prepare, dtype, images):
    with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return model(prepare(images))


def _truth_of_inference(config, batch_size, device):
    model = trained_like(config, backend="reference").to(device).eval()
    return [_logits(model, input_of(model), torch.float32, image_batch(config, batch_size, device))]


def _inference(build, config, batch_size, device, dtype, compile):
    model = build(config).to(device, memory_format=torch.channels_last).eval()
    run = torch.compile(_logits, fullgraph=True, dynamic=False) if compile else _logits
    prepare, images = input_of(model).to(device), image_batch(config, batch_size, device)
    return Candidate(
        run=lambda: run(model, prepare, dtype, images),
        tensors=lambda: [run(model, prepare, dtype, images)],
    )


def _optimized(config, images, dtype):
    return optimize_for_inference(trained_like(config).to(images.device), dtype=dtype)


def _deployed(build, config, batch_size, device, dtype):
    images = image_batch(config, batch_size, device)
    run = build(config, images, dtype)
    return Candidate(run=lambda: run(images), tensors=lambda: [run(images)])


def _eager_and_compiled(build, config, batch_size, device, dtype):
    return {
        f"{library}{' compiled' if compile else ''}": partial(
            build, model, config, batch_size, device, dtype, compile
        )
        for library, model in models(device).items()
        for compile in (False, True)
    }


def model_contests(name, config, batch_size, device, dtype):
    forward = 2 * complexity(config).flops * batch_size
    args = (config, batch_size, device)
    figures = {"images": batch_size, "tolerance": 5e-2}
    yield Contest(
        f"training step, {name}, batch {batch_size}",
        partial(_truth_of_training, *args),
        _eager_and_compiled(training_step, *args, dtype),
        flops=3 * forward,
        **figures,
    )
    deployed = {"fastvitc optimized": _optimized, **runtimes(device)}
    yield Contest(
        f"inference, {name}, batch {batch_size}",
        partial(_truth_of_inference, *args),
        _eager_and_compiled(_inference, *args, dtype)
        | {title: partial(_deployed, build, *args, dtype) for title, build in deployed.items()},
        flops=forward,
        **figures,
    )


def contests(scale, device, dtype):
    return [
        contest
        for name, config in scale.models.items()
        for contest in model_contests(name, config, scale.batch_size, device, dtype)
    ]


def test_model(entry, timed):
    timed(entry)
