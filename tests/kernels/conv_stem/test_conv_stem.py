from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_no_worse_than_library, assert_same_bits_on_one_thread_and_two, outputs_and_gradients

from fastvitc.kernels import conv_stem
from fastvitc.kernels.batch_norm import merge
from fastvitc.kernels.conv_stem import pixels
from fastvitc.kernels.conv_stem.ends import scaled_pixels
from fastvitc.kernels.conv_stem.triton import tiles

OWN = ["reference", "triton"]
EXACT = ["reference", "torch"]  # compute in float64 too
pytestmark = pytest.mark.usefixtures("nan_memory", "kernel_device")


@dataclass
class Case:
    """A stem: channels of image and 3x3 layers, strides of the layers, width, and the kernel of the closing one."""

    channels: tuple[int, ...] = (3, 8, 16)
    strides: tuple[int, ...] = (2, 2)
    width: int = 24
    image: tuple[int, int] = (16, 16)
    batch: int = 2
    class_token: bool = True
    positions: bool = True
    closing: int = 1
    statistics: list = field(default_factory=list)

    def inputs(self, dtype=torch.float64):
        """[image, convs, weights, biases, proj weight, proj bias, class token?, positions?], flat."""
        layers = list(zip(self.channels, self.channels[1:], strict=False))
        scale = [(9 * i) ** -0.5 for i, _ in layers]
        flat = [torch.randn(self.batch, self.channels[0], *self.image)]
        flat += [s * torch.randn(o, i, 3, 3) for s, (i, o) in zip(scale, layers, strict=True)]
        flat += [torch.rand(o) + 0.5 for _, o in layers]
        flat += [torch.randn(o) for _, o in layers]
        flat += [
            0.1 * torch.randn(self.width, self.channels[-1], self.closing, self.closing),
            torch.randn(self.width),
        ]
        tokens = self.tokens()
        flat += [torch.randn(1, 1, self.width)] if self.class_token else []
        flat += [torch.randn(1, tokens, self.width)] if self.positions else []
        return [t.to(dtype) for t in flat]

    def tokens(self):
        height, width = self.image
        for stride in self.strides:
            height, width = ((side - 1) // stride + 1 for side in (height, width))
        return (height // self.closing) * (width // self.closing) + self.class_token

    def split(self, flat):
        n = len(self.strides)
        image, convs, weights, biases = (
            flat[0],
            flat[1 : n + 1],
            flat[n + 1 : 2 * n + 1],
            flat[2 * n + 1 : 3 * n + 1],
        )
        rest = list(flat[3 * n + 1 :])
        proj = rest.pop(0), rest.pop(0)
        class_token = rest.pop(0) if self.class_token else None
        positions = rest.pop(0) if self.positions else None
        wide = torch.promote_types(image.dtype, torch.float32)
        self.statistics = [torch.linspace(-0.5, 0.5, c, dtype=wide) for c in self.channels[1:]]
        self.statistics += [torch.linspace(0.5, 1.5, c, dtype=wide) for c in self.channels[1:]]
        vectors = [v.to(wide) for v in weights], [v.to(wide) for v in biases]
        return image, convs, *vectors, self.statistics[:n], self.statistics[n:], *proj, class_token, positions

    def ours(self, backend, training):
        n = len(self.strides)
        sizes = {"strides": (*self.strides, self.closing), "paddings": (1,) * n + (0,)}
        return lambda *flat: conv_stem(*self.split(flat), training, backend=backend, **sizes)

    def layer_by_layer(self, training):
        def run(*flat):
            x, convs, weights, biases, means, variances, weight, bias, class_token, positions = self.split(
                flat
            )
            for w, g, b, m, v, stride in zip(
                convs, weights, biases, means, variances, self.strides, strict=True
            ):
                x = F.relu(F.batch_norm(F.conv2d(x, w, None, stride, 1), m, v, g, b, training))
            x = F.conv2d(x, weight, bias, self.closing).flatten(2).mT
            if class_token is not None:
                x = torch.cat([class_token.expand(len(x), -1, -1), x], 1)
            return x if positions is None else x + positions

        return run


CASES = {
    "4-stage": Case((3, 8, 12, 16, 24), (2, 2, 2, 2), 24, (32, 32)),
    "strides-1-and-2": Case((3, 6, 8, 8, 10), (2, 2, 1, 2), 12, (24, 16)),
    "odd-sides": Case((3, 5, 7), (2, 2), 9, (17, 13)),
    "one-channel": Case((1, 4), (2,), 6, (8, 10)),
    "no-class-token": Case(class_token=False),
    "no-positions": Case(positions=False),
    "plain": Case(class_token=False, positions=False),
    "closing-4x4": Case((3, 8), (2,), 12, (16, 24), closing=4),
    "patchify": Case((3,), (), 16, (16, 24), closing=8),
}
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


@pytest.mark.parametrize("backend", [*OWN, "torch", "bn_relu", "native"])
@pytest.mark.parametrize("training", [True, False])
def test_a_uint8_image_is_normalised_before_it_is_padded(backend, training):
    case = CASES["odd-sides"]
    _, *rest = case.inputs(torch.float32)
    image = torch.randint(256, (case.batch, 3, *case.image), dtype=torch.uint8)
    scale, shift = torch.tensor([0.01, 0.02, 0.03]), torch.tensor([-1.0, -2.0, 3.0])
    n = len(case.strides)
    sizes = {"strides": (*case.strides, 1), "paddings": (1,) * n + (0,), "backend": backend}
    split = case.split([image, *rest])
    tokens = conv_stem(*split, training, pixel_scale=scale, pixel_shift=shift, **sizes)
    normal = image * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    torch.testing.assert_close(tokens, case.layer_by_layer(training)(normal, *rest), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [*OWN, "native"])
def test_the_gradient_of_a_scaled_image_is_scaled(backend):
    case = CASES["odd-sides"]
    image, *rest = case.inputs(torch.float32)
    scale, shift = torch.tensor([0.5, 2.0, -3.0]), torch.tensor([-1.0, 0.0, 3.0])
    sizes = {"strides": (2, 2, 1), "paddings": (1, 1, 0), "pixel_scale": scale, "pixel_shift": shift}

    def scaled(image, *rest):
        return case.layer_by_layer(True)(image * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), *rest)

    def ours(image, *rest):
        return conv_stem(*case.split([image, *rest]), True, backend=backend, **sizes)

    expected = outputs_and_gradients(scaled, [image, *rest])
    for f, e in zip(outputs_and_gradients(ours, [image, *rest]), expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["bn_relu", "native"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["strides-1-and-2", "odd-sides", "one-channel", "plain", "patchify"])
def test_the_library_with_bn_relu_between_its_convolutions_is_as_exact(backend, training, dtype, name):
    case = CASES[name]
    grad = torch.randn(case.batch, case.tokens(), case.width)
    ours, library = case.ours(backend, training), case.layer_by_layer(training)
    assert_no_worse_than_library(ours, library, case.inputs(dtype), [grad], roundings=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 17, 13), (1, 1, 5, 7), (2, 4, 3, 3)])
