"""What `conv_stem` promises beside its values: registration, layouts, what it keeps, and what it refuses."""

import pytest
import torch
from oracle import outputs_and_gradients
from stem_cases import CASES, OWN, Case

from fastvitc.kernels import Layers, Pixels, conv_stem
from fastvitc.kernels.conv_stem.arguments import Stem

pytestmark = pytest.mark.usefixtures("nan_memory", "kernel_device")


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


def vectors():
    return torch.tensor([0.01, 0.02, 0.03]), torch.tensor([-1.0, -2.0, 3.0])


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["odd-sides", "plain", "patchify", "mixed"])
def test_registration_passes_opcheck(backend, training, name):
    case, pixels = CASES["odd-sides" if name == "mixed" else name], Pixels()
    flat = [t.requires_grad_() for t in case.inputs(torch.float32)]
    if name == "mixed":
        flat[0], pixels = case.uint8_image(), Pixels(*vectors(), torch.tensor([0.3, 2, 9, 0, 13]))
    image, layers, *ends = case.arguments(flat)
    stem = Stem(layers, pixels, training, 1e-5, "")
    args = image, *stem.packed(), *ends, True, torch.float32, backend
    torch.library.opcheck(torch.ops.fastvitc.conv_stem.default, args)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)},
            TypeError,
            "uint8 with pixels.scale and pixels.shift, got torch.uint8 without them",
        ),
        ({"strides": (2, 0, 1)}, ValueError, r"strides must be integers from 1 .* got \(2, 0, 1\)"),
        ({"paddings": (1, -1, 0)}, ValueError, "paddings from 0"),
        (
            {"bn_biases": [torch.zeros(8).int(), torch.zeros(16)]},
            TypeError,
            r"bn_biases\[0\] must be a floating",
        ),
        ({"proj_weight": torch.zeros(24, 16, 1, 1).half()}, TypeError, "must share a dtype"),
        ({"pixels": Pixels(torch.ones(3))}, ValueError, "go together, got only scale"),
        ({"pixels": Pixels(shift=torch.ones(3))}, ValueError, "go together, got only shift"),
        ({"pixels": Pixels(torch.ones(2), torch.zeros(3))}, ValueError, r"pixels.scale must be \(3,\)"),
        (
            {"pixels": Pixels(torch.ones(3).int(), torch.zeros(3))},
            TypeError,
            r"pixels.scale must be a floating",
        ),
        (
            {"pixels": Pixels(mix=torch.zeros(4))},
            ValueError,
            r"pixels.mix must be \(5,\) float32, got \(4,\) torch.float32",
        ),
        ({"pixels": Pixels(mix=torch.zeros(5).double())}, ValueError, r"got \(5,\) torch.float64"),
        (
            {"pixels": Pixels(mix=torch.zeros(5, device="meta"))},
            ValueError,
            "pixels.mix is on meta and image on",
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
    case = Case()
    image, layers, class_token, pos_embed = case.arguments(case.inputs(torch.float32))
    moved = {
        n: v.to(image.device) for n, v in change.items() if isinstance(v, torch.Tensor) and not v.is_meta
    }
    change = change | moved
    layers = layers._replace(**{name: change.pop(name) for name in Layers._fields if name in change})
    arguments = {"image": image, "class_token": class_token, "pos_embed": pos_embed} | change
    with pytest.raises(error, match=words):
        conv_stem(layers=layers, **arguments)


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
    image, layers, class_token, _ = case.arguments(case.inputs(torch.float32))
    layers = layers._replace(paddings=(0, 1))
    with pytest.raises(ValueError, match="an image of 2x2 leaves no tokens"):
        conv_stem(image, layers, class_token, backend=backend)


def test_an_image_without_tokens_is_refused():
    case = Case((3,), (), 4, (16, 16), closing=8)
    _, layers, *ends = case.arguments(case.inputs(torch.float32))
    with pytest.raises(ValueError, match="an image of 4x4 leaves no tokens"):
        conv_stem(torch.zeros(1, 3, 4, 4), layers, *ends)
