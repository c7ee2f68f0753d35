import builtins
import gc
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from fastvitc.data import (
    Augment,
    ImageIndex,
    LoaderConfig,
    create_loader,
    digits_folder,
    index_folder,
    pil,
    synthetic_index,
)
from fastvitc.data.decode import read_image
from fastvitc.data.index import Files
from fastvitc.data.policy import FILL, POLICIES, Policy, Step
from fastvitc.errors import DataError, UsageError

READING = ["pil", "dali"]
ALL = [*READING, "synthetic"]
SIZES = [(320, 213), (300, 400), (333, 217), (67, 333), (233, 233), (61, 47), (32, 32), (600, 80)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """48 JPEGs of two photographs: eight sizes, colour, gray and CMYK, baseline and progressive."""
    root = tmp_path_factory.mktemp("photos")
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        for size in SIZES:
            for mode in ("RGB", "L", "CMYK"):
                image = Image.fromarray(pixels).resize(size).convert(mode)
                path = root / f"{name}-{size[0]}x{size[1]}-{mode}.jpg"
                image.save(path, quality=90, progressive=size[0] % 2 == 0)
    return index_of(sorted(root.iterdir()))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return index_folder(digits_folder(tmp_path_factory.mktemp("cache")))


def index_of(paths, split="train"):
    files = Files(list(map(str, paths)))
    return ImageIndex(split, "", ("all",), files, np.arange(len(paths)))


def load(kind, index, **options):
    """A loader whose labels are the places in the index, so that they tell which image came."""
    settings = {"training": True, "batch_size": 10, "image_size": (32, 48), "workers": 0}
    return create_loader(kind, LoaderConfig(index, device=torch.device("cpu"), **settings | options))


def pixels(loader):
    return torch.cat([batch.images for batch in loader]).int()


def order(loader):
    return torch.cat([torch.empty(0, dtype=torch.int64), *(batch.labels for batch in loader)]).tolist()


def difference(index, **options):
    """(mean, maximum) of |PIL - DALI|, in 1/255, per image and channel."""
    pil, dali = (pixels(load(kind, index, **options)) for kind in READING)
    distance = (pil - dali).abs().double()
    return distance.mean((1, 2, 3)), distance.amax((1, 2, 3))


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


@pytest.mark.parametrize("training", [True, False])
def test_all_loaders_yield_the_same_order(training, photos):
    orders = []
    for kind in ALL:
        loader = load(kind, photos, training=training, seed=3)
        loader.seek(2)
        orders.append(order(loader))
    assert orders[0] == orders[1] == orders[2]


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
def test_loaders_leave_the_global_random_states_alone(kind, photos):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    pixels(load(kind, photos, augment=Augment(policy="autoaugment")))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


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


@pytest.mark.parametrize("kind", READING)
@pytest.mark.parametrize("name", ["palette.png", "gray.png", "alpha.png", "see-through.png", "plain.webp"])
def test_any_colour_mode_becomes_rgb(kind, name, tmp_path):
    colour = Image.new("RGB", (40, 40), (200, 100, 50))
    gray = Image.new("L", (40, 40), 120)
    images = {
        "palette.png": colour.convert("P", palette=Image.Palette.ADAPTIVE),
        "gray.png": gray,
        "alpha.png": Image.merge("RGBA", [*colour.split(), Image.new("L", (40, 40), 30)]),
        "see-through.png": colour.convert("P", palette=Image.Palette.ADAPTIVE),
        "plain.webp": colour,
    }
    options = {"transparency": b"\x10\x20"} if name == "see-through.png" else {}
    options = {"lossless": True} if name == "plain.webp" else options
    images[name].save(tmp_path / name, **options)
    expected = (120,) * 3 if name == "gray.png" else (200, 100, 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pixels(load(kind, index_of([tmp_path / name]), training=False))
    assert found.amax((0, 2, 3)).tolist() == found.amin((0, 2, 3)).tolist() == list(expected)


@pytest.mark.parametrize("kind", READING)
def test_exif_orientation_is_ignored(kind, tmp_path):
    image = Image.new("RGB", (60, 40), "white")
    image.paste("black", (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    for training in (False, True):
        options = {"training": training, "batch_size": 1, "augment": Augment(scale=(0.9, 1), hflip=0)}
        (found,) = pixels(load(kind, index_of([tmp_path / "turned.jpg"]), **options))
        assert found[..., 4].max() < 20
        assert found[..., -4].min() > 235


def broken(path, how):
    whole = path.with_name("whole.jpg")
    Image.new("RGB", (64, 64), "red").save(whole)
    contents = {
        "truncated": whole.read_bytes()[: whole.stat().st_size // 2],
        "empty": b"",
        "text": b"<html>not found</html>",
    }
    if how != "missing":
        path.write_bytes(contents[how])
    return [whole] * 9 + [path]


@pytest.mark.parametrize(("kind", "workers"), [("pil", 0), ("pil", 1), ("dali", 1)])
@pytest.mark.parametrize("how", ["truncated", "empty", "text", "missing"])
@pytest.mark.parametrize("training", [True, False])
def test_a_file_that_cannot_be_read_is_named(kind, workers, how, training, tmp_path):
    index = index_of(broken(tmp_path / "bad.jpg", how))
    loader = load(kind, index, training=training, batch_size=2, workers=workers)
    with pytest.raises(DataError) as caught:
        pixels(loader)
    message = str(caught.value)
    assert message.startswith(f"cannot read the image {tmp_path / 'bad.jpg'}: ")
    assert "Traceback" not in message


@pytest.mark.parametrize("kind", READING)
def test_the_batches_before_a_bad_file_arrive_and_the_loader_lives_on(kind, tmp_path):
    loader = load(kind, index_of(broken(tmp_path / "bad.jpg", "text")), training=False, batch_size=2)
    for _ in range(2):
        arrived = []
        with pytest.raises(DataError):
            arrived.extend(loader)
        assert len(arrived) == 4
    abandoned = iter(loader)
    for _ in range(3):  # the bad file has been read ahead
        next(abandoned)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "bad.jpg")
    assert len(list(loader)) == 5


def test_a_file_that_only_dali_cannot_read_is_told_apart(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "really.gif")
    (tmp_path / "really.gif").rename(tmp_path / "named.jpg")
    with pytest.raises(DataError, match=r"DALI failed on a batch whose files PIL can read: .*named\.jpg"):
        pixels(load("dali", index_of([tmp_path / "named.jpg"]), training=False))


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