def test_native_pixels_are_the_normalisation_rounded_once_whatever_the_strides(shape, dtype):
    image = torch.randint(256, shape, dtype=torch.uint8)
    scale, shift = torch.rand(shape[1]) / 50, torch.randn(shape[1])
    expected = scaled_pixels(image, scale, shift).to(dtype)
    spread = torch.stack([image, image + 1], -1)[..., 0]
    for same in (
        image,
        image.contiguous(memory_format=torch.channels_last),
        spread,
        image.mT.contiguous().mT,
    ):
        found = pixels._pixels(same, scale, shift, dtype)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, expected)
    torch.library.opcheck(torch.ops.fastvitc.native_pixels.default, (image, scale, shift, dtype))


def test_native_gives_the_same_bits_again_and_on_two_threads():
    case = CASES["4-stage"]
    args = case.inputs(torch.bfloat16)
    assert_same_bits_on_one_thread_and_two(lambda: outputs_and_gradients(case.ours("native", True), args))


@pytest.mark.parametrize("training", [True, False])
def test_native_compiles_as_one_graph_from_a_uint8_image(training):
    case = CASES["odd-sides"]
    _, *rest = case.inputs(torch.float32)
    image = torch.randint(256, (case.batch, 3, *case.image), dtype=torch.uint8)
    sizes = {"strides": (2, 2, 1), "paddings": (1, 1, 0), "backend": "native"}
    pixels = {"pixel_scale": torch.full((3,), 0.01), "pixel_shift": torch.full((3,), -1.0)}

    def run(*rest):
        return conv_stem(*case.split([image, *rest]), training, **pixels, **sizes)

    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    for f, e in zip(outputs_and_gradients(compiled, rest), outputs_and_gradients(run, rest), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_native_refuses_float64_with_the_backend_that_takes_it(training):
    case = CASES["plain"]
    with pytest.raises(TypeError, match=r"takes float32, float16 or bfloat16, got torch\.float64"):
        case.ours("native", training)(*case.inputs())


@pytest.mark.parametrize("backend", [*OWN, "native"])
def test_any_strides_of_image_weights_and_gradient_are_taken(backend):
    case = CASES["odd-sides"]
    args = case.inputs(torch.float32)
    grad = torch.randn(case.width, case.tokens(), case.batch).permute(2, 1, 0)
    expected = outputs_and_gradients(case.ours(backend, True), args, [grad.contiguous()])

    def spread(t):
        """The same values with gaps between them."""
        return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]

    found = outputs_and_gradients(case.ours(backend, True), [spread(t) for t in args], [grad])
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)
    args = [t.requires_grad_() for t in args]
    whole, parts = (
        torch.autograd.grad((case.ours(backend, True)(*args) * factor).sum(), args)
        for factor in (1.0, torch.ones(1, 1, 1).expand(case.batch, case.tokens(), case.width))
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("backend", OWN)
def test_evaluation_keeps_nothing_for_backward_where_no_gradient_is_asked(backend):
    case = CASES["4-stage"]
    args = case.inputs(torch.float32)
    saved = []

    def note(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        plain = case.ours(backend, False)(*args)
        assert not saved
        kept = case.ours(backend, False)(*(t.requires_grad_() for t in args))
    assert sum(t.dim() == 4 and t.shape[0] == case.batch for t in saved) == 1 + len(case.strides)
    torch.testing.assert_close(plain, kept.detach(), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("backend", OWN)
def test_results_repeat_bitwise(backend):
    case = CASES["4-stage"]
    args = case.inputs(torch.bfloat16)
    first, second = (outputs_and_gradients(case.ours(backend, True), args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["odd-sides", "plain", "patchify"])
def test_registration_passes_opcheck(backend, training, name):
    case = CASES[name]
    image, *lists, means, variances, proj_weight, proj_bias, class_token, positions = case.split(
        [t.requires_grad_() for t in case.inputs(torch.float32)]
    )
    parameters = [*(t for part in lists for t in part), proj_weight, proj_bias]
    geometry = [*case.strides, case.closing], [1] * len(case.strides) + [0], 1e-5, ""
    ends = class_token, positions, training, True, torch.float32, backend
    args = (image, parameters, [], *geometry, [*means, *variances], *ends)
    torch.library.opcheck(torch.ops.fastvitc.conv_stem.default, args)


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


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)},
            TypeError,
            "uint8 with pixel_scale and pixel_shift, got torch.uint8 without them",
        ),
        ({"strides": (2, 0, 1)}, ValueError, r"strides must be integers from 1 .* got \(2, 0, 1\)"),
        ({"paddings": (1, -1, 0)}, ValueError, "paddings from 0"),
        (
            {"bn_biases": [torch.zeros(8).int(), torch.zeros(16)]},
            TypeError,
            r"bn_biases\[0\] must be a floating",
        ),
        ({"proj_weight": torch.zeros(24, 16, 1, 1).half()}, TypeError, "must share a dtype"),
        ({"pixel_scale": torch.ones(3)}, ValueError, "go together, got only pixel_scale"),
        (
            {"pixel_scale": torch.ones(2), "pixel_shift": torch.zeros(3)},
            ValueError,
            r"pixel_scale must be \(3,\)",
        ),
        (
            {"image": torch.zeros(2, 3, 16, 16).half(), "backend": "triton"},
            TypeError,
            "one dtype, got torch.float16",
        ),
        ({"image": torch.zeros(3, 16, 16)}, ValueError, r"\(B, C, H, W\)"),
        ({"image": torch.zeros(2, 4, 16, 16)}, ValueError, r"convolution 0 needs a weight \(out, 4, k, k\)"),
        ({"strides": (2, 2)}, ValueError, "n \\+ 1"),
        ({"conv_weights": []}, ValueError, "need n entries"),
        ({"proj_bias": torch.zeros(24, device="meta")}, ValueError, "proj_bias is on meta and image on"),
        ({"proj_bias": torch.zeros(3)}, ValueError, r"vectors of convolution 2 must be \(24,\)"),
        ({"class_token": torch.zeros(1, 24)}, ValueError, "class_token must be"),
        (
            {"pos_embed": torch.zeros(1, 16, 24)},
            ValueError,
            r"pos_embed must be \(1, 17, 24\) for a 4x4 grid",
        ),
    ],
)
def test_bad_input_raises_one_clear_error(change, error, words):
    names = "image conv_weights bn_weights bn_biases running_means running_vars proj_weight proj_bias"
    names += " class_token pos_embed"
    case = Case()
    arguments = dict(zip(names.split(), case.split(case.inputs(torch.float32)), strict=True))
    device = arguments["image"].device
    moved = {n: v.to(device) for n, v in change.items() if isinstance(v, torch.Tensor) and not v.is_meta}
    arguments |= {"strides": (2, 2, 1), "paddings": (1, 1, 0)} | change | moved
    with pytest.raises(error, match=words):
        conv_stem(**arguments)


