"""Backends of an op side by side: checked against the reference, then timed in alternation as training runs them."""

import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

import torch
from torch import Tensor

from fastvitc.errors import FastvitcError
from fastvitc.kernels import attention
from fastvitc.models.config import ViTConfig
from fastvitc.tuning.clock import seconds

#: Forward and backward: the output and the gradients.
Call = Callable[[], Sequence[Tensor]]

#: A backend may err twice as much as PyTorch's own ops do in the same dtype, or so much of a tensor's norm.
TOLERANCE = 1e-2
#: A pass repeats a call for at least so long: far over the clock's and the launches' noise.
_PASS_SECONDS = 0.02


@dataclass(frozen=True)
class Setting:
    """What the ops are measured on: a model's shapes with a batch, the dtype of autocast (float32: none), the device.

    `model` is the name of `config`.
    """

    model: str
    config: ViTConfig
    batch_size: int
    dtype: torch.dtype
    device: torch.device
    compile: bool


@dataclass(frozen=True)
class Result:
    """Of one backend: median time of forward and backward, or why there is none.

    `error` is the worst tensor's, in the Euclidean norm, relative to the float32 reference.
    """

    backend: str
    milliseconds: float | None = None
    error: float | None = None
    reason: str | None = None


def attention_call(setting: Setting, backend: str) -> Call:
    """`attention` on the packed projection of one block."""
    config, device = setting.config, setting.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        qkv = torch.randn(setting.batch_size, config.tokens, 3 * config.width).to(setting.dtype)
        grad = torch.randn(setting.batch_size, config.tokens, config.width).to(setting.dtype)
    dtype = torch.float32 if backend == "reference" else setting.dtype
    qkv, grad = qkv.to(device, dtype).requires_grad_(), grad.to(device, dtype)

    def run(qkv: Tensor) -> Tensor:
        return attention(qkv, config.heads, backend=backend)

    return _call(run, [qkv], [qkv], grad, setting.compile and backend != "reference")


def conv_stem_call(setting: Setting, backend: str) -> Call:
    """The stem's module on images and a mix as the trainer feeds them, a class token and positions."""
    config, device = setting.config, setting.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = config.stem.build(config.in_chans, backend=backend)
        size = setting.batch_size, config.in_chans, *config.image_size
        image = torch.randint(256, size, dtype=torch.uint8) if config.in_chans == 3 else torch.randn(size)
        class_token, pos_embed = (torch.randn(1, rows, config.width) for rows in (1, config.tokens))
        grad = torch.randn(setting.batch_size, config.tokens, config.width).to(device)
    stem = stem.to(device, memory_format=torch.channels_last).train()
    image = image.to(device, memory_format=torch.channels_last)
    mix = torch.tensor([0.5, 0, config.image_size[0], 0, config.image_size[1]], device=device)
    pos_embed, class_token = pos_embed.to(device).requires_grad_(), class_token.to(device).requires_grad_()
    leaves = [pos_embed, class_token] if config.pool == "token" else [pos_embed]
    narrow = setting.dtype != torch.float32 and backend != "reference"

    def run(image: Tensor, mix: Tensor, pos_embed: Tensor, class_token: Tensor | None = None) -> Tensor:
        with torch.autocast(device.type, setting.dtype, enabled=narrow):
            return stem(image, class_token, pos_embed, mix)

    inputs = [image, mix, *leaves]
    return _call(run, inputs, [*leaves, *stem.parameters()], grad, setting.compile and backend != "reference")


#: The ops that a model calls, each as a function of the setting and a backend.
CALLS: Mapping[str, Callable[[Setting, str], Call]] = {
    "attention": attention_call,
    "conv_stem": conv_stem_call,
}


def _call(
    run: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    grad: Tensor,
    compile: bool,
) -> Call:
    forward = torch.compile(run, fullgraph=True, dynamic=False) if compile else run

    def call() -> list[Tensor]:
        out = forward(*inputs)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return call


def compare(setting: Setting, op: str, backends: Sequence[str], rounds: int) -> list[Result]:
    """Results in the order of `backends`; one that raises, or errs more than TOLERANCE allows, is not timed.

    Raises:
        FastvitcError: what they are checked against cannot run.
    """
    build = CALLS[op]
    try:
        truth = [tensor.double() for tensor in build(setting, "reference")()]
        own = _errors(truth, build(replace(setting, compile=False), "torch")())
    except RuntimeError as error:
        raise FastvitcError(
            f"{op}: what the backends are checked against failed at batch {setting.batch_size}: {_line(error)}; "
            "take a smaller --batch-size"
        ) from error
    results = {backend: Result(backend) for backend in backends}
    calls: dict[str, Call] = {}
    for backend in backends:
        try:
            calls[backend] = build(setting, backend)
            errors = _errors(truth, calls[backend]())
            results[backend] = Result(backend, error=max(errors), reason=_objection(errors, own))
            if results[backend].reason is not None:
                del calls[backend]
        except Exception as failure:  # a compiler or a driver may raise anything
            calls.pop(backend, None)
            results[backend] = Result(backend, reason=_line(failure))
    del truth
    try:
        times = _time(calls, setting.device, rounds)
    except RuntimeError as error:
        raise FastvitcError(
            f"{op}: timing failed at batch {setting.batch_size}: {_line(error)}; take a smaller --batch-size"
        ) from error
    for backend, duration in times.items():
        results[backend] = Result(backend, milliseconds=1e3 * duration, error=results[backend].error)
    torch.compiler.reset()
    return list(results.values())


def _errors(truth: Sequence[Tensor], found: Sequence[Tensor]) -> list[float]:
    """Of each tensor; infinite where it holds one that is not finite."""
    pairs = zip(truth, found, strict=True)
    errors = [((f.double() - t).norm() / t.norm().clamp(min=1e-30)).item() for t, f in pairs]
    return [error if isfinite(error) else inf for error in errors]


def _objection(errors: Sequence[float], own: Sequence[float]) -> str | None:
    """Why a backend with such errors is wrong, None when it is not; `own` are those of PyTorch's ops."""
    for i, (error, yardstick) in enumerate(zip(errors, own, strict=True)):
        allowed = max(2 * yardstick, TOLERANCE)
        if not error <= allowed:
            tensor = "the output" if i == 0 else f"gradient {i}"
            return f"{tensor} is off by {error:.1e} of the reference's norm, allowed are {allowed:.1e}"
    return None


def _line(error: BaseException) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)


def _time(calls: Mapping[str, Call], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each call; passes alternate, so that a drift of the machine meets all."""
    repeats = {}
    for name, call in calls.items():
        seconds(call, device, 1)  # the first after the check may still grow the allocator's pool
        repeats[name] = max(1, round(_PASS_SECONDS / seconds(call, device, 1)))
    passes: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            passes[name].append(seconds(call, device, repeats[name]))
    return {name: statistics.median(times) for name, times in passes.items()}
