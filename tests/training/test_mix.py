import math

import pytest
import torch
from torch import nn

from fastvitc.training.mix import Mix, mix_images
from fastvitc.training.step import Normalize, Objective

SIZE = (24, 40)


def box_of(draw):
    """(top, bottom, left, right) of a draw, as integers."""
    return [int(edge) for edge in draw[1:]]


def is_box(draw):
    return draw[0].item() == 0.0


def test_a_draw_is_a_function_of_its_seed():
    mix = Mix()
    draws = [mix.draw(SIZE, (3, 1, batch)) for batch in range(8)]
    for batch, draw in enumerate(draws):
        assert torch.equal(draw, mix.draw(SIZE, (3, 1, batch)))
    assert len({tuple(draw.tolist()) for draw in draws}) == 8


def test_seeds_that_differ_in_one_number_draw_differently():
    seeds = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({tuple(Mix(0.8, 0).draw(SIZE, seed).tolist()) for seed in seeds}) == 4


def test_mixup_adds_the_rolled_batch_by_its_share():
    x = torch.randn(5, 3, *SIZE)
    draw = Mix(mixup=0.8, cutmix=0).draw(SIZE, (0,))
    share = draw[0]
    mixed, returned = mix_images(x, draw)
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * x + (1 - share) * x.roll(1, 0))
    torch.testing.assert_close(returned, share)


def test_cutmix_pastes_exactly_the_box_of_the_rolled_batch():
    x = torch.randn(4, 3, *SIZE)
    mixed, share = mix_images(x, torch.tensor([0.0, 3, 11, 7, 40]))
    expected = x.clone()
    expected[:, :, 3:11, 7:40] = x.roll(1, 0)[:, :, 3:11, 7:40]
    assert torch.equal(mixed, expected)
    assert share.item() == pytest.approx(1 - 8 * 33 / (24 * 40), abs=1e-6)


def test_cutmix_counts_the_share_of_pixels_that_stay():
    own, other = torch.zeros(1, 1, *SIZE), torch.ones(1, 1, *SIZE)
    for seed in range(50):
        mixed, share = mix_images(torch.cat([own, other]), Mix(0, 1.0).draw(SIZE, (seed,)))
        assert share.item() == pytest.approx(1 - mixed[0].mean().item(), abs=1e-6)


def test_an_empty_box_changes_nothing():
    x = torch.randn(2, 3, *SIZE)
    mixed, share = mix_images(x, torch.tensor([0.0, 5, 5, 7, 9]))
    assert torch.equal(mixed, x)
    assert share == 1


def test_with_both_on_half_of_the_draws_are_boxes():
    boxes = sum(is_box(Mix(0.8, 1.0).draw(SIZE, (seed,))) for seed in range(400))
    assert 160 < boxes < 240  # four standard deviations


def test_one_alone_is_always_drawn():
    assert all(is_box(Mix(0, 1.0).draw(SIZE, (seed,))) for seed in range(50))
    assert not any(is_box(Mix(0.8, 0).draw(SIZE, (seed,))) for seed in range(50))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 3.0])
def test_mixup_shares_have_mean_and_variance_of_their_beta_distribution(alpha):
    shares = torch.tensor([Mix(alpha, 0).draw(SIZE, (seed,))[0].item() for seed in range(3000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean().item() - 0.5) < 5 * math.sqrt(variance / 3000)
    assert shares.var().item() == pytest.approx(variance, rel=0.12)


@pytest.mark.parametrize("size", [(24, 40), (64, 8), (224, 224)])
def test_boxes_stay_inside_the_image(size):
    for seed in range(300):
        top, bottom, left, right = box_of(Mix(0, 1.0).draw(size, (seed,)))
        assert 0 <= top <= bottom <= size[0]
        assert 0 <= left <= right <= size[1]


def test_small_boxes_are_spread_evenly_over_a_rectangular_image():
    size, centres = (100, 400), []
    for seed in range(3000):
        top, bottom, left, right = box_of(Mix(0, 1.0).draw(size, (seed,)))
        if bottom - top < 25 and right - left < 100:
            centres.append(((top + bottom) / 200, (left + right) / 800))
    assert len(centres) > 100
    for mean in torch.tensor(centres).mean(0).tolist():
        assert abs(mean - 0.5) < 5 * math.sqrt(1 / 12 / len(centres))


def test_boxes_that_no_border_cuts_have_the_images_aspect_ratio():
    size, seen = (200, 400), 0
    for seed in range(300):
        top, bottom, left, right = box_of(Mix(0, 1.0).draw(size, (seed,)))
        if top > 0 and left > 0 and bottom < size[0] and right < size[1]:
            assert abs((right - left) - 2 * (bottom - top)) <= 3
            seen += 1
    assert seen > 30


def test_mixing_is_on_when_either_strength_is():
    assert [Mix(a, b).enabled for a, b in ((0.8, 1), (0.8, 0), (0, 1), (0, 0))] == [True, True, True, False]


@pytest.mark.parametrize("draw", [[0.3, 0, 8, 0, 8], [0.0, 1, 5, 2, 8]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mixed_loss_is_the_cross_entropy_with_the_mixed_and_smoothed_targets(draw, smoothing):
    images, labels = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 3, 1, 2, 2, 0])
    model, draw = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), torch.tensor(draw)
    loss = Objective(model, dtype=torch.float32, label_smoothing=smoothing)(images, labels, draw)

    mixed, share = mix_images(Normalize()(images), draw)
    one_hot = torch.eye(4)[labels]
    target = share * one_hot + (1 - share) * one_hot.roll(1, 0)
    target = (1 - smoothing) * target + smoothing / 4
    torch.testing.assert_close(loss, -(target * model(mixed).log_softmax(1)).sum(1).mean())
