import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fastvitc.data import digits, digits_folder, index_folder
from fastvitc.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return digits_folder(tmp_path_factory.mktemp("cache"))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jpg")}


def test_the_folder_is_an_index_of_all_digits(folder):
    train, val = index_folder(folder)
    assert train.classes == tuple("0123456789")
    assert len(train) + len(val) == 1797


def test_a_fifth_of_each_digit_is_for_validation(folder):
    train, val = (np.bincount(split.labels, minlength=10) for split in index_folder(folder))
    np.testing.assert_array_equal(val, (train + val) // 5)


def test_images_are_the_digits_enlarged(folder):
    originals = load_digits().images * (255 / 16)
    for path in sorted(folder.rglob("*.jpg"))[::97]:
        image = Image.open(path)
        assert image.size == (32, 32)
        shrunk = np.asarray(image, float).reshape(8, 4, 8, 4).mean((1, 3))
        assert np.corrcoef(shrunk.ravel(), originals[int(path.stem)].ravel())[0, 1] > 0.97


def test_files_bear_the_digit_they_show(folder):
    target = load_digits().target
    assert all(target[int(path.stem)] == int(path.parent.name) for path in folder.rglob("*.jpg"))


def test_the_folder_is_written_once(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    assert digits_folder(folder.parent) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")} == before


def test_two_writings_are_the_same_to_the_byte(folder, tmp_path):
    assert contents(digits_folder(tmp_path)) == contents(folder)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_writing_leaves_nothing_and_is_made_good(tmp_path, monkeypatch, interruption, folder):
    save, saved = Image.Image.save, []

    def interrupted(image, path, **options):
        saved.append(path)
        if len(saved) == 50:
            raise interruption
        save(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises((KeyboardInterrupt, DataError)):
        digits_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert contents(digits_folder(tmp_path)) == contents(folder)


def test_a_process_that_comes_second_takes_the_firsts_folder(tmp_path, monkeypatch, folder):
    write = digits._write

    def write_when_another_is_faster(unfinished):
        write(unfinished)
        write(tmp_path / "digits")

    monkeypatch.setattr(digits, "_write", write_when_another_is_faster)
    assert contents(digits_folder(tmp_path)) == contents(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_callers_that_ask_at_once_get_the_same_whole_folder(tmp_path, folder):
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(digits_folder, [tmp_path] * 3))
    assert folders == [tmp_path / "digits"] * 3
    assert contents(folders[0]) == contents(folder)
    assert os.listdir(tmp_path) == ["digits"]


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch, variable):
    for name in ("FASTVITC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(digits, "_write", lambda unfinished: unfinished.mkdir())
    cache = tmp_path if variable == "XDG_CACHE_HOME" else tmp_path / ".cache"
    assert digits_folder() == cache / "fastvitc" / "digits"


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write the digits to .*file/digits .*set FASTVITC_CACHE"):
        digits_folder(tmp_path / "file")
