import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_no_worse_than_library, assert_same_bits_on_one_thread_and_two, outputs_and_gradients

from fastvitc.kernels import BackendUnavailable, Measured, attention, record

OWN = ["reference", "triton", "native"]
FLASH = [] if torch.cuda.is_available() else ["flash"]  # which takes 16 bits only on a GPU
EXACT = ["reference", "torch", *FLASH]  # compute in float64 too
pytestmark = pytest.mark.usefixtures("nan_memory", "kernel_device")


def by_steps(qkv, heads, scale=None):
    """Equation 1 in its simplest form, in the dtype of the input."""
    batch, tokens, width = qkv.shape
    dim = width // (3 * heads)
    q, k, v = qkv.view(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * (dim**-0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, heads * dim)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 16), (7, 3, 32), (17, 2, 64), (197, 1, 64)])
def test_matches_the_equation_in_float64(backend, tokens, heads, dim):
    qkv = torch.randn(2, tokens, 3 * heads * dim, dtype=torch.float64)
    expected = outputs_and_gradients(lambda x: by_steps(x, heads), [qkv])
    found = outputs_and_gradients(lambda x: attention(x, heads, backend=backend), [qkv])
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 196, 197])
def test_values_and_gradients_err_at_most_twice_as_much_as_the_library(backend, dtype, tokens):
    heads, dim = 2, 64
    qkv = torch.randn(2, tokens, 3 * heads * dim).to(dtype)
    grad = torch.randn(2, tokens, heads * dim).to(dtype)
    assert_no_worse_than_library(
        lambda x: attention(x, heads, backend=backend),
        lambda x: attention(x, heads, backend="torch"),
        [qkv],
        [grad],
    )


