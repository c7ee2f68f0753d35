import builtins
import gc
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from loading import ALL, READING, index_of, load, order, pixels
from PIL import Image

from fastvitc.data import Augment, pil, synthetic_index
from fastvitc.data.augment import AugmentSampler
from fastvitc.data.decode import read_image
from fastvitc.data.policy import FILL, OPS, POLICIES, Policy, Step
from fastvitc.errors import DataError, UsageError


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_batches_are_uint8_channels_last_with_int64_labels(kind, training, photos):
    images, labels = next(iter(load(kind, photos, training=training)))
    assert (images.dtype, images.shape) == (torch.uint8, (10, 3, 32, 48))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (labels.dtype, labels.shape) == (torch.int64, (10,))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_counts_announced_are_those_delivered(kind, training, world_size, photos):
    for rank in range(world_size):
        loader = load(kind, photos, training=training, rank=rank, world_size=world_size)
        sizes = [len(batch.images) for batch in loader]
        assert (len(loader), loader.num_samples) == (len(sizes), sum(sizes))
        assert set(sizes[:-1]) <= {10}
        assert not training or set(sizes) == {10}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_validation_image_is_seen_exactly_once(kind, world_size, photos):
    seen = [
        sample
        for rank in range(world_size)
        for sample in order(load(kind, photos, training=False, rank=rank, world_size=world_size))
    ]
    assert sorted(seen) == list(range(len(photos)))


@pytest.mark.parametrize("kind", ALL)
def test_the_training_images_of_two_ranks_are_disjoint(kind, photos):
    first, second = (set(order(load(kind, photos, rank=rank, world_size=2))) for rank in range(2))
    assert len(first) == len(second) == 20
    assert not first & second


@pytest.mark.parametrize("kind", READING)
def test_labels_belong_to_their_images(kind, tmp_path):
    for gray in range(0, 250, 10):
        Image.new("RGB", (40, 40), (gray,) * 3).save(tmp_path / f"{gray:03d}.png")
    for images, labels in load(kind, index_of(sorted(tmp_path.iterdir()))):
        assert images[:, 0, 16, 24].tolist() == (10 * labels).tolist()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("policy", ["none", "randaugment"])
def test_a_seed_fixes_every_pixel(kind, policy, photos):
    first, second = (pixels(load(kind, photos, seed=1, augment=Augment(policy=policy))) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, pixels(load(kind, photos, seed=2, augment=Augment(policy=policy))))


@pytest.mark.parametrize("kind", READING)
@pytest.mark.parametrize("policy", ["none", "trivialaugment"])
def test_an_epoch_is_the_same_whether_or_not_others_ran_before(kind, policy, photos):
    ran, fresh = (load(kind, photos, augment=Augment(policy=policy)) for _ in range(2))
    epochs = []
    for epoch in range(3):
        ran.seek(epoch)
        epochs.append(pixels(ran))
    fresh.seek(2)
    assert torch.equal(pixels(fresh), epochs[2])
    assert not torch.equal(epochs[1], epochs[2])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on a single core
@pytest.mark.parametrize("kind", READING)
def test_batches_do_not_depend_on_the_number_of_workers(kind, photos):
    one, two = (load(kind, photos, workers=workers) for workers in (0, 2))
    assert torch.equal(pixels(one), pixels(two))
    assert torch.equal(pixels(one), pixels(two))  # by the same workers, a second time
    two.close()


@pytest.mark.parametrize("kind", READING)
def test_an_image_is_augmented_the_same_way_in_batches_of_any_size(kind, photos):
    small, large = (load(kind, photos, batch_size=size) for size in (6, 24))
    assert torch.equal(pixels(small), pixels(large))


@pytest.mark.parametrize(("kind", "workers"), [("pil", 0), ("pil", 1), ("dali", 1), ("synthetic", 0)])
def test_an_iteration_left_early_does_not_show_in_the_next(kind, workers, photos):
    loader, whole = (load(kind, photos, batch_size=4, workers=workers) for _ in range(2))
    for taken in (1, 3, 0, 12):
        left = iter(loader)
        for _ in range(taken):
            next(left)
    assert torch.equal(pixels(loader), pixels(whole))


