"""Whole training steps on the native kernels, on real images, against the reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from few_steps import NANO, trained
from sklearn.datasets import load_digits


@pytest.fixture(scope="module")
def batches():
    """50 batches of 16 handwritten digits, 8x8 enlarged to 32x32."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    images = torch.from_numpy(pixels)[:, None].expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target)
    return [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 800, 16)]


def test_fifty_steps_in_float32_follow_the_loss_curve_of_the_reference_to_1e_4(batches):
    (expected, _), (found, _) = (trained(batches, b, "sgd", 0.02) for b in ("reference", "native"))
    assert max(abs(f - e) for f, e in zip(found, expected, strict=True)) < 1e-4
    assert sum(found[-10:]) < 0.9 * sum(found[:10])


def test_fifty_steps_in_bfloat16_stay_near_the_float32_curve(batches):
    (expected, _), (found, _) = (
        trained(batches, backend, "sgd", 0.02, dtype=dtype)
        for backend, dtype in (("reference", torch.float32), ("native", torch.bfloat16))
    )
    assert abs(sum(found[-10:]) - sum(expected[-10:])) < 1


@pytest.mark.slow
def test_compiled_steps_follow_the_eager_ones(batches):
    config = replace(NANO, depth=2)
    eager, compiled = (
        trained(batches[:3], "native", "adamw", 1e-3, compile=compile, config=config)[0]
        for compile in (False, True)
    )
    assert compiled == pytest.approx(eager, rel=1e-4)
