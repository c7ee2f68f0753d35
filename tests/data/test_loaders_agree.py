"""PIL and DALI yield the same images."""

import pytest
from loading import ALL, READING, load, order, pixels

from fastvitc.data.policy import POLICIES, Policy, Step


def difference(index, **options):
    """(mean, maximum) of |PIL - DALI|, in 1/255, per image and channel."""
    pil, dali = (pixels(load(kind, index, **options)) for kind in READING)
    distance = (pil - dali).abs().double()
    return distance.mean((1, 2, 3)), distance.amax((1, 2, 3))


@pytest.mark.parametrize("training", [True, False])
def test_all_loaders_yield_the_same_order(training, photos):
    orders = []
    for kind in ALL:
        loader = load(kind, photos, training=training, seed=3)
        loader.seek(2)
        orders.append(order(loader))
    assert orders[0] == orders[1] == orders[2]


# Agreement of PIL and DALI, in units of 1/255. Measured on these photographs, mean of the worst image and maximum:
# 0.20 and 1 in evaluation; 0.24 and 19 where the crop reaches the image's edge, for PIL leaves what lies beyond it out
# of the average and DALI repeats the last pixel; 0.22 and 10 in training, likewise at the window's edge.


@pytest.mark.parametrize("image_size", [(224, 224), (96, 160), (31, 33)])
@pytest.mark.parametrize(("crop_ratio", "bound"), [(0.875, 1), (1.0, 32)])
def test_pil_and_dali_agree_on_validation_photographs(image_size, crop_ratio, bound, photos):
    mean, most = difference(photos, training=False, image_size=image_size, crop_ratio=crop_ratio)
    assert mean.max() < 0.3
    assert most.max() <= bound


def test_pil_and_dali_agree_on_validation_digits(digits):
    mean, most = difference(digits[1], training=False, image_size=(32, 32), batch_size=64)
    assert mean.max() < 0.3
    assert most.max() <= 1


@pytest.mark.parametrize("image_size", [(96, 96), (64, 112)])
def test_pil_and_dali_take_the_same_random_crops_and_flips(image_size, photos):
    mean, most = difference(photos, image_size=image_size)
    assert mean.max() < 0.3
    assert most.max() <= 32


# The same, mean of the worst image. Measured: 1.0 for auto_contrast, 10.4 for equalize (their formulas differ), below
# 0.45 for those that only relabel values, up to 1.2 for the rest.
@pytest.mark.parametrize(
    ("op", "value", "bound"),
    [
        ("auto_contrast", 0, 2.5),
        ("equalize", 0, 14),
        ("invert", 0, 0.3),
        ("posterize", 2, 0.5),
        ("posterize", 7, 0.5),
        ("solarize", 100, 0.5),
        ("solarize", 256, 0.3),
        ("solarize_add", 77, 0.5),
        *((op, value, 2) for op in ("brightness", "contrast", "color", "sharpness") for value in (-0.6, 0.9)),
        ("shear_x", 0.3, 2),
        ("shear_y", -0.2, 2),
        ("translate_x", 0.2, 2),
        ("translate_y", -0.31, 2),
        ("rotate", 27, 2),
    ],
)
def test_pil_and_dali_carry_out_each_operation_alike(op, value, bound, photos, monkeypatch):
    monkeypatch.setitem(POLICIES, "none", Policy(((Step(op, value),),)))
    assert difference(photos, image_size=(48, 64))[0].max() < bound


def test_every_operation_of_the_policies_is_compared():
    compared = next(
        mark.args[1]
        for mark in test_pil_and_dali_carry_out_each_operation_alike.pytestmark
        if mark.name == "parametrize"
    )
    used = {step.op for policy in POLICIES.values() for stage in policy.stages for step in stage}
    assert used - {op for op, *_ in compared} == {"identity"}