@pytest.mark.timeout(60)
def test_workers_do_not_destroy_what_the_parent_has_yet_to_collect(photos, monkeypatch):
    def collect_and_read(index, number):
        gc.collect()
        return read_image(index, number)

    monkeypatch.setattr(pil, "read_image", collect_and_read)
    running = load("dali", photos)
    next(iter(running))
    gc.disable()
    try:
        running.itself = running
        del running  # its threads are not in the worker, which would wait for them for ever
        assert len(list(load("pil", photos, workers=1))) == 4
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", READING)
def test_batches_kept_are_not_overwritten_by_later_ones(kind, photos):
    loader = load(kind, photos)
    kept = [batch.images for batch in loader]
    copies = [batch.images.clone() for batch in loader]
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("kind", ALL)
def test_a_closed_loader_starts_anew(kind, photos):
    loader = load(kind, photos)
    before = pixels(loader)
    loader.close()
    assert torch.equal(pixels(loader), before)


@pytest.mark.parametrize("kind", ALL)
def test_a_loader_of_another_size_is_as_one_made_with_it(kind, photos):
    loader = load(kind, photos, augment=Augment(policy="autoaugment"))
    whole = pixels(loader)
    loader.resize((24, 40))
    small = load(kind, photos, augment=Augment(policy="autoaugment"), image_size=(24, 40))
    assert torch.equal(pixels(loader), pixels(small))
    loader.resize(tuple(whole.shape[2:]))
    assert torch.equal(pixels(loader), whole)
    loader.resize(tuple(whole.shape[2:]))
    assert torch.equal(pixels(loader), whole)


@pytest.mark.parametrize("kind", ALL)
def test_loaders_leave_the_global_random_states_alone(kind, photos):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    pixels(load(kind, photos, augment=Augment(policy="autoaugment")))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


@pytest.mark.parametrize("kind", READING)
def test_warps_fill_with_gray(kind, photos, monkeypatch):
    monkeypatch.setitem(POLICIES, "none", Policy(((Step("translate_x", 0.5),),)))
    images = pixels(load(kind, photos))
    assert (images[..., 25:] == FILL).all()
    assert not (images[..., :24] == FILL).all()


@pytest.mark.parametrize("kind", READING)
@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "none"])
def test_policies_change_training_images_alone(kind, policy, photos):
    def load_with(policy, training):
        return pixels(load(kind, photos, training=training, augment=Augment(policy=policy)))

    assert torch.equal(load_with(policy, False), load_with("none", False))
    changed = (load_with(policy, True) != load_with("none", True)).flatten(1).any(1)
    assert changed.float().mean() > 0.5


@pytest.mark.parametrize("kind", READING)
def test_crops_cover_the_expected_share_of_the_image(kind, tmp_path):
    ramp = np.mgrid[0:256, 0:256].astype(np.uint8)
    Image.fromarray(np.stack([ramp[0], ramp[1], ramp[0]], axis=-1)).save(tmp_path / "ramp.png")
    index = index_of([tmp_path / "ramp.png"] * 500)
    images = pixels(load(kind, index, batch_size=100, image_size=(16, 16), augment=Augment(scale=(0.2, 0.6))))
    extents = (images.amax((2, 3)) - images.amin((2, 3)))[:, :2] * (16 / 15) / 256
    # pixel centres span 15/16 of the window; (0.2 + 0.6) / 2, spread evenly over 500 windows
    assert extents.prod(1).mean() == pytest.approx(0.4, abs=3 * 0.4 / 12**0.5 / 500**0.5)
    flipped = (images[:, 1, 8, 0] > images[:, 1, 8, -1]).float().mean()
    assert flipped == pytest.approx(0.5, abs=3 * 0.5 / 500**0.5)


def test_a_missing_dali_says_what_to_install(photos, monkeypatch):
    real = builtins.__import__

    def without_dali(name, *args, **kwargs):
        if name.startswith("nvidia.dali"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "fastvitc.data.dali", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_dali)
    with pytest.raises(UsageError, match="pip install nvidia-dali-cuda130"):
        load("dali", photos)


