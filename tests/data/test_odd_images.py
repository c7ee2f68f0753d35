"""Images of any colour mode, and files that cannot be read."""

import errno
import warnings

import pytest
import torch
from loading import READING, index_of, load, order, pixels
from PIL import Image

from fastvitc.data import Augment
from fastvitc.errors import DataError


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


CASES = [("pil", 0), ("pil", 1), ("dali", 1)]
HOW = ["truncated", "empty", "text", "missing"]


@pytest.mark.parametrize(("kind", "workers"), CASES)
@pytest.mark.parametrize("how", HOW)
def test_in_training_another_image_takes_the_place_of_one_that_cannot_be_read(kind, workers, how, tmp_path):
    index = index_of(broken(tmp_path / "bad.jpg", how))
    loader = load(kind, index, training=True, batch_size=2, workers=workers)
    for epoch in range(2):
        loader.seek(epoch)
        labels = torch.cat([batch.labels.clone() for batch in loader]).tolist()
        expected = loader.order.epoch(epoch)
        places = [(batch, place) for batch in expected for place in range(2)]
        wanted = [next(n for n in batch.candidates(place) if n != 9) for batch, place in places]
        assert labels == wanted
    assert list(loader.bad) == [9]
    assert loader.bad[9].startswith(f"cannot read the image {tmp_path / 'bad.jpg'}: ")
    assert "Traceback" not in loader.bad[9]


@pytest.mark.parametrize(("kind", "workers"), CASES)
@pytest.mark.parametrize("how", HOW)
def test_in_validation_an_image_that_cannot_be_read_counts_as_not_seen(kind, workers, how, tmp_path):
    loader = load(
        kind, index_of(broken(tmp_path / "bad.jpg", how)), training=False, batch_size=4, workers=workers
    )
    for _ in range(2):
        assert order(loader) == [*range(9), -1]
    assert list(loader.bad) == [9]


@pytest.mark.parametrize(("kind", "workers"), CASES)
@pytest.mark.parametrize("training", [True, False])
def test_more_than_the_allowed_share_ends_the_epoch_with_a_named_image(kind, workers, training, tmp_path):
    index = index_of(broken(tmp_path / "bad.jpg", "text"))
    loader = load(kind, index, training=training, batch_size=2, workers=workers, bad_share=0.0)
    with pytest.raises(DataError, match=r"1 of 10 images cannot be read.*--bad-share.*bad\.jpg"):
        pixels(loader)


@pytest.mark.parametrize("kind", READING)
def test_where_nothing_can_take_the_place_the_epoch_ends(kind, tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(b"")
    loader = load(kind, index_of(sorted(tmp_path.iterdir())), batch_size=2, bad_share=1.0)
    with pytest.raises(DataError, match="neither can any that may replace it"):
        pixels(loader)


@pytest.mark.parametrize("kind", READING)
def test_a_loader_that_was_left_early_reads_on(kind, tmp_path):
    loader = load(kind, index_of(broken(tmp_path / "bad.jpg", "text")), training=False, batch_size=2)
    abandoned = iter(loader)
    for _ in range(3):  # the bad file has been read ahead
        next(abandoned)
    assert order(loader) == [*range(9), -1]


def test_a_file_that_only_dali_cannot_read_is_told_apart(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "really.gif")
    (tmp_path / "really.gif").rename(tmp_path / "named.jpg")
    loader = load("dali", index_of([tmp_path / "named.jpg"]), training=False)
    assert order(loader) == [-1]
    assert "DALI cannot decode the image" in loader.bad[0]
    assert "named.jpg" in loader.bad[0]


def test_a_passing_read_error_is_tried_again(tmp_path, monkeypatch):
    index, failures = index_of(broken(tmp_path / "bad.jpg", "missing")), [errno.EIO, errno.ESTALE]
    read = index.source.read

    def flaky(number):
        if failures:
            raise OSError(failures.pop(), "stale file handle")
        return read(number)

    monkeypatch.setattr(index.source, "read", flaky)
    monkeypatch.setattr("fastvitc.data.index.time.sleep", lambda seconds: None)
    assert index.read(0) == (tmp_path / "whole.jpg").read_bytes()
    assert not failures