@pytest.mark.parametrize("backend", OWN)
def test_the_gradients_of_class_token_and_positions_add_up_apart(backend):
    case = CASES["odd-sides"]
    args = [t.requires_grad_() for t in case.inputs(torch.float32)]
    run = torch.compile(case.ours(backend, False), backend="aot_eager")
    once = torch.autograd.grad(case.ours(backend, False)(*args).sum(), args)
    for _ in range(2):
        run(*args).sum().backward()
    class_token, positions = args[-2:]
    assert class_token.grad.untyped_storage().data_ptr() != positions.grad.untyped_storage().data_ptr()
    for tensor, gradient in zip(args, once, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [*OWN, "native"])
def test_no_images_give_no_tokens_and_zero_gradients(backend):
    case = CASES["odd-sides"]
    image, *rest = case.inputs(torch.float32)
    found = outputs_and_gradients(case.ours(backend, False), [image[:0], *rest])
    assert found[0].shape == (0, case.tokens(), case.width)
    assert not any(gradient.any() for gradient in found[1:])


@pytest.mark.parametrize("backend", [*OWN, "torch", "native"])
def test_a_layer_without_output_is_refused(backend):
    case = Case((3, 4), (1,), 4, (2, 2))
    image, convs, *rest = case.split(case.inputs(torch.float32))
    sizes = {"strides": (1, 1), "paddings": (0, 1), "backend": backend}
    with pytest.raises(ValueError, match="an image of 2x2 leaves no tokens"):
        conv_stem(image, convs, *rest[:-1], None, **sizes)


def test_an_image_without_tokens_is_refused():
    case = Case((3,), (), 4, (16, 16), closing=8)
    _, *rest = case.split(case.inputs(torch.float32))
    with pytest.raises(ValueError, match="an image of 4x4 leaves no tokens"):
        conv_stem(torch.zeros(1, 3, 4, 4), *rest, strides=(8,), paddings=(0,))
