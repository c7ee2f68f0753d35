import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2

from fastvitc.data import Augment
from fastvitc.data.augment import AugmentSampler, centre_box, crop_window
from fastvitc.data.policy import OPS, POLICIES, WARPS, PolicySampler, affine_map
from fastvitc.errors import UsageError

WINDOWS = 3000


@pytest.fixture(scope="module")
def china():
    return Image.fromarray(load_sample_image("china.jpg"))


def sampled_windows(size, augment):
    draws = AugmentSampler(augment, (32, 32), seed=0).draw(0, np.arange(WINDOWS))
    return np.array(
        [crop_window(size, w, p, augment.ratio) for w, p in zip(draws.windows, draws.positions, strict=True)]
    )


@pytest.mark.parametrize("size", [(375, 500), (300, 300), (60, 900), (900, 60), (1, 1)])
def test_windows_lie_within_the_image(size):
    top, left, height, width = sampled_windows(size, Augment()).T
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() <= size[0]
    assert (left + width).max() <= size[1]


@pytest.mark.parametrize("size", [(375, 500), (300, 300), (100, 400)])
def test_windows_are_distributed_as_torchvisions(size):
    augment, image = Augment(), torch.empty(3, *size)
    ours = sampled_windows(size, augment).astype(float)
    crop = v2.RandomResizedCrop(32, augment.scale, augment.ratio)
    theirs = (crop.make_params([image]) for _ in range(WINDOWS))
    theirs = np.array([[p[key] for key in ("top", "left", "height", "width")] for p in theirs], float)
    for of in (lambda w: w[:, 2] * w[:, 3], lambda w: np.log(w[:, 3] / w[:, 2]), lambda w: w[:, 0] + w[:, 1]):
        a, b = of(ours), of(theirs)
        error = math.hypot(a.std(), b.std()) / math.sqrt(WINDOWS)
        assert abs(a.mean() - b.mean()) < 4 * error
        assert a.std() == pytest.approx(b.std(), rel=0.1)


def test_a_window_that_never_fits_gives_the_largest_in_the_middle():
    never = np.full((10, 2), 9.0)
    assert crop_window((100, 900), never, np.zeros(2), (3 / 4, 4 / 3)) == (0, 384, 100, 133)
    assert crop_window((900, 100), never, np.zeros(2), (3 / 4, 4 / 3)) == (384, 0, 133, 100)


def test_the_draws_of_a_sample_do_not_depend_on_its_company():
    sampler = AugmentSampler(Augment(policy="randaugment"), (32, 32), seed=5)
    together = sampler.draw(3, np.array([7, 2, 9_000_000_000]))
    alone = sampler.draw(3, np.array([9_000_000_000]))
    for a, b in zip((*together[:3], *together.policy), (*alone[:3], *alone.policy), strict=True):
        np.testing.assert_array_equal(a[2:], b)


@pytest.mark.parametrize("other", [(0, 1, 0), (1, 0, 0), (0, 0, 1)])
def test_seed_epoch_and_sample_each_change_the_draws(other):
    def draw(seed, epoch, sample):
        return AugmentSampler(Augment(), (32, 32), seed).draw(epoch, np.array([sample])).windows

    assert not np.isin(draw(0, 0, 0), draw(*other)).any()


def test_neighbouring_samples_are_uncorrelated_and_uniform():
    draws = AugmentSampler(Augment(), (32, 32), seed=0).draw(0, np.arange(20_000))
    u = draws.positions.ravel()
    counts = np.bincount((u * 50).astype(int), minlength=50)
    assert ((counts - 800) ** 2 / 800).sum() < 95  # 49 degrees of freedom: exceeded once in 10^4 seeds
    assert abs(np.corrcoef(u[:-2], u[2:])[0, 1]) < 0.02


@pytest.mark.parametrize("hflip", [0.0, 0.3, 1.0])
def test_flips_have_the_chance_asked_for(hflip):
    flips = AugmentSampler(Augment(hflip=hflip), (32, 32), seed=0).draw(0, np.arange(10_000)).flips
    assert flips.mean() == pytest.approx(hflip, abs=0.02)


@pytest.mark.parametrize(
    "wrong",
    [{"scale": (0, 1)}, {"scale": (0.5, 0.2)}, {"ratio": (0, 1)}, {"hflip": 1.1}, {"policy": "augmix"}],
)
def test_an_augmentation_out_of_range_is_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Augment(**wrong)


@pytest.mark.parametrize("size", [(427, 640), (640, 426), (300, 300), (64, 48)])
def test_the_evaluation_crop_is_torchvisions_resize_and_centre_crop(china, size):
    image = china.resize(size[::-1])
    top, left, bottom, right = centre_box(size, (224, 224), 0.875)
    ours = image.resize((224, 224), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    theirs = v2.CenterCrop(224)(v2.Resize(256)(image))
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


@pytest.mark.parametrize("out", [(96, 160), (160, 96)])
@pytest.mark.parametrize("size", [(427, 640), (640, 427), (50, 50)])
def test_a_rectangular_evaluation_crop_keeps_the_aspect_and_touches_the_covered_size(size, out):
    top, left, bottom, right = centre_box(size, out, 0.8)
    height, width = bottom - top, right - left
    assert height / width == pytest.approx(out[0] / out[1], rel=0.02)
    assert max(height / size[0], width / size[1]) == pytest.approx(0.8, rel=0.01)
    assert top + bottom == pytest.approx(size[0], abs=size[0] / out[0])
    assert left + right == pytest.approx(size[1], abs=size[1] / out[1])


@pytest.mark.parametrize("name", POLICIES)
def test_policy_operations_come_as_often_as_their_chances_say(name):
    n, policy = 20_000, POLICIES[name]
    uniforms = np.random.default_rng(0).random((n, len(policy.stages), 3))
    draw = PolicySampler(name, (32, 32)).draw(uniforms)
    for stage, steps in enumerate(policy.stages):
        expected = np.zeros(len(OPS))
        for step in steps:
            op = OPS.index("warp" if step.op in WARPS else step.op)
            expected[op] += step.chance / len(steps)
            expected[0] += (1 - step.chance) / len(steps)
        seen = np.bincount(draw.ops[:, stage], minlength=len(OPS)) / n
        np.testing.assert_allclose(seen, expected, atol=0.015)


def test_autoaugments_stages_come_from_one_sub_policy():
    uniforms = np.zeros((1, 2, 3))
    uniforms[0, :, 0] = (15 + 0.5) / 25, 0.0  # the second choice is not looked at
    draw = PolicySampler("autoaugment", (100, 200)).draw(uniforms)
    assert [OPS[op] for op in draw.ops[0]] == ["warp", "warp"]
    # the sixteenth: rotate by 7/10 of 30 degrees, translate by 9/10 of 0.45 of the height, signs turned
    np.testing.assert_allclose(draw.values[0], [-21, -0.405], rtol=1e-6)
    np.testing.assert_allclose(draw.maps[0, 1], [[1, 0, 0], [0, 1, -40.5]], rtol=1e-6)


def test_half_of_the_signs_turn():
    uniforms = np.random.default_rng(0).random((20_000, 1, 3))
    values = PolicySampler("trivialaugment", (32, 32)).draw(uniforms).values
    assert (values < 0).sum() / (values != 0).sum() == pytest.approx(0.5 * 9 / 11, abs=0.03)


@pytest.mark.parametrize("degrees", [-27.0, 90.0])
def test_rotation_is_pils(china, degrees):
    image = china.resize((101, 64))
    matrix = affine_map("rotate", degrees, (64, 101)).ravel().tolist()
    ours = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    theirs = image.rotate(degrees, Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
