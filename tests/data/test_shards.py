"""Tar shards give the images of the folder that they were made from."""

import shutil
import tarfile

import numpy as np
import pytest
import torch
from loading import READING, load, order, pixels
from packing import pack, pack_folder
from PIL import Image

from fastvitc.data import index_folder, index_split
from fastvitc.data.source import Shards
from fastvitc.errors import DataError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Three classes, 8 training images each of a gray of its own, 2 to validate."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 8), ("val", 2)):
        for place, name in enumerate(("ant", "bee", "cat")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = np.random.default_rng((place, number)).integers(256, size=(40, 50, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{number}.jpg")
    return root


@pytest.fixture(scope="module", params=["folders", "cls", "json"])
def shards(request, data_dir, tmp_path_factory):
    return pack_folder(data_dir, tmp_path_factory.mktemp("shards"), request.param)


def test_shards_have_the_bytes_labels_classes_and_digest_of_their_folder(data_dir, shards):
    for folder, packed in zip(index_folder(data_dir), index_folder(shards), strict=True):
        assert isinstance(packed.source, Shards)
        assert packed.classes == folder.classes == ("ant", "bee", "cat")
        assert packed.labels.tolist() == folder.labels.tolist()
        assert [packed.read(n) for n in range(len(packed))] == [folder.read(n) for n in range(len(folder))]
        assert packed.digest == folder.digest


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on a single core
@pytest.mark.parametrize("kind", READING)
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_the_pixels_of_their_folder_in_its_order(kind, workers, data_dir, shards):
    folder, packed = (
        load(kind, index_folder(root)[0], workers=workers, batch_size=4) for root in (data_dir, shards)
    )
    for epoch in range(2):
        for loader in (folder, packed):
            loader.seek(epoch)
        assert torch.equal(pixels(packed), pixels(folder))
    packed.close()
    folder.close()


@pytest.mark.parametrize("kind", READING)
def test_an_epoch_over_shards_goes_on_from_any_batch(kind, shards):
    train, _ = index_folder(shards)
    whole = [batch.images.clone() for batch in load(kind, train, batch_size=4)]
    loader = load(kind, train, batch_size=4)
    loader.seek(0, 4)
    rest = [batch.images.clone() for batch in loader]
    assert len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[4:], strict=True))


@pytest.mark.parametrize("kind", READING)
def test_a_broken_image_in_a_shard_is_named_and_not_seen(kind, data_dir, tmp_path):
    images = {f"ant/{p.name}": p.read_bytes() for p in (data_dir / "val" / "ant").iterdir()}
    pack(tmp_path / "val" / "0.tar", {**images, "ant/9.jpg": b"<html>"})
    loader = load(kind, index_split(tmp_path), training=False)
    assert order(loader) == [0, 0, -1]
    assert f"cannot read the image {tmp_path}/val/0.tar:ant/9.jpg" in loader.bad[2]


def test_shards_may_lie_one_level_deeper(shards, tmp_path):
    for split in ("train", "val"):
        for number in range(3):
            target = tmp_path / split / f"part{number % 2}" / f"{number}.tar"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(shards / split / f"{number:03d}.tar", target)
    if (shards / "classes.txt").exists():
        shutil.copy(shards / "classes.txt", tmp_path)
    assert index_folder(tmp_path)[0].digest == index_folder(shards)[0].digest


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_and_script_are_read(format, tmp_path):
    name = "./cat/" + "ü" * 120 + "/1.jpg"
    pack(tmp_path / "0.tar", {name: b"first", "./cat/.2.jpg": b"hidden", "cat/3.jpg": b"last"}, format=format)
    index = index_split(tmp_path)
    assert [index.name(n).partition("0.tar:")[2] for n in range(2)] == ["cat/3.jpg", name[2:]]
    assert [index.read(n) for n in range(2)] == [b"last", b"first"]


def test_labels_without_names_are_called_by_their_numbers_in_their_order(tmp_path):
    members = {f"{n:02d}.{kind}": b"%d" % n for n in range(11) for kind in ("jpg", "cls")}
    pack(tmp_path / "0.tar", members)
    index = index_split(tmp_path)
    assert index.classes == tuple(map(str, range(11)))
    assert index.labels.tolist() == list(range(11))


def test_a_cls_counts_before_a_json_and_a_json_without_a_label_says_nothing(tmp_path):
    pack(tmp_path / "one" / "0.tar", {"1.jpg": b"", "1.json": b'{"label": 7}', "1.cls": b" 0\n"})
    pack(tmp_path / "two" / "0.tar", {"bee/1.jpg": b"", "bee/1.json": b'{"text": "a bee"}'})
    assert index_split(tmp_path / "one").labels.tolist() == [0]
    assert index_split(tmp_path / "two").classes == ("bee",)


def test_classes_txt_may_name_classes_that_no_image_is_of(tmp_path):
    pack(tmp_path / "0.tar", {"1.jpg": b"", "1.cls": b"1"})
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    index = index_split(tmp_path)
    assert (index.classes, index.labels.tolist()) == (("ant", "bee", "cat"), [1])


def test_a_shard_that_was_cut_after_it_was_indexed_is_told_of(tmp_path):
    path = pack(tmp_path / "0.tar", {"bee/1.jpg": b"x" * 3000})
    index = index_split(tmp_path)
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match=r"0\.tar:bee/1\.jpg: its shard has become shorter"):
        index.read(0)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def overwrite(path, place):
    content = bytearray(path.read_bytes())
    content[place : place + 200] = b"\xff" * 200
    path.write_bytes(content)


