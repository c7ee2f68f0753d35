from dataclasses import replace

import pytest
import torch

from bench.models import trained_like
from fastvitc import UsageError, optimize_for_inference
from fastvitc.models.config import preset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return trained_like(replace(preset("vitc_nano"), depth=1)).eval()


def images(batch):
    return torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8)


@torch.inference_mode()
def test_float32_gives_the_models_logits(model):
    x = images(4)
    torch.testing.assert_close(
        optimize_for_inference(model, dtype=torch.float32)(x), model(x), rtol=1e-4, atol=1e-5
    )


@torch.inference_mode()
def test_bfloat16_errs_no_more_than_twice_as_much_as_autocast(model):
    x = images(8)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(x).float()
    found = optimize_for_inference(model)(x)
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= 2 * (narrow - exact).norm()


def test_other_batch_sizes_and_normalised_images_go_through(model):
    fast = optimize_for_inference(model, dtype=torch.float32)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_the_model_itself_is_left_as_it_is(model):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fast = optimize_for_inference(model)
    fast(images(2))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(m.backend == "auto" for m in model.modules() if hasattr(m, "backend"))


def test_the_compiled_code_takes_at_most_two_of_its_tensors_as_arguments(model, monkeypatch):
    from torch._inductor import freezing

    freeze, kept = freezing.freeze, []

    def spy(*args, **kwargs):
        result = freeze(*args, **kwargs)
        kept.append(len(result[1]))
        return result

    monkeypatch.setattr(freezing, "freeze", spy)
    optimize_for_inference(model)(images(2))
    assert len(kept) == 1
    assert 1 <= kept[0] <= 2  # of some thirty


def test_an_image_of_another_size_is_told_as_by_the_model(model):
    with pytest.raises(ValueError, match=r"this model takes images \(B, 3, 32, 32\), got \(2, 3, 16, 16\)"):
        optimize_for_inference(model)(torch.zeros(2, 3, 16, 16))


def test_it_cannot_be_trained_and_says_so(model):
    with pytest.raises(UsageError, match="cannot be trained"):
        optimize_for_inference(model).train()
    assert not optimize_for_inference(model).eval().training


def test_a_dtype_of_integers_is_refused(model):
    with pytest.raises(UsageError, match=r"floating-point dtype, got torch.int8"):
        optimize_for_inference(model, dtype=torch.int8)
