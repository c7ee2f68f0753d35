import json
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from triton.runtime.interpreter import InterpreterBuilder

from bench import traffic
from bench.counting import (
    AtenKernels,
    Count,
    Kernel,
    eager_counts,
    per_image,
    saved_for_backward,
    training_counts,
)
from bench.inductor import inductor_counts
from bench.interpreted import interpreted_kernels, run_counted, triton_counts
from bench.parts import attention_part, bn_relu_part, stem_part
from fastvitc.kernels.gpu.triton import INTERPRET, launch
from fastvitc.models.config import preset

interpreted = pytest.mark.skipif(not INTERPRET, reason="counts in Triton's interpreter")


@triton.jit
def _overlapping(x, y, N, STEP: tl.constexpr):
    """Program p reads x[STEP·p : STEP·p + 8] and writes y[8·p : 8·p + 8], both below N."""
    lanes = tl.arange(0, 8)
    read = tl.program_id(0) * STEP + lanes
    written = tl.program_id(0) * 8 + lanes
    values = tl.load(x + read, mask=read < N, other=0.0)
    tl.store(y + written, values, mask=written < N)


@triton.jit
def _product(x, y):
    rows, columns = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    tile = tl.load(x + rows * 16 + columns)
    tl.store(y + rows * 16 + columns, tl.dot(tile, tile))


@triton.jit
def _atomic(x):
    tl.atomic_add(x, 1.0)


@interpreted
@pytest.mark.parametrize(
    ("step", "distinct", "requested"),
    [
        (4, 10 * 4 + 10 * 2, (8 + 6) * 4 + (8 + 2) * 2),  # elements 4 to 7 are read twice
        (8, 10 * 4 + 10 * 2, (8 + 2) * 4 + (8 + 2) * 2),  # nothing is
        (0, 8 * 4 + 10 * 2, (8 + 8) * 4 + (8 + 2) * 2),  # the second program reads what the first did
        (16, 8 * 4 + 10 * 2, (8 + 0) * 4 + (8 + 2) * 2),  # all lanes of the second are masked
    ],
)
def test_a_kernel_is_counted_to_the_byte(step, distinct, requested):
    x, y = torch.zeros(10), torch.zeros(10, dtype=torch.float16)
    kernel = run_counted(_overlapping, (2,), x, y, 10, STEP=step)
    assert (kernel.name, kernel.distinct, kernel.requested) == ("_overlapping", distinct, requested)
    assert kernel.touched == ((distinct - 20) / 40, 1.0)


@interpreted
def test_a_byte_that_is_read_and_written_counts_twice():
    storage = torch.zeros(24)
    first, second = (
        storage[3:13],
        storage[5:15],
    )  # of one storage, at addresses that are no multiple of 8 bytes
    assert run_counted(_overlapping, (2,), first, second, 10, STEP=8).distinct == 10 * 4 + 10 * 4


@interpreted
def test_a_dot_product_counts_two_operations_a_multiply_add():
    kernel = run_counted(_product, (1,), torch.zeros(16, 16), torch.zeros(16, 16))
    assert (kernel.distinct, kernel.flops, kernel.requested) == (2 * 256 * 4, 2 * 16**3, 2 * 256 * 4)


@interpreted
@pytest.mark.parametrize("step", [8, -8])
def test_an_access_outside_the_tensors_is_refused(step):
    x, y = torch.zeros(10), torch.zeros(16)
    with pytest.raises(Exception, match="a kernel reaches outside its tensors"):
        run_counted(_overlapping, (2,), x, y, 16, STEP=step)


@interpreted
def test_an_atomic_is_refused_and_the_interpreter_left_as_it_was():
    before = dict(vars(InterpreterBuilder))
    with pytest.raises(Exception, match="atomics are not counted"):
        run_counted(_atomic, (1,), torch.zeros(1))
    assert dict(vars(InterpreterBuilder)) == before


N = 48 * 4  # bytes of the matrix below


