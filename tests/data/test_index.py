import os

import numpy as np
import pytest

from fastvitc.data import index_folder, index_split, read_index, synthetic_index, write_index
from fastvitc.errors import DataError


def make(root, *files):
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def paths_of(index):
    return [index.name(number) for number in range(len(index))]


def test_an_image_is_a_number_that_the_index_reads(tmp_path):
    index = index_split(make(tmp_path, "val/a/1.jpg", "val/b/2.jpg"))
    (tmp_path / "val/b/2.jpg").write_bytes(b"the second")
    assert index.read(1) == b"the second"


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    index = index_split(make(tmp_path, "val/a/1.jpg"))
    (tmp_path / "val/a/1.jpg").unlink()
    with pytest.raises(DataError, match=r"cannot read the image .*1\.jpg: No such file"):
        index.read(0)


def test_labels_are_positions_in_the_sorted_classes(tmp_path):
    names = [
        "train/b/1.jpg",
        "train/B/1.jpg",
        "train/a/2.JPEG",
        "train/a/1.png",
        "val/a/0.jpg",
        "val/b/0.jpg",
    ]
    train, val = index_folder(make(tmp_path, *names, "val/B/9.webp"))
    assert train.classes == val.classes == ("B", "a", "b")
    assert [os.path.relpath(p, tmp_path) for p in paths_of(train)] == [
        "train/B/1.jpg",
        "train/a/1.png",
        "train/a/2.JPEG",
        "train/b/1.jpg",
    ]
    assert train.labels.tolist() == [0, 1, 1, 2]
    assert train.labels.dtype == np.int32
    assert (train.split, val.split, len(train), len(val)) == ("train", "val", 4, 3)


def test_hidden_files_and_other_extensions_are_ignored(tmp_path):
    make(tmp_path, "val/a/1.jpg", "val/a/.2.jpg", "val/a/notes.txt", "val/.git/3.jpg", "val/README")
    index = index_split(tmp_path)
    assert index.classes == ("a",)
    assert [os.path.basename(p) for p in paths_of(index)] == ["1.jpg"]


def test_images_in_subfolders_belong_to_the_class(tmp_path):
    make(tmp_path, "val/a/1.jpg", "val/a/more/3.jpg", "val/a/more/.thumbs/0.jpg", "val/b/deep/er/2.png")
    index = index_split(tmp_path)
    assert [os.path.relpath(p, tmp_path / "val") for p in paths_of(index)] == [
        "a/1.jpg",
        "a/more/3.jpg",
        "b/deep/er/2.png",
    ]
    assert index.labels.tolist() == [0, 0, 1]


def test_a_link_that_leads_back_is_named(tmp_path):
    make(tmp_path, "val/a/1.jpg")
    (tmp_path / "val/a/again").symlink_to(tmp_path / "val/a", target_is_directory=True)
    with pytest.raises(DataError, match="again leads back to a folder that holds it; remove that link"):
        index_split(tmp_path)


def test_one_split_is_found_below_its_name_or_directly(tmp_path):
    make(tmp_path, "val/a/1.jpg", "train/a/2.jpg")
    below, direct = index_split(tmp_path), index_split(tmp_path / "val")
    assert paths_of(below) == paths_of(direct)
    assert below.root == direct.root == str(tmp_path / "val")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no folder train and val"),
        (["train/a/1.jpg"], "no folder val"),
        (["val/a/1.jpg"], "no folder train"),
        (["a/1.jpg"], "no folder train and val"),
        (["train/1.jpg", "val/a/1.jpg"], "train has no class folders"),
        (["train/a/1.jpg", "train/b/x.txt", "val/a/1.jpg", "val/b/1.jpg"], "without images: b;"),
        (["train/a/1.jpg", "val/b/1.jpg"], "only in train: a; only in val: b"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"], "only in train: b. Give"),
        (
            ["val/a/1.jpg", "train/a/1.jpg", *(f"train/c{i}/1.jpg" for i in range(9))],
            "c0, c1, c2, c3, c4 and 4 more",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_with_the_reason(tmp_path, files, message):
    make(tmp_path, *files)
    with pytest.raises(DataError, match=message):
        index_folder(tmp_path)


@pytest.mark.parametrize("index", [index_folder, index_split])
def test_a_missing_folder_is_named(tmp_path, index):
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; expected"):
        index(tmp_path / "nowhere")


def test_an_unreadable_folder_is_named_with_the_reason(tmp_path, monkeypatch):
    make(tmp_path, "val/a/1.jpg")

    scandir = os.scandir

    def refuse(path):
        if path == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=rf"cannot read the folder {tmp_path}: Permission denied"):
        index_split(tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    make(tmp_path, "images.zip")
    with pytest.raises(DataError, match=r"cannot read the folder .*images.zip: Not a directory"):
        index_split(tmp_path / "images.zip")


def test_a_synthetic_index_names_no_files():
    index = synthetic_index("train", images=25, classes=10)
    assert (len(index), len(index.classes), index.source) == (25, 10, None)
    assert np.bincount(index.labels).tolist() == [3] * 5 + [2] * 5


def test_splits_may_have_other_names_and_a_class_map_chooses_and_orders_the_classes(tmp_path):
    make(tmp_path, *(f"{split}/{name}/1.jpg" for split in ("training", "test") for name in "abc"))
    place = tmp_path / "index"
    place.mkdir()
    write_index(tmp_path, place, splits=("training", "test"), classes=("c", "a"))
    for index in read_index(place):
        assert index.classes == ("c", "a")
        assert index.labels.tolist() == [0, 1]
        assert [os.path.basename(os.path.dirname(path)) for path in paths_of(index)] == ["c", "a"]
    with pytest.raises(DataError, match="no folder for these classes of the class map: d"):
        write_index(tmp_path, place, splits=("training", "test"), classes=("a", "d"))
    with pytest.raises(DataError, match="has no folder train and val"):
        write_index(tmp_path, place)
