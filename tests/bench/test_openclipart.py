import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvitc.data import index_folder

SCRIPT = Path(__file__).parents[2] / "bench" / "openclipart.py"
spec = importlib.util.spec_from_file_location("openclipart", SCRIPT)
openclipart = importlib.util.module_from_spec(spec)
spec.loader.exec_module(openclipart)

DRAWINGS = 40


def draw(path, number):
    """A drawing of its own for each number, on a transparent ground."""
    pixels = np.zeros((30, 60, 4), np.uint8)
    pixels[5:25, 5:55] = (number % 251, number // 251, 90, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def clip_art(tmp_path_factory):
    """40 drawings a category, half of them a folder down, each a second time under another name and in the next one."""
    root = tmp_path_factory.mktemp("png")
    names = openclipart.CATEGORIES
    for c, category in enumerate(names):
        for i in range(DRAWINGS):
            number = c * DRAWINGS + i
            draw(root / category / ("deeper" if i % 2 else ".") / f"{number}.png", number)
            draw(root / category / f"again{number}.png", number)
            if i < 5:
                draw(root / names[(c + 1) % len(names)] / f"other{number}.png", number)
    return root


@pytest.fixture(scope="module")
def prepared(clip_art, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "images"
    assert run(clip_art, out) == 0
    return out


def run(png_dir, out, *options):
    return openclipart.main(["--png-dir", str(png_dir), "--out", str(out), "--per-class", "20", *options])


def test_the_folder_has_as_many_images_in_each_class(prepared):
    train, val = index_folder(prepared)
    assert train.classes == openclipart.CATEGORIES
    assert np.bincount(train.labels).tolist() == [16] * 12
    assert np.bincount(val.labels).tolist() == [4] * 12


def test_no_drawing_is_taken_twice(prepared):
    names = [path.name for path in prepared.rglob("*.jpg")]  # hashes of the pixels
    assert len(set(names)) == len(names) == 240


def test_images_are_on_white_with_the_longest_side_asked_for(prepared, clip_art, tmp_path):
    assert run(clip_art, tmp_path / "small", "--size", "32") == 0
    for folder, size in ((prepared, (96, 48)), (tmp_path / "small", (32, 16))):
        image = Image.open(next(folder.rglob("*.jpg")))
        assert (image.size, image.mode, image.format) == (size, "RGB", "JPEG")
        assert min(image.getpixel((0, 0))) > 245


def test_an_images_split_does_not_depend_on_its_name(prepared, clip_art, tmp_path):
    renamed = tmp_path / "png"
    for path in clip_art.rglob("*.png"):
        category = path.relative_to(clip_art).parts[0]
        (renamed / category).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, renamed / category / f"{path.stem[::-1]}.png")
    assert run(renamed, tmp_path / "out") == 0
    first, second = (
        {split: {p.name for p in (out / split).rglob("*.jpg")} for split in ("train", "val")}
        for out in (prepared, tmp_path / "out")
    )
    assert not first["train"] & second["val"]
    assert not first["val"] & second["train"]


def test_two_runs_are_the_same_to_the_byte(prepared, clip_art, tmp_path):
    assert run(clip_art, tmp_path / "out") == 0
    first, second = (
        {p.relative_to(out): p.read_bytes() for p in out.rglob("*.jpg")}
        for out in (prepared, tmp_path / "out")
    )
    assert first == second


def test_missing_clip_art_says_what_to_install(tmp_path, capsys):
    assert run(tmp_path / "nowhere", tmp_path / "out") == 1
    assert "apt-get install openclipart-png" in capsys.readouterr().err


def test_a_category_with_too_few_images_is_named_and_nothing_written(clip_art, tmp_path, capsys):
    assert run(clip_art, tmp_path / "out", "--per-class", "60") == 1
    assert "animals has" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(clip_art, tmp_path, capsys):
    assert run(clip_art, tmp_path) == 1
    assert f"{tmp_path} exists" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [("--per-class", "4"), ("--size", "0")])
def test_impossible_numbers_are_refused(clip_art, tmp_path, options):
    with pytest.raises(SystemExit, match="2"):
        run(clip_art, tmp_path / "out", *options)
