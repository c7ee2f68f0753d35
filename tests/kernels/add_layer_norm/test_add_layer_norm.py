from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_no_worse_than_library, assert_same_bits_on_one_thread_and_two, outputs_and_gradients

from fastvitc.kernels import add_layer_norm

OWN = ["reference", "native"]
pytestmark = pytest.mark.usefixtures("nan_memory")


def by_steps(x, branch, weight, bias, eps=1e-5):
    total = x + branch
    centred = total - total.mean(-1, keepdim=True)
    return total, weight * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + bias


def tensors(*shape, dtype=torch.float32, branch=None):
    width = shape[-1]
    x, other = torch.randn(shape).to(dtype), torch.randn(shape).to(branch or dtype)
    return x, other, torch.rand(width) + 0.5, torch.randn(width)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_matches_the_equation_in_float64(backend):
    inputs = [t.double() for t in tensors(2, 5, 24)]
    expected = outputs_and_gradients(by_steps, inputs)
    found = outputs_and_gradients(partial(add_layer_norm, backend=backend), inputs)
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 300), width=st.sampled_from([5, 24, 33, 64, 100, 192, 384]))
def test_any_shape_errs_at_most_twice_as_much_as_the_library(backend, dtype, rows, width):
    inputs = tensors(rows, width, dtype=dtype)
    grads = [torch.randn(rows, width).to(dtype) for _ in range(2)]
    runs = [partial(add_layer_norm, eps=1e-3, backend=b) for b in (backend, "torch")]
    assert_no_worse_than_library(*runs, inputs, grads, roundings=2, terms=rows + width)


