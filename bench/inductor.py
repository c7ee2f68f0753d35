"""Counts what inductor's compiled code moves, by inductor's own account of each kernel; nothing is compiled to code.

Inductor counts each buffer that a scheduled kernel reads or writes once per kernel. Without a GPU that is the schedule
for the CPU; the one choice of the CPU's that moves more bytes, concatenations apart from what uses them, is turned off.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._functorch import config as aot_config
from torch._inductor import config as inductor_config
from torch._inductor.fx_utils import count_flops_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import NoneAsConstantBuffer

from bench.counting import Count, Kernel, training_counts


def _origins(node) -> set[torch.fx.Node]:
    """The operations that a scheduled kernel computes."""
    return {origin for n in node.get_nodes() if n.node is not None for origin in n.node.origins}


def _kernels(graph: GraphLowering) -> Iterator[Kernel]:
    """Each scheduled kernel that moves bytes; the FLOPs of an operation count in the library call that runs it."""
    for node in graph.scheduler.nodes:
        moved = node.get_read_write_buffers_sizes()
        if not moved:
            continue
        origins = sorted(_origins(node), key=str)
        flops = sum(count_flops_fx(origin) or 0 for origin in origins) if node.is_extern() else 0
        yield Kernel(f"inductor {' '.join(sorted({str(o.target) for o in origins}))}", moved, float(flops))


def _outputs(graph: GraphLowering, inputs: list[object]) -> list[object]:
    """Uninitialised tensors of the graph's outputs; an output that is an input is that input."""
    by_name = dict(zip(graph.graph_input_names, inputs, strict=True))
    found: list[object] = []
    for output in graph.graph_outputs:
        if isinstance(output, NoneAsConstantBuffer):
            found.append(None)
        elif output.get_name() in by_name:
            found.append(by_name[output.get_name()])
        else:
            size, stride = ([int(n) for n in ns] for ns in (output.get_size(), output.get_stride()))
            found.append(torch.empty_strided(size, stride, dtype=output.get_dtype()))
    return found


@contextmanager
def _scheduled_only(forward: list[Kernel], backward: list[Kernel]) -> Iterator[None]:
    """Let inductor stop after scheduling: kernels are counted, and calls return uninitialised memory."""

    def count(graph: GraphLowering) -> SimpleNamespace:
        graph.init_wrapper_code()
        graph._update_scheduler()
        (backward if graph.is_backward else forward).extend(_kernels(graph))
        return SimpleNamespace(call=lambda inputs: _outputs(graph, inputs), runner=None)

    with (
        patch.object(GraphLowering, "compile_to_module", count),
        inductor_config.patch(fx_graph_cache=False, force_pointwise_cat=True),
        aot_config.patch(enable_autograd_cache=False),
    ):
        yield


def inductor_counts(module: nn.Module, inputs: list[Tensor]) -> tuple[Count, Count]:
    """Forward and backward of a training module, compiled."""
    forward_kernels: list[Kernel] = []
    backward_kernels: list[Kernel] = []
    torch.compiler.reset()
    with _scheduled_only(forward_kernels, backward_kernels):
        compiled = torch.compile(module, fullgraph=True, dynamic=False)
        forward, backward = training_counts(compiled, inputs, lambda _: nullcontext())
    torch.compiler.reset()
    return replace(forward, kernels=forward_kernels), replace(backward, kernels=backward_kernels)
