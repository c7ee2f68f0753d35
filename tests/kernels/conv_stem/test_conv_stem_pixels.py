"""From pixels to the first convolution: normalisation and mixing, on every backend."""

from dataclasses import replace

import pytest
import torch
from oracle import assert_no_worse_than_library, outputs_and_gradients
from stem_cases import CASES, EXACT, OWN, Case

from fastvitc.kernels import Pixels
from fastvitc.kernels.conv_stem import native
from fastvitc.kernels.conv_stem.pixels import mixed, normalized

pytestmark = pytest.mark.usefixtures("nan_memory", "kernel_device")

ALL = [*OWN, "torch", "bn_relu", "native"]
SMALL = CASES["odd-sides"]
CASES_TO_MIX = {
    "odd sides": replace(SMALL, batch=3),
    "one image": replace(SMALL, batch=1),
    "patchify": CASES["patchify"],
    "wide rows": Case((3, 8), (2,), 8, (9, 40), closing=2),
}


def vectors():
    return torch.tensor([0.01, 0.02, 0.03]), torch.tensor([-1.0, -2.0, 3.0])


def mixup(case, share=0.3):
    height, width = case.image
    return torch.tensor([share, 0, height, 0, width], dtype=torch.float32)


def cutmix(case):
    height, width = case.image
    return torch.tensor([0, 1, height - 2, 2, width], dtype=torch.float32)


def pasted(image, mix):
    """The batch with the box of the image before pasted into each image."""
    top, bottom, left, right = (int(edge) for edge in mix[1:])
    result = image.clone()
    result[:, :, top:bottom, left:right] = image.roll(1, 0)[:, :, top:bottom, left:right]
    return result


def normal(image):
    scale, shift = vectors()
    return image * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)


def test_mixup_adds_the_rolled_batch_by_its_share():
    x = torch.randn(5, 3, 24, 40)
    found = mixed(x, torch.tensor([0.3, 0, 24, 0, 40]))
    torch.testing.assert_close(found, 0.3 * x + 0.7 * x.roll(1, 0))


@pytest.mark.parametrize("image", [torch.randn(4, 3, 24, 40), torch.arange(8640).view(3, 3, 24, 40).byte()])
def test_cutmix_pastes_exactly_the_box_of_the_rolled_batch(image):
    mix = torch.tensor([0.0, 3, 11, 7, 40])
    image = image.to(mix.device)
    assert torch.equal(mixed(image, mix), pasted(image, mix).to(torch.float32))


def test_an_empty_box_changes_nothing():
    x = torch.randn(2, 3, 24, 40)
    assert torch.equal(mixed(x, torch.tensor([0.0, 5, 5, 7, 9])), x)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_a_uint8_image_is_normalised_before_it_is_padded(backend, training):
    _, *rest = SMALL.inputs(torch.float32)
    image = SMALL.uint8_image()
    tokens = SMALL.ours(backend, training, Pixels(*vectors()))(image, *rest)
    expected = SMALL.layer_by_layer(training)(normal(image), *rest)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("name", CASES_TO_MIX)
def test_a_mixed_image_gives_what_its_layers_do_in_float64(backend, name):
    case, mix = CASES_TO_MIX[name], mixup(CASES_TO_MIX[name], 0.25)
    _, *rest = case.inputs()
    image, pixels = case.uint8_image(), Pixels(*(v.double() for v in vectors()), mix)
    share = mix[0].double()
    blended = share * image + (1 - share) * image.roll(1, 0)
    normal = normalized(blended, Pixels(*pixels[:2]))
    expected = outputs_and_gradients(lambda *rest: case.layer_by_layer(True)(normal, *rest), rest)
    found = outputs_and_gradients(lambda *rest: case.ours(backend, True, pixels)(image, *rest), rest)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES_TO_MIX)
def test_mixing_on_load_errs_at_most_twice_as_much_as_the_library(backend, dtype, name):
    case = CASES_TO_MIX[name]
    mix, image = mixup(case), case.uint8_image()
    _, *rest = case.inputs(dtype)
    grad = torch.randn(case.batch, case.tokens(), case.width)

    def ours(*rest):
        with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
            return case.ours(backend, True, Pixels(*vectors(), mix))(image, *rest).to(dtype)

    def library(*rest):
        wide = torch.promote_types(rest[0].dtype, torch.float32)
        share = mix[0].to(wide)
        blended = share * image + (1 - share) * image.roll(1, 0)
        y = normalized(blended, Pixels(*(v.to(wide) for v in vectors()))).to(rest[0].dtype)
        return case.layer_by_layer(True)(y, *rest)

    assert_no_worse_than_library(ours, library, rest, [grad], roundings=10)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_a_box_gives_the_same_bits_as_the_pasted_batch(backend, training):
    case = CASES_TO_MIX["odd sides"]
    _, *rest = case.inputs(torch.float32)
    image, mix = case.uint8_image(), cutmix(case)

    def run(image, mix):
        pixels = Pixels(*vectors(), mix)
        return outputs_and_gradients(lambda *rest: case.ours(backend, training, pixels)(image, *rest), rest)

    for f, e in zip(run(image, mix), run(pasted(image, mix), None), strict=True):
        assert torch.equal(f, e)