def test_dali_is_imported_only_when_asked_for(tmp_path):
    program = "import sys, fastvitc.data; sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=os.getcwd(), timeout=120).returncode == 0


def test_auto_decodes_with_pil_on_a_cpu(photos):
    assert type(load("auto", photos)).__name__ == "PilLoader"


@pytest.mark.parametrize("kind", ["auto", "pil", "dali"])
def test_a_synthetic_index_is_refused_by_loaders_that_read_files(kind):
    with pytest.raises(UsageError, match="choose the loader synthetic"):
        load(kind, synthetic_index("train"))


@pytest.mark.parametrize("kind", ALL)
def test_a_training_batch_larger_than_the_data_is_refused(kind, photos):
    with pytest.raises(UsageError, match="48 training images do not fill one batch of 25 on each of 2 ranks"):
        load(kind, photos, batch_size=25, world_size=2)
    assert len(load(kind, photos, batch_size=25, world_size=2, training=False)) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"image_size": (32, 0)}, "image_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"rank": 1}, "rank 1 is none of the 1 ranks"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"crop_ratio": 0.0}, "crop_ratio must be above 0"),
        ({"kind": "ffcv"}, "there is no loader 'ffcv'; choose among auto, dali, pil, synthetic"),
    ],
)
def test_an_impossible_request_is_refused(wrong, message, photos):
    with pytest.raises(UsageError, match=message):
        load(**{"kind": "pil", "index": photos} | wrong)


def test_a_worker_that_the_system_ends_is_told_in_one_line(photos):
    loader = load("pil", photos, workers=1)
    batches = iter(loader)
    next(batches)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(DataError, match="a process that reads images was ended from outside"):
        list(batches)
    loader.close()


@pytest.mark.parametrize("training", [True, False])
def test_grey_images_are_the_luma_of_the_coloured_ones(training, photos):
    coloured, grey = (
        [pixels(load(kind, photos, training=training, channels=channels)) for kind in READING]
        for channels in (3, 1)
    )
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    for images, found in zip(coloured, grey, strict=True):
        assert found.shape == (len(images), 1, 32, 48)
        assert ((images * weights).sum(1, keepdim=True) - found).abs().max() <= 1.5


@pytest.mark.parametrize("training", [True, False])
def test_bicubic_images_differ_from_bilinear_ones_and_agree_between_loaders(training, photos):
    by = {
        (kind, how): pixels(load(kind, photos, training=training, interpolation=how)).float()
        for kind in READING
        for how in ("bilinear", "bicubic")
    }
    between = (by["pil", "bicubic"] - by["dali", "bicubic"]).abs().mean()
    across = (by["pil", "bicubic"] - by["pil", "bilinear"]).abs().mean()
    assert between < 0.5 * across


def test_colour_jitter_is_the_same_on_both_loaders(photos):
    plain, jittered = (
        [pixels(load(kind, photos, augment=Augment(color_jitter=jitter))).float() for kind in READING]
        for jitter in (0.0, 0.4)
    )
    assert (jittered[0] - jittered[1]).abs().mean() < 1.5 * (plain[0] - plain[1]).abs().mean() + 1
    assert (jittered[0] != plain[0]).flatten(1).any(1).float().mean() > 0.9


def test_colour_jitter_draws_each_change_evenly_within_its_share():
    draws = AugmentSampler(Augment(color_jitter=0.4, policy="autoaugment"), (32, 32), 0).draw(
        0, np.arange(2000)
    )
    ops, values, _ = draws.policy
    assert ops.shape == (2000, 5)
    assert [OPS[op] for op in ops[0, :3]] == ["brightness", "contrast", "color"]
    assert np.abs(values[:, :3]).max() <= 0.4
    assert values[:, :3].mean(0) == pytest.approx(0, abs=0.02)
    assert values[:, :3].std(0) == pytest.approx(0.4 / 3**0.5, abs=0.01)


@pytest.mark.parametrize("wrong", [{"channels": 2}, {"interpolation": "nearest"}])
def test_channels_and_interpolations_that_there_are_not_are_refused(wrong, photos):
    with pytest.raises(
        UsageError, match="channels must be 1 or 3 and interpolation one of bilinear, bicubic"
    ):
        load("pil", photos, **wrong)
