import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_no_worse_than_library, assert_same_bits_on_one_thread_and_two, outputs_and_gradients

from fastvitc.kernels import bn_relu
from fastvitc.kernels.bn_relu import triton

OWN = ["reference", "triton", "native"]
EXACT = ["reference", "torch"]  # compute in float64 too
pytestmark = pytest.mark.usefixtures("nan_memory", "kernel_device")


def runner(training, backend, channels, momentum=0.1, eps=1e-5):
    """x, weight, bias → output and the running statistics after the call."""

    def run(x, weight, bias):
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, var = torch.linspace(-1, 1, channels, dtype=wide), torch.linspace(0.5, 2, channels, dtype=wide)
        y = bn_relu(x, mean, var, weight.to(wide), bias.to(wide), training, momentum, eps, backend=backend)
        run.statistics = mean, var
        return y

    return run


def by_library(training, channels):
    def run(x, weight, bias):
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, var = torch.linspace(-1, 1, channels, dtype=wide), torch.linspace(0.5, 2, channels, dtype=wide)
        y = F.relu(F.batch_norm(x, mean, var, weight.to(wide), bias.to(wide), training))
        run.statistics = mean, var
        return y

    return run


def inputs(shape, dtype=torch.float64):
    channels = shape[1]
    return [
        torch.randn(shape).to(dtype),
        torch.rand(channels).to(dtype) + 0.5,
        torch.randn(channels).to(dtype),
    ]


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 24, 4, 4), (4, 48, 1, 1), (3, 512, 2, 3)])
def test_values_gradients_and_statistics_match_batch_norm_in_float64(backend, training, shape):
    ours, library = runner(training, backend, shape[1]), by_library(training, shape[1])
    args, grad = inputs(shape), torch.randn(shape, dtype=torch.float64)
    found, expected = (outputs_and_gradients(run, args, [grad]) for run in (ours, library))
    for f, e in zip((*found, *ours.statistics), (*expected, *library.statistics), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 24, 48, 64, 96, 100, 128, 192, 256, 512])
def test_values_and_gradients_err_at_most_twice_as_much_as_the_library(backend, training, dtype, channels):
    shape = (2, channels, 5, 7)
    args, grad = inputs(shape, dtype), torch.randn(shape)
    assert_no_worse_than_library(
        runner(training, backend, channels), by_library(training, channels), args, [grad]
    )


@pytest.mark.parametrize("backend", OWN)
def test_a_large_mean_does_not_cancel(backend):
    x, weight, bias = inputs((2, 4, 16, 16), torch.float32)
    args = [x * 1e-2 + 1e3, weight, bias + 10]  # beside the ReLU's edge one rounding is a whole gradient
    assert_no_worse_than_library(runner(True, backend, 4), by_library(True, 4), args)


@pytest.mark.parametrize("backend", OWN)
def test_bfloat16_parameters_are_computed_with_in_float32(backend):
    x = 6 + 0.1 * torch.randn(2, 4, 5, 5)
    vectors = [
        v.bfloat16() for v in (torch.full((4,), 6.0), torch.full((4,), 0.01), torch.ones(4), torch.zeros(4))
    ]
    found = bn_relu(x.bfloat16(), *vectors, backend=backend)
    exact = F.relu(F.batch_norm(x.bfloat16().double(), *(v.double() for v in vectors)))
    assert (found - exact).abs().max() < 1e-2 * exact.max()


@pytest.mark.parametrize("backend", EXACT)
@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 20),
    height=st.integers(1, 9),
    width=st.integers(2, 9),
    training=st.booleans(),
)
def test_any_shape_matches_batch_norm(backend, batch, channels, height, width, training):
    shape = (batch, channels, height, width)
    args = inputs(shape)
    found = outputs_and_gradients(runner(training, backend, channels), args)
    expected = outputs_and_gradients(by_library(training, channels), args)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", ["triton", "native"])
@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 70),
    height=st.integers(1, 9),
    width=st.integers(2, 9),
    training=st.booleans(),
)
def test_any_shape_errs_at_most_twice_as_much_as_the_library(
    backend, batch, channels, height, width, training
):
    args = inputs((batch, channels, height, width), torch.float32)
    ours, library = runner(training, backend, channels), by_library(training, channels)
    assert_no_worse_than_library(ours, library, args, [torch.randn_like(args[0])], roundings=8)


