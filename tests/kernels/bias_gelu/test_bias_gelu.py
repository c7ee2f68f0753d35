from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_no_worse_than_library, assert_same_bits_on_one_thread_and_two, outputs_and_gradients

from fastvitc.kernels import bias_gelu

OWN = ["reference", "native"]
pytestmark = pytest.mark.usefixtures("nan_memory")


def by_steps(x, bias):
    v = x + bias
    return v * 0.5 * (1 + torch.erf(v / 2**0.5))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_matches_the_equation_in_float64(backend):
    inputs = [torch.randn(2, 5, 24).double(), torch.randn(24).double()]
    expected = outputs_and_gradients(by_steps, inputs)
    found = outputs_and_gradients(partial(bias_gelu, backend=backend), inputs)
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 300), width=st.sampled_from([5, 33, 64, 100, 576]), scale=st.floats(0.1, 8.0))
def test_any_shape_errs_at_most_twice_as_much_as_the_library(backend, dtype, rows, width, scale):
    inputs = [(scale * torch.randn(rows, width)).to(dtype), torch.randn(width)]
    runs = [partial(bias_gelu, backend=b) for b in (backend, "torch")]
    grads = [torch.randn(rows, width).to(dtype)]
    assert_no_worse_than_library(*runs, inputs, grads, roundings=2, terms=64 + rows)


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("scale", "shift"), [(0.3, -3.0), (0.5, -4.0), (8.0, -40.0), (0.5, 4.0)])
def test_the_tails_err_at_most_twice_as_much_as_the_library(backend, dtype, scale, shift):
    inputs = [(scale * torch.randn(300, 100) + shift).to(dtype), 0.1 * torch.randn(100)]
    runs = [partial(bias_gelu, backend=b) for b in (backend, "torch")]
    grads = [torch.randn(300, 100).to(dtype)]
    assert_no_worse_than_library(*runs, inputs, grads, roundings=2, terms=400)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_native_is_the_identity_far_up_zero_far_down_and_keeps_nan(dtype):
    x = torch.tensor([[6e4, 60.0, -60.0, -6e4, float("nan"), 0.0, float("inf")]], dtype=dtype)
    y, dx, _ = outputs_and_gradients(partial(bias_gelu, backend="native"), [x, torch.zeros(7)])
    expected = torch.tensor([[6e4, 60.0, 0.0, 0.0, float("nan"), 0.0, float("inf")]], dtype=dtype)
    slope = torch.tensor([[1.0, 1.0, 0.0, 0.0, float("nan"), 0.5, float("nan")]], dtype=dtype)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-6, atol=2e-4)
    torch.testing.assert_close(dx, slope, equal_nan=True, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", [*OWN, "torch"])
@pytest.mark.parametrize("width", [1, 40])
def test_is_pytorchs_gelu_of_the_sum(backend, width):
    inputs = [torch.randn(3, 7, width), torch.randn(width)]
    found = outputs_and_gradients(partial(bias_gelu, backend=backend), inputs)
    expected = outputs_and_gradients(lambda x, bias: F.gelu(x + bias), inputs)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [*OWN, "torch"])
def test_autocast_computes_in_its_dtype(backend):
    x, bias = torch.randn(3, 40), torch.randn(40)
    with torch.autocast("cpu", torch.bfloat16):
        y = bias_gelu(x, bias, backend=backend)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, bias_gelu(x.bfloat16(), bias, backend=backend))


@pytest.mark.parametrize("backend", [*OWN, "torch"])
def test_strided_inputs_and_expanded_gradients_change_nothing(backend):
    x, bias = torch.randn(2, 6, 16), torch.randn(16)
    strided = torch.randn(6, 2, 32)[..., ::2].transpose(0, 1).copy_(x)
    for grad in (torch.ones(1, 1, 1).expand(2, 6, 16), torch.randn(6, 2, 16).transpose(0, 1)):
        results = []
        for first in (x, strided):
            leaf = first.requires_grad_()
            out = bias_gelu(leaf, bias, backend=backend)
            results.append((out.detach(), torch.autograd.grad(out, leaf, grad)[0]))
        torch.testing.assert_close(*results)


def test_native_gives_the_same_bits_again_and_on_two_threads():
    inputs = [torch.randn(700, 48).bfloat16(), torch.randn(48)]
    run = partial(bias_gelu, backend="native")
    assert_same_bits_on_one_thread_and_two(lambda: outputs_and_gradients(run, inputs))


@pytest.mark.parametrize("backend", OWN)
def test_registration_passes_opcheck(backend):
    args = (torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True), backend)
    torch.library.opcheck(torch.ops.fastvitc.bias_gelu.default, args)


@pytest.mark.parametrize("backend", [*OWN, "torch"])
def test_compiles_as_one_graph(backend):
    inputs = [torch.randn(5, 24), torch.randn(24)]
    run = partial(bias_gelu, backend=backend)
    compiled = torch.compile(run, fullgraph=True)
    for eager, found in zip(
        outputs_and_gradients(run, inputs), outputs_and_gradients(compiled, inputs), strict=True
    ):
        torch.testing.assert_close(found, eager)


@pytest.mark.parametrize(
    ("x", "bias", "error", "words"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), torch.zeros(8), TypeError, "x must be a floating-point"),
        (torch.zeros(2, 8), torch.zeros(9), ValueError, r"bias must be \(C,\).*got \(9,\)"),
        (torch.zeros(2, 8), torch.zeros(8, device="meta"), ValueError, "bias is on meta"),
    ],
)
def test_bad_input_raises_one_clear_error(x, bias, error, words):
    with pytest.raises(error, match=words):
        bias_gelu(x, bias)


def test_float64_on_native_is_refused_and_auto_takes_another():
    x, bias = torch.randn(2, 8).double(), torch.randn(8)
    with pytest.raises(TypeError, match="native backend takes float32, float16 or bfloat16"):
        bias_gelu(x, bias, backend="native")
    torch.testing.assert_close(bias_gelu(x, bias), by_steps(x, bias))