@pytest.mark.parametrize(
    ("call", "moved"),
    [
        (lambda x: x.mT, 0),
        (lambda x: x[1:].reshape(-1), 0),
        (lambda x: x.contiguous(), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x + 1, 2 * N),
        (lambda x: x + x, 2 * N),  # one input, read once
        (lambda x: x.add_(x.clone()), 2 * N + 3 * N),
        (lambda x: x.zero_(), N),
        (lambda x: x.mT.contiguous(), 2 * N),
        (lambda x: torch.empty_like(x).copy_(x), 2 * N),
        (lambda x: x.bfloat16(), N + N // 2),
        (lambda x: x.sum(), N + 4),
        (lambda x: torch.cat([x, x + 1]), 2 * N + 4 * N),
        (lambda x: x[:1].expand(6, 8) + 1, 8 * 4 + N),
        (lambda x: x[:2] * 2, 2 * (2 * 8 * 4)),
    ],
)
def test_aten_kernels_read_inputs_once_and_write_outputs_and_views_are_free(call, moved):
    x, kernels = torch.zeros(6, 8), []
    with AtenKernels(kernels):
        call(x)
    assert sum(kernel.distinct for kernel in kernels) == moved


def test_aten_products_count_their_operations():
    a, b, kernels = torch.zeros(3, 5), torch.zeros(5, 7), []
    with AtenKernels(kernels):
        a @ b
    assert [kernel.flops for kernel in kernels] == [2 * 3 * 5 * 7]


def test_saved_are_distinct_storages_without_parameters():
    layer = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with saved_for_backward(layer.parameters()) as saved:
        y = layer(x).exp()
        assert saved() == x.nbytes + y.nbytes
        y = y * y  # saves y twice
        assert saved() == 2 * x.nbytes


def test_eager_counts_nothing_else_than_a_run_does():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert eager_counts(module, [x]) == training_counts(module, [x], AtenKernels)


def test_inductor_fuses_and_is_counted_both_ways():
    class Waves(nn.Module):
        def forward(self, x):
            return x.sin().cos()

    x = torch.zeros(64, 64, requires_grad=True)
    forward, backward = inductor_counts(Waves(), [x])
    assert (forward.distinct, backward.distinct) == (2 * x.nbytes, 3 * x.nbytes)
    assert forward.saved == x.nbytes


def test_inductor_counts_the_operations_of_convolutions_both_ways():
    module, x = nn.Conv2d(4, 8, 3, bias=False), torch.zeros(2, 4, 6, 6, requires_grad=True)
    flops = [sum(k.flops for k in count.kernels) for count in inductor_counts(module, [x])]
    forward = 2 * 2 * 4 * 8 * 9 * 16
    assert flops == [forward, 2 * forward]


@interpreted
def test_attention_moves_what_it_must_and_the_row_sums():
    config = preset("vitc_1gf")
    part = attention_part(config)
    forward, backward = training_counts(*part.ours(1), lambda k: interpreted_kernels(k, "sm_90"))
    lse = 4 * config.heads * config.tokens
    matrix = 2 * config.tokens * config.width
    assert (forward.distinct, backward.distinct) == (4 * matrix + lse, 8 * matrix + lse)
    assert part.least == (4 * matrix, 8 * matrix)
    assert forward.saved == 4 * matrix + lse
    assert forward.requested > forward.distinct
    assert {k.name for k in forward.kernels + backward.kernels} == {
        "_attention_fwd_kernel",
        "_attention_bwd_resident_kernel",
    }


@interpreted
def test_what_runs_around_the_triton_kernels_is_counted_too():
    forward, _ = training_counts(
        *bn_relu_part(preset("vitc_nano")).ours(2), lambda k: interpreted_kernels(k, "sm_90")
    )
    names = {kernel.name for kernel in forward.kernels}
    assert "_bn_stats_kernel" in names
    assert any(name.startswith("aten.") for name in names)
    assert forward.distinct > 6 * 2 * 24 * 16 * 16


def test_the_least_a_stem_moves():
    config = preset("vitc_nano")  # 24 channels of 16x16, 48 of 8x8, 96 of 4x4; 17 tokens of 96
    image, z, tokens = 3 * 32 * 32, 2 * (24 * 16 * 16 + 48 * 8 * 8 + 96 * 4 * 4), 4 * 17 * 96
    assert stem_part(config).least == (image + 2 * z + tokens, image + 3 * z + tokens)


@interpreted
@pytest.mark.parametrize(("part", "run", "planned"), [(attention_part, 1, 3), (bn_relu_part, 2, 24)])
def test_a_batch_is_planned_as_it_runs(part, run, planned):
    build = part(preset("vitc_nano")).ours
    found = triton_counts(build, "sm_90", run, planned)
    ran = training_counts(*build(planned), lambda kernels: interpreted_kernels(kernels, "sm_90"))
    for a, b in zip(found, ran, strict=True):
        assert (a.distinct, a.saved) == (pytest.approx(b.distinct), b.saved)
        assert [kernel.name for kernel in a.kernels] == [kernel.name for kernel in b.kernels]
        assert sum(k.flops for k in a.kernels) == sum(k.flops for k in b.kernels)


@interpreted
def test_a_kernel_that_was_not_run_cannot_be_planned():
    class Doubled(nn.Module):
        def forward(self, x):
            if len(x) == 1:
                launch(_product, (1,), x, x)
            else:
                launch(_overlapping, (1,), x, x, 8, STEP=8)
            return x * 2

    with pytest.raises(ValueError, match="_overlapping runs on the large batch only"):
        triton_counts(lambda batch: (Doubled(), [torch.zeros(batch, 256, requires_grad=True)]), "sm_90", 1, 2)


def test_a_count_is_shared_out_over_its_images():
    count = Count([Kernel("k", 512.0, 256.0, 1024.0), Kernel("l", 128.0)], saved=64.0)
    assert per_image(count, 128) == Count([Kernel("k", 4.0, 2.0, 8.0), Kernel("l", 1.0)], saved=0.5)


@interpreted
@pytest.mark.parametrize(("ratio", "code"), [(1.1, 0), (0.5, 1)])
def test_a_missed_target_is_the_exit_status(ratio, code, monkeypatch, tmp_path, capsys):
    small = replace(traffic.OPS["attention"], models=("vitc_nano",))
    monkeypatch.setattr(traffic, "OPS", {"attention": small})
    monkeypatch.setitem(traffic.TARGETS, "attention", (traffic.Target("distinct", "least", ratio),))
    with pytest.raises(SystemExit) as exit:
        traffic.main(["--quick", "--json", str(tmp_path / "rows.json")])
    assert exit.value.code == code
    text = capsys.readouterr().out
    assert "not measured on a GPU" in text
    assert ("MISSED" in text) == bool(code)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {(r["what"], r["direction"]) for r in rows} == {
        (what, direction)
        for what in ("ours", "eager", "inductor", "least")
        for direction in ("forward", "backward", "both")
    }
    (judged,) = [r for r in rows if r["ok"] is not None]
    least = next(r for r in rows if (r["what"], r["direction"]) == ("least", "both"))
    assert judged["ratio"] == judged["distinct_bytes_per_image"] / least["distinct_bytes_per_image"]
    assert (judged["what"], judged["target"], judged["ok"]) == ("ours", ratio, not code)