def test_many_row_chunks_merge_to_the_same_statistics(monkeypatch):
    monkeypatch.setattr(triton, "_CHUNKS", 5)
    ours, library = runner(True, "triton", 6), by_library(True, 6)
    x, weight, bias = inputs((2, 6, 41, 43), torch.float32)
    assert_no_worse_than_library(ours, library, [x + 30, weight, bias], roundings=8)


@pytest.mark.parametrize("channels", [1, 5, 24])
def test_many_blocks_on_native_merge_to_the_same_statistics(channels):
    x, weight, bias = inputs((3, channels, 151, 149), torch.float32)
    ours, library = runner(True, "native", channels), by_library(True, channels)
    assert_no_worse_than_library(ours, library, [x + 30, weight, bias], roundings=8, terms=1000)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_gives_the_same_bits_again_and_on_two_threads(training, dtype):
    args, grad = inputs((3, 24, 61, 67), dtype), torch.randn(3, 24, 61, 67)

    def results():
        run = runner(training, "native", 24)
        return [*outputs_and_gradients(run, args, [grad]), *run.statistics]

    assert_same_bits_on_one_thread_and_two(results)


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_stays_in_its_channel_and_shows(backend, dtype):
    x, weight, bias = inputs((2, 5, 7, 9), dtype)
    x[1, 3, 6, 8] = float("nan")
    for training in (True, False):
        y = runner(training, backend, 5)(x, weight, bias)
        spread = torch.zeros_like(x, dtype=torch.bool)
        spread[:, 3] = training
        assert torch.equal(y.isnan(), spread | x.isnan())


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("training", [True, False])
def test_any_strides_of_input_and_gradient_are_taken(backend, training):
    args, grad = inputs((3, 24, 5, 7), torch.float32), torch.randn(3, 24, 5, 7)
    run = runner(training, backend, 24)
    expected = outputs_and_gradients(run, args, [grad])
    mixed = grad.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)
    spread = torch.stack([args[0], torch.zeros_like(args[0])], -1)[..., 0]
    found = outputs_and_gradients(run, [spread, *args[1:]], [mixed])
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_native_compiles_as_one_graph(training):
    args = inputs((2, 24, 6, 6), torch.float32)
    run = runner(training, "native", 24)
    compiled = torch.compile(lambda *leaves: run(*leaves), fullgraph=True, dynamic=False)
    for f, e in zip(outputs_and_gradients(compiled, args), outputs_and_gradients(run, args), strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("backend", [*OWN, "torch"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_kept(backend, layout):
    x, weight, bias = inputs((2, 8, 4, 6), torch.float32)
    y = runner(True, backend, 8)(x.contiguous(memory_format=layout), weight, bias)
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("backend", OWN)
def test_expanded_gradients_are_taken(backend):
    x, weight, bias = inputs((2, 8, 4, 6), torch.float32)
    x.requires_grad_()
    (found,) = torch.autograd.grad(runner(True, backend, 8)(x, weight, bias).sum(), x)
    (expected,) = torch.autograd.grad(by_library(True, 8)(x, weight, bias).sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("training", [True, False])
def test_registration_passes_opcheck(backend, training):
    x, weight, bias = inputs((2, 3, 4, 5), torch.float32)
    args = (x.requires_grad_(), bias.clone(), weight.clone(), weight.requires_grad_(), bias.requires_grad_())
    torch.library.opcheck(torch.ops.fastvitc.bn_relu.default, (*args, training, 1e-5, "", backend))


def good():
    return [torch.zeros(2, 3, 4, 4), torch.zeros(3), torch.ones(3), torch.ones(3), torch.zeros(3)]


@pytest.mark.parametrize(
    ("position", "value", "error", "words"),
    [
        (0, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), TypeError, "x must be a floating-point"),
        (0, torch.zeros(2, 3), ValueError, r"\(B, C, H, W\)"),
        (3, torch.ones(4), ValueError, r"weight must be \(3,\)"),
        (4, torch.zeros(3, device="meta"), ValueError, "bias is on meta and x on"),
        (1, torch.zeros(1), ValueError, r"running_mean must be \(3,\)"),
        (0, torch.zeros(1, 3, 1, 1), ValueError, "more than one value per channel"),
    ],
)
def test_bad_input_raises_one_clear_error(position, value, error, words):
    args = good()
    args[position] = value
    with pytest.raises(error, match=words):
        bn_relu(*args, training=True)