@pytest.mark.parametrize("backend", ALL)
def test_the_strides_of_a_mixed_image_change_nothing(backend):
    case = CASES_TO_MIX["odd sides"]
    image, *rest = case.inputs(torch.float32)
    image, run = case.uint8_image(), case.ours(backend, False, Pixels(*vectors(), mixup(case)))
    expected = run(image, *rest)
    spread = torch.stack([image, image + 1], -1)[..., 0]
    for same in (image.contiguous(memory_format=torch.channels_last), spread, image.mT.contiguous().mT):
        torch.testing.assert_close(run(same, *rest), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [*OWN, "native"])
def test_no_images_are_mixed_to_no_tokens(backend):
    _, *rest = SMALL.inputs(torch.float32)
    run = SMALL.ours(backend, False, Pixels(*vectors(), mixup(SMALL)))
    assert run(SMALL.uint8_image()[:0], *rest).shape == (0, SMALL.tokens(), SMALL.width)


@pytest.mark.parametrize("backend", [*OWN, "native"])
def test_the_gradient_of_a_scaled_and_mixed_image_goes_to_both_images(backend):
    image, *rest = SMALL.inputs(torch.float32)
    scale, shift = torch.tensor([0.5, 2.0, -3.0]), torch.tensor([-1.0, 0.0, 3.0])

    def prepared(image, *rest):
        image = 0.3 * image + 0.7 * image.roll(1, 0)
        return SMALL.layer_by_layer(True)(image * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), *rest)

    ours = SMALL.ours(backend, True, Pixels(scale, shift, mixup(SMALL)))
    expected = outputs_and_gradients(prepared, [image, *rest])
    for f, e in zip(outputs_and_gradients(ours, [image, *rest]), expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 17, 13), (1, 1, 5, 7), (2, 4, 3, 3)])
@pytest.mark.parametrize("how", ["as it is", "mixup", "box"])
def test_native_pixels_are_the_formula_rounded_once_whatever_the_strides(shape, dtype, how):
    image = torch.randint(256, shape, dtype=torch.uint8)
    scale, shift = torch.rand(shape[1]) / 50, torch.randn(shape[1])
    height, width = shape[2:]
    mix = {
        "as it is": None,
        "mixup": torch.tensor([0.3, 0, height, 0, width]),
        "box": torch.tensor([0.6, 1, height, 1, width - 1]),
    }[how]
    # The order of the float32 sums differs where pixels are mixed.
    exact = normalized(image, Pixels(scale.double(), shift.double(), mix))
    rounding = 0 if mix is None else 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    spread = torch.stack([image, image + 1], -1)[..., 0]
    channels_last = image.contiguous(memory_format=torch.channels_last)
    for same in (image, channels_last, spread, image.mT.contiguous().mT):
        found = native._pixels(same, scale, shift, mix, dtype)
        assert found.is_contiguous(memory_format=torch.channels_last)
        if mix is None:
            assert torch.equal(found, normalized(image, Pixels(scale, shift)).to(dtype))
        else:
            allowed = torch.finfo(dtype).eps * exact.abs() / 2 + rounding
            assert ((found.double() - exact).abs() <= allowed).all()
    torch.library.opcheck(torch.ops.fastvitc.native_pixels.default, (image, scale, shift, mix, dtype))


@pytest.mark.parametrize("training", [True, False])
def test_native_compiles_as_one_graph_from_a_uint8_image(training):
    _, *rest = SMALL.inputs(torch.float32)
    image, pixels = SMALL.uint8_image(), Pixels(torch.full((3,), 0.01), torch.full((3,), -1.0))

    def run(*rest):
        return SMALL.ours("native", training, pixels)(image, *rest)

    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    for f, e in zip(outputs_and_gradients(compiled, rest), outputs_and_gradients(run, rest), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ALL)
def test_changing_mixes_run_one_compiled_graph(backend):
    torch.compiler.reset()
    _, *rest = SMALL.inputs(torch.float32)
    image, graphs = SMALL.uint8_image(), torch._dynamo.utils.counters["stats"]

    def run(mix, *rest):
        return SMALL.ours(backend, True, Pixels(*vectors(), mix))(image, *rest)

    compiled, before = torch.compile(run, fullgraph=True, backend="aot_eager"), graphs["unique_graphs"]
    for mix in (mixup(SMALL), cutmix(SMALL), mixup(SMALL, 0.9)):
        torch.testing.assert_close(compiled(mix, *rest), run(mix, *rest), rtol=1e-4, atol=1e-4)
    assert graphs["unique_graphs"] == before + 1
