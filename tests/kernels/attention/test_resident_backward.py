"""The backward pass with a head's K and V on chip, run by the interpreter under the name of a GPU that has room."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_no_worse_than_library, outputs_and_gradients

from fastvitc.kernels import attention
from fastvitc.kernels.attention import triton
from fastvitc.kernels.gpu.triton import launches_to

pytestmark = pytest.mark.usefixtures("nan_memory", "kernel_device")


def resident(qkv, heads, scale=None, ran=None):
    """attention whose backward pass runs as on an H100; the kernels' names go into `ran`."""

    class Run(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv):
            ctx.factor = scale or (qkv.shape[-1] // (3 * heads)) ** -0.5
            out, lse = triton.forward(qkv.contiguous(), heads, ctx.factor)
            ctx.save_for_backward(qkv.contiguous(), out, lse)
            return out

        @staticmethod
        def backward(ctx, dout):
            def launch(kernel, grid, *args, **options):
                if ran is not None:
                    ran.append(kernel.__name__)
                kernel[grid](*args, **options)

            with launches_to(launch, "sm_90"):
                return triton.backward(dout, *ctx.saved_tensors, heads, ctx.factor)

    return Run.apply(qkv)


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 196, 197])
def test_gradients_err_at_most_twice_as_much_as_the_library(tokens, dtype, dim):
    qkv, grad = torch.randn(2, tokens, 3 * 2 * dim).to(dtype), torch.randn(2, tokens, 2 * dim).to(dtype)
    ran = []
    ours, library = partial(resident, heads=2, ran=ran), partial(attention, num_heads=2, backend="torch")
    assert_no_worse_than_library(ours, library, [qkv], [grad])
    assert ran == ["_attention_bwd_resident_kernel"]


@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 256),
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 32, 48, 64]),
    scale=st.floats(0.01, 1.0),
)
def test_any_shape_errs_at_most_twice_as_much_as_the_library(batch, tokens, heads, dim, scale):
    qkv = torch.randn(batch, tokens, 3 * heads * dim).bfloat16()
    grad = torch.randn(batch, tokens, heads * dim).bfloat16()
    ours = partial(resident, heads=heads, scale=scale)
    library = partial(attention, num_heads=heads, scale=scale, backend="torch")
    assert_no_worse_than_library(ours, library, [qkv], [grad], roundings=4)


def test_results_repeat_bitwise_and_equal_the_form_in_roles_closely():
    qkv = torch.randn(2, 33, 3 * 64).bfloat16()
    first, second = (outputs_and_gradients(partial(resident, heads=2), [qkv]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    roles = outputs_and_gradients(partial(attention, num_heads=2, backend="triton"), [qkv])
    torch.testing.assert_close(first[1], roles[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "dim", "tokens", "arch"),
    [
        (torch.float32, 64, 197, "sm_90"),
        (torch.bfloat16, 80, 197, "sm_90"),
        (torch.bfloat16, 64, 257, "sm_90"),
        (torch.bfloat16, 64, 197, "sm_80"),
    ],
)
def test_what_does_not_fit_on_chip_is_done_in_roles(dtype, dim, tokens, arch):
    assert triton.resident_blocks(dtype, dim, tokens, arch) is None
    assert triton.resident_blocks(torch.bfloat16, 64, 256, "sm_90") is not None


def test_large_negative_scores_leave_the_gradient_finite():
    direction = 20.0 * torch.ones(16)
    q, k = direction + torch.rand(7, 16), -direction + torch.rand(7, 16)
    qkv = torch.stack([q, k, torch.randn(7, 16)], 1).reshape(1, 7, 48).bfloat16()
    library = partial(attention, num_heads=1, backend="torch")
    grad = torch.randn(1, 7, 16).bfloat16()
    assert_no_worse_than_library(partial(resident, heads=1), library, [qkv], [grad], roundings=4)
