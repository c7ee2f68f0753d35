import math

import pytest
import torch
from torch import nn

from fastvitc.kernels.conv_stem.pixels import mixed
from fastvitc.training.mix import Mixing, share_of_own
from fastvitc.training.step import Objective

SIZE = (24, 40)


def box_of(mix):
    """(top, bottom, left, right) of a mix, as integers."""
    return [int(edge) for edge in mix[1:]]


def is_box(mix):
    return mix[0].item() == 0.0


def test_a_mix_is_a_function_of_its_seed():
    mixing = Mixing()
    mixes = [mixing.sample(SIZE, (3, 1, batch)) for batch in range(8)]
    for batch, mix in enumerate(mixes):
        assert torch.equal(mix, mixing.sample(SIZE, (3, 1, batch)))
    assert len({tuple(mix.tolist()) for mix in mixes}) == 8


def test_seeds_that_differ_in_one_number_give_other_mixes():
    seeds = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({tuple(Mixing(0.8, 0).sample(SIZE, seed).tolist()) for seed in seeds}) == 4


def test_the_share_of_mixup_is_its_weight():
    mix = Mixing(mixup=0.8, cutmix=0).sample(SIZE, (0,))
    assert 0 < mix[0] < 1
    assert share_of_own(mix, SIZE) == mix[0]


def test_the_share_of_a_box_is_that_of_the_pixels_outside():
    share = share_of_own(torch.tensor([0.0, 3, 11, 7, 40]), SIZE)
    assert share.item() == pytest.approx(1 - 8 * 33 / (24 * 40), abs=1e-6)


def test_an_empty_box_leaves_the_whole_share():
    assert share_of_own(torch.tensor([0.0, 5, 5, 7, 9]), SIZE) == 1


def test_cutmix_counts_the_share_of_pixels_that_stay():
    own, other = torch.zeros(1, 1, *SIZE), torch.ones(1, 1, *SIZE)
    for seed in range(50):
        mix = Mixing(0, 1.0).sample(SIZE, (seed,))
        stayed = 1 - mixed(torch.cat([own, other]), mix)[0].mean().item()
        assert share_of_own(mix, SIZE).item() == pytest.approx(stayed, abs=1e-6)


def test_with_both_on_half_of_the_mixes_are_boxes():
    boxes = sum(is_box(Mixing(0.8, 1.0).sample(SIZE, (seed,))) for seed in range(400))
    assert 160 < boxes < 240  # four standard deviations


def test_one_alone_is_always_taken():
    assert all(is_box(Mixing(0, 1.0).sample(SIZE, (seed,))) for seed in range(50))
    assert not any(is_box(Mixing(0.8, 0).sample(SIZE, (seed,))) for seed in range(50))


@pytest.mark.parametrize("alpha", [0.2, 0.8, 3.0])
def test_mixup_shares_have_mean_and_variance_of_their_beta_distribution(alpha):
    shares = torch.tensor([Mixing(alpha, 0).sample(SIZE, (seed,))[0].item() for seed in range(3000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean().item() - 0.5) < 5 * math.sqrt(variance / 3000)
    assert shares.var().item() == pytest.approx(variance, rel=0.12)


@pytest.mark.parametrize("size", [(24, 40), (64, 8), (224, 224)])
def test_boxes_stay_inside_the_image(size):
    for seed in range(300):
        top, bottom, left, right = box_of(Mixing(0, 1.0).sample(size, (seed,)))
        assert 0 <= top <= bottom <= size[0]
        assert 0 <= left <= right <= size[1]


def test_small_boxes_are_spread_evenly_over_a_rectangular_image():
    size, centres = (100, 400), []
    for seed in range(3000):
        top, bottom, left, right = box_of(Mixing(0, 1.0).sample(size, (seed,)))
        if bottom - top < 25 and right - left < 100:
            centres.append(((top + bottom) / 200, (left + right) / 800))
    assert len(centres) > 100
    for mean in torch.tensor(centres).mean(0).tolist():
        assert abs(mean - 0.5) < 5 * math.sqrt(1 / 12 / len(centres))


def test_boxes_that_no_border_cuts_have_the_images_aspect_ratio():
    size, seen = (200, 400), 0
    for seed in range(300):
        top, bottom, left, right = box_of(Mixing(0, 1.0).sample(size, (seed,)))
        if top > 0 and left > 0 and bottom < size[0] and right < size[1]:
            assert abs((right - left) - 2 * (bottom - top)) <= 3
            seen += 1
    assert seen > 30


def test_mixing_is_on_when_either_strength_is():
    assert [Mixing(a, b).enabled for a, b in ((0.8, 1), (0.8, 0), (0, 1), (0, 0))] == [
        True,
        True,
        True,
        False,
    ]


class Linear(nn.Module):
    """Logits from the mixed pixels."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(192, 4)

    def forward(self, images, mix=None):
        images = images / 255
        return self.layer((images if mix is None else mixed(images, mix)).flatten(1))


@pytest.mark.parametrize("mix", [[0.3, 0, 8, 0, 8], [0.0, 1, 5, 2, 8]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mixed_loss_is_the_cross_entropy_with_the_mixed_and_smoothed_targets(mix, smoothing):
    images, labels = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 3, 1, 2, 2, 0])
    model, mix = Linear(), torch.tensor(mix)
    loss = Objective(model, dtype=torch.float32, label_smoothing=smoothing)(images, labels, mix)

    share = share_of_own(mix, (8, 8))
    one_hot = torch.eye(4)[labels]
    target = share * one_hot + (1 - share) * one_hot.roll(1, 0)
    target = (1 - smoothing) * target + smoothing / 4
    torch.testing.assert_close(loss, -(target * model(images, mix).log_softmax(1)).sum(1).mean())


def test_a_batch_is_mixed_with_its_chance_and_else_left_as_it_is():
    mixing = Mixing(0.8, 1.0, chance=0.25)
    mixes = [mixing.sample(SIZE, (batch,)) for batch in range(400)]
    left = [mix for mix in mixes if share_of_own(mix, SIZE) == 1]
    assert len(left) == pytest.approx(300, abs=40)
    image = torch.rand(4, 3, *SIZE)
    assert torch.equal(mixed(image, Mixing.none(SIZE)), image)
    assert not Mixing(0.8, 1.0, chance=0.0).enabled
