import pytest
import torch
import torch.nn.functional as F
from small_models import batch, evaluator, normal, small, weights
from torch import nn

from fastvitc.training.evaluation import Accuracy, precise_batch_norm


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
