import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, batch, evaluator, normal, small, train_step, triple, weights

from fastvitc.kernels.conv_stem.pixels import mixed
from fastvitc.training.mix import Mixing, share_of_own
from fastvitc.training.step import Objective, compiled_graphs


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


MIX = torch.tensor([0.3, 4, 20, 0, 32])


def test_the_model_mixes_the_pixels_of_a_training_step():
    model, (images, labels) = small("vitc_nano").train(), batch(4)
    loss = Objective(model, dtype=torch.float32)(images, labels, MIX)
    logits, share = model(mixed(normal(images), MIX)), share_of_own(MIX, (32, 32))
    losses = (F.cross_entropy(logits, targets) for targets in (labels, labels.roll(1)))
    expected = sum(part * loss for part, loss in zip((share, 1 - share), losses, strict=True))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_training_and_evaluation_compile_the_stem_and_one_block_and_compute_the_eager_losses():
    torch.compiler.reset()
    before, batches, losses = compiled_graphs(), [triple(4) for _ in range(3)], []
    for compile in (True, False):
        model, curve = small("vitc_nano", depth=3), []
        step, evaluate = train_step(model, lr=0.01, compile=compile), evaluator(model, 4, compile=compile)
        for i, (images, labels, _) in enumerate(batches):
            mix = Mixing().sample((32, 32), (i,))
            curve.append(step([(images, labels, mix)]).item())
            curve.append(evaluate([(images, labels), (images[:3], labels[:3])]).loss)
        losses.append(curve)
    assert compiled_graphs() - before == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-4)


def test_binary_cross_entropy_is_that_of_the_smoothed_targets_of_each_class():
    model, (images, labels, _) = small("vitp_nano"), triple(6)
    target = torch.full((6, CLASSES), 0.1 / CLASSES)
    target[torch.arange(6), labels] += 0.9
    expected = F.binary_cross_entropy_with_logits(model(images), target)
    objective = Objective(model, dtype=torch.float32, label_smoothing=0.1, bce=True)
    torch.testing.assert_close(objective(images, labels, None), expected)
    mix = Mixing(1.0, 0.0).sample((32, 32), (0,))
    share = mix[0]
    expected = F.binary_cross_entropy_with_logits(
        model(images, mix), share * target + (1 - share) * target.roll(1, 0)
    )
    torch.testing.assert_close(objective(images, labels, mix), expected)


@pytest.mark.parametrize("clip_grad", [None, 1e6])
def test_fp16_steps_with_a_scaled_loss_as_without(clip_grad):
    given = triple(4)
    plain, scaled = small("vitp_nano"), small("vitp_nano")
    train_step(plain)([given])
    step = train_step(scaled, dtype=torch.float16, clip_grad=clip_grad)
    assert step.scaler.get_scale() == 2**16  # too much for the gradients of these weights
    step.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    step([given])
    before = small("vitp_nano")
    for name, expected in weights(plain).items():
        moved = expected - weights(before)[name]
        assert (weights(scaled)[name] - expected).norm() <= 0.05 * moved.norm() + 1e-6, name


def test_an_fp16_step_whose_gradients_overflow_is_left_out_and_halves_the_scale():
    model = small("vitp_nano")
    step = train_step(model, dtype=torch.float16)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = weights(model)
    step([triple(4)])
    assert step.scaler.get_scale() == 2.0**59
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