TWO = {"bee/1.jpg": b"x" * 3000, "bee/2.jpg": b"y" * 3000}
LABELLED = {"1.jpg": b"", "1.cls": b"0"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut(path, 2000), r"0\.tar is cut off at bee/1\.jpg; fetch or pack it again"),
        (lambda path: cut(path, 512 + 3072 + 100), r"0\.tar is cut off at its end"),
        (lambda path: cut(path, 512 + 3072), r"0\.tar is cut off at its end"),
        (lambda path: cut(path, 0), r"0\.tar is no whole tar file \(empty file\)"),
        (lambda path: overwrite(path, 0), r"0\.tar is no whole tar file"),
        (lambda path: overwrite(path, 512 + 3072), r"0\.tar is damaged at byte 3584"),
        (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(600)), r"0\.tar is compressed.*plain \.tar"),
        (lambda path: path.rename(path.with_name("0.tar.gz")), r"0\.tar\.gz is compressed.*plain \.tar"),
        (lambda path: (path.parent / "bee").mkdir(), r"holds shards \(0\.tar\) beside other things \(bee\)"),
        (lambda path: path.with_name("1.jpg").write_bytes(b""), r"beside other things \(1\.jpg\)"),
    ],
)
def test_a_damaged_compressed_or_mixed_shard_is_refused_with_the_reason(damage, message, tmp_path):
    damage(pack(tmp_path / "val" / "0.tar", TWO))
    with pytest.raises(DataError, match=message):
        index_split(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.jpg": b""}, r"the sample .*0\.tar:1 has no label; expected 1\.cls"),
        ({"1.cls": b"0"}, r"the sample .*0\.tar:1 has a label and no image"),
        ({"1.jpg": b"", "2.jpg": b"", "1.cls": b"0"}, r"0\.tar:1 has no label"),
        ({**LABELLED, "1.png": b""}, r"0\.tar:1 has 2 images; expected one"),
        ({**LABELLED, "bee/2.jpg": b""}, r"2\.jpg has no label, others in .* have one"),
        ({"bee/2.jpg": b"", **LABELLED}, r"1\.jpg has a label, others in .* have none"),
        ({"1.jpg": b"", "1.cls": b"bee"}, r"label .*0\.tar:1\.cls is 'bee'; expected the number of a class"),
        ({"1.jpg": b"", "1.cls": b"-1"}, r"1\.cls is '-1'"),
        ({"1.jpg": b"", "1.json": b'{"label": "bee"}'}, r"1\.json is 'bee'"),
        ({"1.jpg": b"", "1.json": b"{"}, r"1\.json is '\{'"),
        ({"1.jpg": b"", "1.cls": b"1"}, r"no image in .* is of class 0, though there is a class 1; count"),
        ({"notes.txt": b""}, r"hold no image"),
    ],
)
def test_a_sample_that_cannot_be_used_is_refused_with_the_reason(members, message, tmp_path):
    pack(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match=message):
        index_split(tmp_path)


def test_a_link_in_a_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        link = tarfile.TarInfo("bee/1.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "bee/0.jpg"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"holds bee/1\.jpg as a link.*--hard-dereference"):
        index_split(tmp_path)


def test_shards_in_some_folders_alone_are_refused(tmp_path):
    pack(tmp_path / "a" / "0.tar", TWO)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"a holds shards and .*b none"):
        index_split(tmp_path)
    (tmp_path / "a").rename(tmp_path / "c")
    with pytest.raises(DataError, match=r"0\.tar lies in a class folder"):
        index_split(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant\n", r"1\.jpg is of class 1, and classes\.txt names 1 classes"),
        ("ant\n\nbee\n", "has an empty line or a name twice"),
        ("ant\nant\n", "has an empty line or a name twice"),
    ],
)
def test_names_of_classes_that_do_not_fit_are_refused(text, message, tmp_path):
    pack(tmp_path / "0.tar", {"1.jpg": b"", "1.cls": b"1"})
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        index_split(tmp_path)


def test_splits_with_other_numbers_of_classes_are_refused(tmp_path):
    for split, labels in (("train", "01"), ("val", "0")):
        members = {f"{n}.{kind}": n.encode() for n in labels for kind in ("jpg", "cls")}
        pack(tmp_path / split / "0.tar", members)
    with pytest.raises(DataError, match="only in train: 1"):
        index_folder(tmp_path)
