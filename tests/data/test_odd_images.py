"""Images of any colour mode, and files that cannot be read."""

import warnings

import pytest
from loading import READING, index_of, load, pixels
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
