"""Values and gradients of `conv_stem`, on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_no_worse_than_library, assert_same_bits_on_one_thread_and_two, outputs_and_gradients
from stem_cases import CASES, EXACT, OWN, Case

from fastvitc.kernels.batch_norm import merge
from fastvitc.kernels.conv_stem.triton import tiles

pytestmark = pytest.mark.usefixtures("nan_memory", "kernel_device")

#: The widths of the paper's stems, by pairs of neighbours.
WIDTHS = [(3, 24), (24, 48), (48, 96), (96, 192), (3, 64), (64, 128), (128, 256), (256, 512)]


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_statistics_match_the_layers_in_float64(backend, training, name):
    case = CASES[name]
    args = case.inputs()
    expected = outputs_and_gradients(case.layer_by_layer(training), args)
    expected += case.statistics
    found = outputs_and_gradients(case.ours(backend, training), args)
    found += case.statistics
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["4-stage", "strides-1-and-2", "odd-sides", "closing-4x4", "patchify"])
def test_values_and_gradients_err_at_most_twice_as_much_as_the_library(backend, training, dtype, name):
    case = CASES[name]
    args = case.inputs(dtype)
    grad = torch.randn(case.batch, case.tokens(), case.width)
    ours, library = case.ours(backend, training), case.layer_by_layer(training)
    assert_no_worse_than_library(ours, library, args, [grad], roundings=2 * len(case.channels))


@pytest.mark.parametrize("backend", EXACT)
@settings(max_examples=10, deadline=None)
@given(
    channels=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    stride=st.sampled_from([1, 2]),
    height=st.integers(4, 11),
    width=st.integers(4, 11),
    training=st.booleans(),
    class_token=st.booleans(),
)
def test_any_stem_matches_its_layers(backend, channels, stride, height, width, training, class_token):
    strides = (stride,) * (len(channels) - 1)
    case = Case(tuple(channels), strides, 5, (height, width), class_token=class_token)
    args = case.inputs()
    expected = outputs_and_gradients(case.layer_by_layer(training), args)
    found = outputs_and_gradients(case.ours(backend, training), args)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("channels", "stride", "dtype"),
    [
        *((pair, 2, torch.bfloat16) for pair in WIDTHS),
        *((pair, 1, torch.bfloat16) for pair in WIDTHS[:5]),
        *((pair, 2, torch.float32) for pair in WIDTHS[:2]),
    ],
)
def test_every_width_of_the_models_errs_at_most_twice_as_much_as_the_library(channels, stride, dtype):
    case = Case(channels, (stride,), 20, (5, 6))
    args = case.inputs(dtype)
    grad = torch.randn(case.batch, case.tokens(), case.width)
    ours, library = case.ours("triton", True), case.layer_by_layer(True)
    assert_no_worse_than_library(ours, library, args, [grad], roundings=4, terms=9 * channels[0])


@settings(max_examples=8, deadline=None)
@given(
    channels=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    stride=st.sampled_from([1, 2, 3]),
    height=st.integers(4, 11),
    width=st.integers(4, 11),
    training=st.booleans(),
    class_token=st.booleans(),
)
def test_any_stem_on_triton_errs_at_most_twice_as_much_as_the_library(
    channels, stride, height, width, training, class_token
):
    strides = (stride,) * (len(channels) - 1)
    case = Case(tuple(channels), strides, 5, (height, width), class_token=class_token)
    grad = torch.randn(case.batch, case.tokens(), case.width)
    ours, library = case.ours("triton", training), case.layer_by_layer(training)
    assert_no_worse_than_library(ours, library, case.inputs(torch.float32), [grad], roundings=16, terms=400)


def test_many_tiles_and_parts_merge_to_the_same_result(monkeypatch):
    monkeypatch.setattr(merge, "_SPAN", 4)
    monkeypatch.setitem(merge._TILE, "BS", 2)
    monkeypatch.setattr(tiles, "_LEAST_ROWS", 64)
    case = Case((3, 8, 12), (2, 1), 12, (31, 23), batch=2)
    args = case.inputs(torch.float32)
    grad = torch.randn(case.batch, case.tokens(), case.width)
    ours, library = case.ours("triton", True), case.layer_by_layer(True)
    assert_no_worse_than_library(ours, library, args, [grad], roundings=8, terms=3000)


@pytest.mark.parametrize("backend", ["bn_relu", "native"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["strides-1-and-2", "odd-sides", "one-channel", "plain", "patchify"])
def test_the_library_with_bn_relu_between_its_convolutions_is_as_exact(backend, training, dtype, name):
    case = CASES[name]
    grad = torch.randn(case.batch, case.tokens(), case.width)
    ours, library = case.ours(backend, training), case.layer_by_layer(training)
    assert_no_worse_than_library(ours, library, case.inputs(dtype), [grad], roundings=10)


def test_native_gives_the_same_bits_again_and_on_two_threads():
    case = CASES["4-stage"]
    args = case.inputs(torch.bfloat16)
    assert_same_bits_on_one_thread_and_two(lambda: outputs_and_gradients(case.ours("native", True), args))


@pytest.mark.parametrize("backend", OWN)
def test_results_repeat_bitwise(backend):
    case = CASES["4-stage"]
    args = case.inputs(torch.bfloat16)
    first, second = (outputs_and_gradients(case.ours(backend, True), args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", [*OWN, "torch", "native"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_keeps_statistics_and_positions_in_float32(backend, training):
    case = CASES["4-stage"]
    args = case.inputs(torch.float32)
    with torch.autocast(args[0].device.type, torch.bfloat16):
        tokens = case.ours(backend, training)(*args)
    assert tokens.dtype == torch.float32
    assert all(s.dtype == torch.float32 for s in case.statistics)
    exact = case.layer_by_layer(training)(*args)
    assert (tokens - exact).abs().max() < 0.15
    assert not torch.equal(tokens, exact)


@pytest.mark.parametrize("backend", [*OWN, "native"])
def test_a_diverged_input_shows(backend):
    case = CASES["4-stage"]
    image, *rest = case.inputs(torch.float32)
    image[0, 0, 3, 3] = float("nan")
    assert case.ours(backend, True)(image, *rest).isnan().any()
    assert case.ours(backend, False)(image, *rest).isnan().any()


@pytest.mark.parametrize("backend", [*OWN, "native"])
def test_the_gradient_of_the_image_is_only_made_where_asked(backend):
    case = CASES["odd-sides"]
    image, *parameters = case.inputs(torch.float32)
    parameters = [p.requires_grad_() for p in parameters]
    out = case.ours(backend, True)(image, *parameters)
    found = torch.autograd.grad(out.sum(), parameters)
    expected = outputs_and_gradients(case.layer_by_layer(True), [image, *parameters])[2:]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)
