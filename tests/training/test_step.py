from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvitc import VisionTransformer
from fastvitc.kernels.conv_stem.pixels import mixed
from fastvitc.models.config import preset
from fastvitc.models.stems import IMAGENET_MEAN, IMAGENET_STD
from fastvitc.training.evaluation import Accuracy, Evaluator, precise_batch_norm
from fastvitc.training.mix import Mixing, share_of_own
from fastvitc.training.process import Process
from fastvitc.training.step import Objective, TrainStep, compiled_graphs

HERE = Process(0, 1, torch.device("cpu"))
CLASSES = 7


def small(name, num_classes=CLASSES, drop_path=0.0):
    """A one-block model whose head is not zero, the same at each call."""
    torch.manual_seed(1)
    config = replace(preset(name), depth=1, num_classes=num_classes, drop_path=drop_path)
    model = VisionTransformer(config).to(memory_format=torch.channels_last)
    nn.init.normal_(model.head.weight, std=0.3)
    return model


def batch(count, classes=CLASSES):
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last), torch.randint(classes, (count,))


def triple(count):
    return *batch(count), None


def train_step(model, lr=0.1, **options):
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr)]
    options = {"dtype": torch.float32, "compile": False, **options}
    return TrainStep(model, optimizers, HERE, **options)


def evaluator(model, batch_size, **options):
    return Evaluator(
        model, HERE, **{"dtype": torch.float32, "compile": False, **options}, batch_size=batch_size
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def normal(images):
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255 - mean) / std


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


class FirstPixel(nn.Module):
    """Logits that name the class written in an image's first pixel, as far as there are so many."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        return -(images[:, 0, 0, 0, None] - torch.arange(self.classes)).abs().float()


def written(guesses):
    images = torch.zeros(len(guesses), 3, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(guesses)
    return images


def test_counts_are_exact_with_a_partial_last_batch():
    batches = [
        (written([1, 2, 3, 4]), torch.tensor([1, 2, 9, 8])),  # 2 right; 8 is four from 4: fifth or later
        (written([5, 0, 0]), torch.tensor([5, 5, 0])),  # 2 right
    ]
    accuracy = evaluator(FirstPixel(10), 4)(batches)
    assert (accuracy.images, accuracy.correct) == (7, 4)
    assert accuracy.top1 == pytest.approx(100 * 4 / 7)


def test_padding_is_never_counted():
    # Padded rows repeat the first image, which is right, of a batch of eight.
    accuracy = evaluator(FirstPixel(10), 8)([(written([3]), torch.tensor([3]))])
    assert (accuracy.images, accuracy.correct, accuracy.correct_top5) == (1, 1, 1)
    whole = evaluator(FirstPixel(10), 1)([(written([3]), torch.tensor([3]))])
    assert accuracy.loss == pytest.approx(whole.loss)


def test_top5_takes_the_five_likeliest_classes():
    # The five classes nearest to 0 are 0 to 4.
    accuracy = evaluator(FirstPixel(10), 6)([(written([0] * 6), torch.arange(6))])
    assert (accuracy.correct, accuracy.correct_top5) == (1, 5)


def test_with_fewer_than_five_classes_every_guess_is_in_the_top_5():
    accuracy = evaluator(FirstPixel(3), 4)([(written([0, 1, 2]), torch.tensor([2, 2, 2]))])
    assert (accuracy.correct, accuracy.top5) == (1, 100.0)


def test_evaluation_agrees_with_a_plain_loop():
    model, batches = small("vitc_nano").eval(), [batch(4), batch(4), batch(3)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = model(normal(images))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    accuracy = evaluator(model, 4)(batches)
    loss = F.cross_entropy(logits, labels).item()
    expected = Accuracy(11, int((ranks == 0).sum()), int((ranks < 5).sum()), pytest.approx(loss, rel=1e-5))
    assert accuracy == expected


def test_evaluation_leaves_the_model_in_evaluation_mode_and_its_state_alone():
    model = small("vitc_nano").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluator(model, 4)([batch(4), batch(1)])
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_precise_statistics_are_the_mean_over_batches_in_every_layer():
    model, batches = small("vitc_nano"), [batch(n) for n in (2, 5, 3)]
    means, variances = ([[] for _ in model.stem.norms] for _ in range(2))
    with torch.no_grad():
        for images, _ in batches:
            x = normal(images)
            for i, (conv, norm) in enumerate(zip(model.stem.convs, model.stem.norms, strict=True)):
                x = conv(x)
                means[i].append(x.mean((0, 2, 3)))
                variances[i].append(x.var((0, 2, 3), unbiased=True))
                x = F.relu(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True))
    precise_batch_norm(model, batches, dtype=torch.float32)
    for norm, mean, variance in zip(model.stem.norms, means, variances, strict=True):
        torch.testing.assert_close(norm.running_mean, torch.stack(mean).mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, torch.stack(variance).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_precise_statistics_restore_momentum_and_mode(training):
    model = small("vitc_nano").train(training)
    before = weights(model)
    precise_batch_norm(model, [batch(2)], dtype=torch.float32)
    assert {norm.momentum for norm in model.stem.norms} == {0.1}
    assert {module.training for module in model.modules()} == {training}
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def test_a_failing_batch_leaves_momentum_and_mode_restored():
    model = small("vitc_nano").eval()

    def failing():
        yield batch(2)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        precise_batch_norm(model, failing(), dtype=torch.float32)
    assert {norm.momentum for norm in model.stem.norms} == {0.1}
    assert not model.stem.training


MIX = torch.tensor([0.3, 4, 20, 0, 32])


def test_the_model_mixes_the_pixels_of_a_training_step():
    model, (images, labels) = small("vitc_nano").train(), batch(4)
    loss = Objective(model, dtype=torch.float32)(images, labels, MIX)
    logits, share = model(mixed(normal(images), MIX)), share_of_own(MIX, (32, 32))
    losses = (F.cross_entropy(logits, targets) for targets in (labels, labels.roll(1)))
    expected = sum(part * loss for part, loss in zip((share, 1 - share), losses, strict=True))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_training_and_evaluation_compile_two_graphs_in_all_and_compute_the_eager_losses():
    torch.compiler.reset()
    before, batches, losses = compiled_graphs(), [triple(4) for _ in range(3)], []
    for compile in (True, False):
        model, curve = small("vitc_nano"), []
        step, evaluate = train_step(model, lr=0.01, compile=compile), evaluator(model, 4, compile=compile)
        for i, (images, labels, _) in enumerate(batches):
            mix = Mixing().sample((32, 32), (i,))
            curve.append(step([(images, labels, mix)]).item())
            curve.append(evaluate([(images, labels), (images[:3], labels[:3])]).loss)
        losses.append(curve)
    assert compiled_graphs() - before == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-4)