@pytest.mark.parametrize("backend", EXACT)
@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    heads=st.integers(1, 4),
    dim=st.sampled_from([8, 20, 32, 80]),
    scale=st.none() | st.floats(0.01, 1.0),
)
def test_any_shape_and_scale_match_the_equation(backend, batch, tokens, heads, dim, scale):
    qkv = torch.randn(batch, tokens, 3 * heads * dim, dtype=torch.float64)
    expected = outputs_and_gradients(lambda x: by_steps(x, heads, scale), [qkv])
    found = outputs_and_gradients(lambda x: attention(x, heads, scale=scale, backend=backend), [qkv])
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["triton", "native"])
@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 70),
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 32, 64, 80, 96, 128]),
    scale=st.none() | st.floats(0.01, 1.0),
)
def test_any_shape_errs_at_most_twice_as_much_as_the_library(backend, batch, tokens, heads, dim, scale):
    qkv = torch.randn(batch, tokens, 3 * heads * dim)
    runs = [partial(attention, num_heads=heads, scale=scale, backend=b) for b in (backend, "torch")]
    assert_no_worse_than_library(*runs, [qkv], [torch.randn(batch, tokens, heads * dim)], roundings=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(1, 300),
    heads=st.integers(1, 3),
    dim=st.integers(1, 140),
    scale=st.none() | st.floats(-1.0, 1.0),
)
def test_any_head_size_on_native_errs_at_most_twice_as_much_as_the_library(dtype, tokens, heads, dim, scale):
    qkv = torch.randn(1, tokens, 3 * heads * dim).to(dtype)
    runs = [partial(attention, num_heads=heads, scale=scale, backend=b) for b in ("native", "torch")]
    assert_no_worse_than_library(*runs, [qkv], [torch.randn(1, tokens, heads * dim).to(dtype)], roundings=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_gives_the_same_bits_again_and_on_two_threads(dtype):
    qkv = torch.randn(3, 197, 3 * 128).to(dtype)
    run = partial(attention, num_heads=2, backend="native")
    assert_same_bits_on_one_thread_and_two(lambda: outputs_and_gradients(run, [qkv]))


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_head_size_on_triton_errs_at_most_twice_as_much_as_the_library(dim, dtype):
    qkv = torch.randn(1, 70, 3 * 2 * dim).to(dtype)
    runs = [partial(attention, num_heads=2, backend=b) for b in ("triton", "torch")]
    assert_no_worse_than_library(*runs, [qkv], [torch.randn(1, 70, 2 * dim).to(dtype)])


@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("tokens", [577, 1024])
def test_long_sequences_err_at_most_twice_as_much_as_the_library(tokens, backend):
    qkv = torch.randn(1, tokens, 3 * 64).bfloat16()
    runs = [partial(attention, num_heads=1, backend=b) for b in (backend, "torch")]
    assert_no_worse_than_library(*runs, [qkv], [torch.randn(1, tokens, 64).bfloat16()])


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_float64_is_refused_with_the_backend_that_takes_it(backend):
    with pytest.raises(
        TypeError, match=r"takes float32, float16 or bfloat16, got torch.float64; use the backend"
    ):
        attention(torch.zeros(1, 2, 48, dtype=torch.float64), 2, backend=backend)


@pytest.mark.parametrize("backend", [*OWN, "torch", *FLASH])
def test_strided_inputs_and_expanded_gradients_change_nothing(backend):
    plain = torch.randn(2, 9, 96)
    strided = torch.randn(9, 2, 192)[..., ::2].transpose(0, 1).copy_(plain)
    for grad in (torch.ones(1, 1, 1).expand(2, 9, 32), torch.randn(9, 2, 32).transpose(0, 1)):
        results = []
        for qkv in (plain, strided):
            leaf = qkv.requires_grad_()
            out = attention(leaf, 2, backend=backend)
            results.append((out.detach(), torch.autograd.grad(out, leaf, grad)[0]))
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("backend", OWN)
def test_results_repeat_bitwise(backend):
    qkv = torch.randn(2, 33, 96).bfloat16()
    first, second = (
        outputs_and_gradients(lambda x: attention(x, 2, backend=backend), [qkv]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", OWN)
def test_registration_passes_opcheck(backend):
    qkv = torch.randn(2, 5, 48, requires_grad=True)
    torch.library.opcheck(torch.ops.fastvitc.attention.default, (qkv, 2, 0.3, backend))


@pytest.mark.parametrize("backend", [*OWN, "torch", "flash"])
def test_autocast_casts_as_scaled_dot_product_attention_does(backend):
    qkv = torch.randn(2, 5, 48)
    with torch.autocast(qkv.device.type, torch.bfloat16):
        out = attention(qkv, 2, backend=backend)
    assert out.dtype == torch.bfloat16
    expected = attention(qkv.bfloat16(), 2, backend=backend)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", [*OWN, "torch", *FLASH])
def test_large_scores_do_not_overflow(backend):
    out = attention(1e4 * torch.randn(1, 5, 48), 2, backend=backend)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", [*OWN, "torch"])
@pytest.mark.parametrize("tokens", [5, 6, 33])
@pytest.mark.parametrize("shift", [95.0, 120.0, 200.0])
def test_scores_that_are_all_far_below_zero_have_finite_gradients(backend, tokens, shift):
    qkv = 0.1 * torch.randn(1, tokens, 96)
    qkv[..., 0] += shift
    qkv[..., 32] -= 32**0.5
    runs = [partial(attention, num_heads=1, backend=b) for b in (backend, "reference")]
    grad = torch.randn(1, tokens, 32)
    found, expected = (outputs_and_gradients(run, [qkv], [grad]) for run in runs)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("qkv", "heads", "error", "words"),
    [
        (torch.zeros(2, 3, 48, dtype=torch.int64), 2, TypeError, "floating-point"),
        (torch.zeros(3, 48), 2, ValueError, "2 dimensions"),
        (torch.zeros(2, 3, 50), 2, ValueError, "multiple of 3·num_heads"),
        (torch.zeros(2, 3, 48), 0, ValueError, "num_heads=0"),
        (torch.zeros(2, 3, 0), 1, ValueError, "got 0"),
    ],
)
def test_bad_input_raises_one_clear_error(qkv, heads, error, words):
    with pytest.raises(error, match=words):
        attention(qkv, heads)


def test_an_unknown_backend_names_the_usable_ones():
    with pytest.raises(
        BackendUnavailable, match=r"has no backend 'fast'.*auto, native, torch, flash,.* reference"
    ):
        attention(torch.zeros(1, 2, 48), 2, backend="fast")


def test_the_library_backend_is_scaled_dot_product_attention():
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    packed = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).flatten(2)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(packed, 4, backend="torch"), expected)


def test_an_explicit_kernel_of_the_library_is_the_only_one_enabled(monkeypatch):
    enabled = []
    original = F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        enabled.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for backend in ("flash", "torch"):
        attention(torch.randn(1, 3, 24, device="cpu"), 1, backend=backend)
    assert enabled == [(True, False), (True, True)]


