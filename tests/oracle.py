"""The error rule: against float64 on the same quantised inputs, an op errs at most twice as much as PyTorch's own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[..., Sequence[Tensor] | Tensor]


def outputs_and_gradients(
    run: Run, inputs: Sequence[Tensor], grads: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The outputs of `run(*inputs)` and the gradients of all floating inputs for output gradients `grads`."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = run(*leaves)
    outs = [out] if isinstance(out, Tensor) else list(out)
    grads = (
        [torch.ones_like(o) for o in outs]
        if grads is None
        else [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]
    )
    return [o.detach() for o in outs] + list(torch.autograd.grad(outs, leaves, grads))


def assert_no_worse_than_library(
    ours: Run,
    library: Run,
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    *,
    roundings: int = 1,
    terms: int = 16,
) -> None:
    """Largest and mean error of outputs and gradients of `ours` within twice those of `library`, plus
    `roundings` of each value in its dtype and those of a float32 sum of `terms` terms."""
    exact = outputs_and_gradients(library, [t.double() for t in inputs], grads)
    mine = outputs_and_gradients(ours, inputs, grads)
    theirs = outputs_and_gradients(library, inputs, grads)
    for i, (e, m, t) in enumerate(zip(exact, mine, theirs, strict=True)):
        assert m.shape == e.shape
        assert m.dtype == t.dtype
        rounding = roundings * torch.finfo(m.dtype).eps * e.abs()
        rounding += terms**0.5 * torch.finfo(torch.float32).eps * e.abs().max()
        for measure in (torch.max, torch.mean):
            allowed = 2 * measure((t.double() - e).abs()) + measure(rounding)
            found = measure((m.double() - e).abs())
            assert found <= allowed, f"tensor {i}: {measure.__name__} error {found:.3e} > {allowed:.3e}"


def assert_same_bits_on_one_thread_and_two(results: Callable[[], Sequence[Tensor]]) -> None:
    """`results` gives the same tensors again, and with another number of threads."""
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            found.append(results())
    finally:
        torch.set_num_threads(before)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
