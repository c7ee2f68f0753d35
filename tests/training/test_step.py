import pytest
import torch
from small_models import batch, evaluator, small, train_step, triple, weights
from torchvision.transforms import v2

from fastvitc.models.stems import IMAGENET_MEAN, IMAGENET_STD
from fastvitc.training.step import Normalize, Objective, compiled_graphs


def test_normalize_equals_torchvisions():
    images = torch.randint(256, (2, 3, 9, 5), dtype=torch.uint8)
    theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    torch.testing.assert_close(Normalize()(images), theirs(images))


def test_normalize_adds_nothing_to_a_state():
    assert not Normalize().state_dict()


def test_two_accumulated_halves_step_like_the_whole_batch():
    halves = [triple(4), triple(4)]
    whole = (torch.cat([halves[0][0], halves[1][0]]), torch.cat([halves[0][1], halves[1][1]]), None)
    whole_model, halves_model = small("vitp_nano"), small("vitp_nano")
    train_step(whole_model)([whole])
    train_step(halves_model, accumulate=2)(halves)
    assert not torch.equal(whole_model.head.weight, small("vitp_nano").head.weight)
    torch.testing.assert_close(weights(halves_model), weights(whole_model), rtol=1e-4, atol=1e-6)


def test_the_returned_loss_is_the_mean_over_accumulated_batches():
    batches = [triple(4), triple(4), triple(4)]
    model = small("vitp_nano")
    objective = Objective(model, dtype=torch.float32)
    expected = torch.stack([objective(*b) for b in batches]).mean().detach()
    loss = train_step(model, accumulate=3)(batches)
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad


def update_norm(clip_grad):
    model = small("vitp_nano")
    before = weights(model)
    train_step(model, lr=0.5, clip_grad=clip_grad)([triple(4)])
    return torch.stack([(p - before[n]).norm() for n, p in weights(model).items()]).norm().item()


def test_clipping_bounds_the_update_by_rate_times_norm():
    assert update_norm(None) > 0.5 * 0.01
    assert update_norm(0.01) == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_a_norm_that_is_not_reached_clips_nothing():
    torch.manual_seed(5)
    free = update_norm(None)
    torch.manual_seed(5)
    assert update_norm(1e6) == pytest.approx(free, rel=1e-6)


def test_no_gradient_is_left_after_a_step():
    model = small("vitc_nano")
    train_step(model)([triple(4)])
    assert all(p.grad is None for p in model.parameters())


def test_a_step_trains_in_training_mode_even_after_an_evaluation():
    model = small("vitc_nano")
    evaluator(model, 4)([batch(4)])
    before = model.stem.norms[0].running_mean.clone()
    train_step(model)([triple(4)])
    assert model.training
    assert not torch.equal(model.stem.norms[0].running_mean, before)


def test_bf16_runs_the_model_in_bf16_and_keeps_weights_and_statistics_in_float32():
    model, dtypes = small("vitc_nano"), []
    model.head.register_forward_hook(lambda _module, _args, out: dtypes.append(out.dtype))
    loss = train_step(model, dtype=torch.bfloat16)([triple(4)])
    assert dtypes == [torch.bfloat16]
    assert loss.dtype == torch.float32
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float32}


@pytest.mark.slow
def test_training_and_evaluation_compile_two_graphs_in_all_and_compute_the_eager_losses():
    torch.compiler.reset()
    before, batches, losses = compiled_graphs(), [triple(4) for _ in range(3)], []
    for compile in (True, False):
        model, curve = small("vitc_nano"), []
        step, evaluate = train_step(model, lr=0.01, compile=compile), evaluator(model, 4, compile=compile)
        for images, labels, _ in batches:
            curve.append(step([(images, labels, None)]).item())
            curve.append(evaluate([(images, labels), (images[:3], labels[:3])]).loss)
        losses.append(curve)
    assert compiled_graphs() - before == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-4)