@pytest.mark.parametrize("backend", ["torch", "flash"])
def test_a_kernel_of_the_library_compiles_as_one_graph(backend):
    qkv = torch.randn(2, 9, 96, device="cpu")
    compiled = torch.compile(partial(attention, num_heads=2, backend=backend), fullgraph=True, dynamic=False)
    for eager, found in zip(
        outputs_and_gradients(partial(attention, num_heads=2, backend=backend), [qkv]),
        outputs_and_gradients(compiled, [qkv]),
        strict=True,
    ):
        torch.testing.assert_close(found, eager)


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("efficient", "PyTorch's memory-efficient attention needs a GPU"),
        ("cudnn", "cuDNN's attention needs an NVIDIA GPU"),
        ("xformers", r"xFormers is not installed \(pip install 'fastvitc\[xformers\]'\)"),
    ],
)
def test_a_backend_that_cannot_run_here_says_why(backend, words, monkeypatch):
    monkeypatch.setattr(sys.modules["fastvitc.kernels.attention"], "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=f"{backend}' is not available on cpu: {words}; usable here"):
        attention(torch.zeros(1, 2, 48, device="cpu"), 2, backend=backend)


def test_xformers_needs_a_gpu_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(sys.modules["fastvitc.kernels.attention"], "find_spec", lambda name: object())
    with pytest.raises(BackendUnavailable, match="xFormers' attention needs a GPU"):
        attention(torch.zeros(1, 2, 48, device="cpu"), 2, backend="xformers")


def test_an_input_that_an_explicit_backend_does_not_take_is_refused_and_auto_takes_another(monkeypatch):
    from fastvitc.kernels.attention import library

    monkeypatch.setattr(library, "unfit", lambda *args: f"no kernel for {args}")
    qkv = torch.randn(1, 2, 48, device="cpu", requires_grad=True)
    with pytest.raises(BackendUnavailable, match=r"'flash' cannot run: no kernel for .*float32, 8, True"):
        attention(qkv, 2, backend={"attention": "flash"})
    measured = Measured("flash", {"torch": 2.0, "flash": 1.0}, {})
    record(torch.device("cpu"), torch.float32, {"attention": measured})
    assert torch.equal(attention(qkv, 2), attention(qkv, 2, backend="torch"))


def test_the_librarys_kernels_are_asked_on_a_gpu_only_once_per_kind_of_input(monkeypatch):
    from fastvitc.kernels.attention import library

    asked = []

    def can_use(params, debug):
        asked.append((params.query.dtype, params.query.shape[-1], torch.backends.cuda.math_sdp_enabled()))
        return params.query.dtype != torch.float32

    empty = torch.empty
    monkeypatch.setitem(library._CAN_USE, "flash", can_use)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(torch, "empty", lambda *size, device, **kw: empty(*size, **kw))
    library._fits.cache_clear()
    for _ in range(2):
        assert library.unfit("flash", "cuda", torch.bfloat16, 64, True) is None
        reason = library.unfit("flash", "cuda", torch.float32, 64, False)
    library._fits.cache_clear()
    assert reason == (
        "PyTorch's flash attention does not take torch.float32 with heads of 64 for forward on some GPU"
    )
    assert asked == [(torch.bfloat16, 64, False), (torch.float32, 64, False)]
    assert library.unfit("flash", "cpu", torch.float32, 64, False) is None


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 20), (torch.bfloat16, 20), (torch.float16, 8)])
@pytest.mark.parametrize("tokens", [7, 50])
def test_large_negative_scores_leave_the_gradient_finite(dtype, size, tokens):
    direction = torch.ones(16) * size
    q, k = direction + torch.rand(tokens, 16), -direction + torch.rand(tokens, 16)
    qkv = torch.stack([q, k, torch.randn(tokens, 16)], 1).reshape(1, tokens, 48).to(dtype)
    grad = torch.randn(1, tokens, 16).to(dtype)
    found = outputs_and_gradients(partial(attention, num_heads=1, backend="triton"), [qkv], [grad])
    exact = outputs_and_gradients(partial(by_steps, heads=1), [qkv.double()], [grad])
    for f, e in zip(
        found, exact, strict=True
    ):  # scores in the thousands carry errors of a thousand roundings
        torch.testing.assert_close(
            f.double(), e, rtol=0, atol=3000 * torch.finfo(dtype).eps * e.abs().max().item()
        )


def test_heads_too_large_for_the_triton_kernels_are_refused():
    with pytest.raises(BackendUnavailable, match="heads of up to 128, not 256"):
        attention(torch.zeros(1, 2, 3 * 256), 1, backend="triton")