@pytest.mark.parametrize("backend", [*OWN, "torch"])
def test_a_single_column_normalises_to_the_bias_and_passes_the_streams_gradient(backend):
    inputs = tensors(7, 1)
    _, y, dx, *_ = outputs_and_gradients(partial(add_layer_norm, backend=backend), inputs)
    torch.testing.assert_close(y, inputs[3].expand(7, 1))
    torch.testing.assert_close(dx, torch.ones(7, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("branch_dtype", [torch.float32, torch.bfloat16])
def test_autocast_normalises_into_its_dtype_and_keeps_the_stream_in_float32(backend, branch_dtype):
    inputs = tensors(3, 7, 96, branch=branch_dtype)
    grads = [torch.randn(3, 7, 96), torch.randn(3, 7, 96).bfloat16()]

    def run(*inputs, backend):
        with torch.autocast("cpu", torch.bfloat16, enabled=inputs[0].dtype != torch.float64):
            total, y = add_layer_norm(*inputs, backend=backend)
        if total.dtype != torch.float64:
            assert (total.dtype, y.dtype) == (torch.float32, torch.bfloat16)
        return total, y

    assert_no_worse_than_library(
        partial(run, backend=backend), partial(run, backend="torch"), inputs, grads, roundings=2, terms=96
    )


@pytest.mark.parametrize("backend", [*OWN, "torch"])
def test_without_a_branch_it_is_layer_norm_beside_the_same_stream(backend):
    x, _, weight, bias = tensors(2, 5, 40)
    total, y = add_layer_norm(x, None, weight, bias, backend=backend)
    assert total is x
    torch.testing.assert_close(y, F.layer_norm(x, (40,), weight, bias))
    expected = outputs_and_gradients(
        lambda x, w, b: x.square() + F.layer_norm(x, (40,), w, b), [x, weight, bias]
    )

    def run(x, weight, bias):
        total, y = add_layer_norm(x, None, weight, bias, backend=backend)
        return total.square() + y

    for e, f in zip(expected, outputs_and_gradients(run, [x, weight, bias]), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_has_its_gradient(backend, used):
    inputs = tensors(4, 24)
    leaves = [[t.clone().requires_grad_() for t in inputs] for _ in range(2)]
    for run, own in zip((partial(add_layer_norm, backend=backend), by_steps), leaves, strict=True):
        run(*own)[used].square().sum().backward()
    for ours, theirs in zip(*leaves, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [*OWN, "torch"])
def test_strided_inputs_and_expanded_gradients_change_nothing(backend):
    x, branch, weight, bias = tensors(2, 6, 16)
    strided = [torch.randn(6, 2, 32)[..., ::2].transpose(0, 1).copy_(t) for t in (x, branch)]
    for grad in (torch.ones(1, 1, 1).expand(2, 6, 16), torch.randn(6, 2, 16).transpose(0, 1)):
        results = []
        for first in ((x, branch), strided):
            leaves = [t.requires_grad_() for t in first]
            out = add_layer_norm(*leaves, weight, bias, backend=backend)
            results.append([*out, *torch.autograd.grad(out, leaves, [grad, grad])])
        torch.testing.assert_close(*results)


def test_native_gives_the_same_bits_again_and_on_two_threads():
    inputs = tensors(700, 48, branch=torch.bfloat16)
    run = partial(add_layer_norm, backend="native")
    assert_same_bits_on_one_thread_and_two(lambda: outputs_and_gradients(run, inputs))


@pytest.mark.parametrize("backend", OWN)
def test_a_large_mean_costs_no_digits_of_the_variance(backend):
    x, branch, weight, bias = tensors(8, 64)
    _, y = add_layer_norm(1000 + x, branch, weight, bias, backend=backend)
    _, exact = add_layer_norm((1000 + x).double(), branch.double(), weight, bias, backend="reference")
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("branch", [True, False])
def test_registration_passes_opcheck(backend, branch):
    x, other, weight, bias = (t.requires_grad_() for t in tensors(3, 8))
    args = (x, other if branch else None, weight, bias, 1e-5, torch.float32, backend)
    torch.library.opcheck(torch.ops.fastvitc.add_layer_norm.default, args)


@pytest.mark.parametrize("backend", [*OWN, "torch"])
def test_compiles_as_one_graph(backend):
    inputs = tensors(5, 24)
    run = partial(add_layer_norm, backend=backend)
    compiled = torch.compile(run, fullgraph=True)
    for eager, found in zip(
        outputs_and_gradients(run, inputs), outputs_and_gradients(compiled, inputs), strict=True
    ):
        torch.testing.assert_close(found, eager)


@pytest.mark.parametrize("backend", [*OWN, "torch"])
def test_no_rows_give_nothing_and_gradients_of_zero(backend):
    x, branch, weight, bias = tensors(0, 8)
    total, y, dx, dbranch, dweight, dbias = outputs_and_gradients(
        partial(add_layer_norm, backend=backend), [x, branch, weight, bias]
    )
    assert total.shape == y.shape == dx.shape == dbranch.shape == (0, 8)
    assert not dweight.any()
    assert not dbias.any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({0: torch.zeros(2, 3, 8, dtype=torch.int64)}, TypeError, "x must be a floating-point"),
        ({1: torch.zeros(2, 3, 9)}, ValueError, r"branch must have the shape of x, \(2, 3, 8\)"),
        ({2: torch.zeros(9)}, ValueError, r"weight must be \(C,\)"),
        ({3: torch.zeros(8, device="meta")}, ValueError, "bias is on meta"),
    ],
)
def test_bad_input_raises_one_clear_error(change, error, words):
    inputs = [change.get(i, t) for i, t in enumerate(tensors(2, 3, 8))]
    with pytest.raises(error, match=words):
        add_layer_norm(*inputs)


def test_float64_on_native_is_refused_and_auto_takes_another():
    inputs = [t.double() for t in tensors(2, 8)]
    with pytest.raises(TypeError, match="native backend takes float32, float16 or bfloat16"):
        add_layer_norm(*inputs, backend="native")
    torch.testing.assert_close(add_layer_norm(*inputs), by_steps(*inputs))
