import pytest
import torch

from fastvitc.training.erase import Erasing

IMAGES = torch.full((400, 3, 40, 48), 7, dtype=torch.uint8)


def erased(chance, seed=(0,)):
    return (Erasing(chance)(IMAGES, seed) != IMAGES).any(1)


def test_the_chance_is_that_of_an_image():
    assert erased(0.25).flatten(1).any(1).float().mean() == pytest.approx(0.25, abs=0.08)
    assert not erased(0.0).any()


def test_a_rectangle_of_the_stated_area_is_erased():
    for mask in erased(1.0)[:50]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        height, width = (int(found.max() - found.min()) + 1 for found in (rows, columns))
        assert mask.sum() > 0.9 * height * width
        assert 0.01 < height * width / mask.numel() < 0.36


def test_the_same_seed_erases_the_same_and_the_given_images_stay():
    assert torch.equal(Erasing(0.5)(IMAGES, (1, 2)), Erasing(0.5)(IMAGES, (1, 2)))
    assert not torch.equal(erased(0.5, (1, 2)), erased(0.5, (1, 3)))
    assert (IMAGES == 7).all()
