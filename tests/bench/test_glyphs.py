from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image

from bench import glyphs
from fastvitc.data import index_folder
from fastvitc.errors import DataError

FAMILIES = [f"Family{i} Sans" for i in range(20)]


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """Twenty families of one font each, a second font of one of them, one without letters and a damaged one."""
    root = tmp_path_factory.mktemp("fonts")
    source = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")
    for family in [*FAMILIES, "Family3 Serif"]:
        with TTFont(source) as font:
            font["name"].setName(family, 1, 3, 1, 0x409)
            font["name"].removeNames(nameID=16)
            font.save(root / f"{family}.ttf")
    with TTFont(source) as font:
        for table in font["cmap"].tables:
            table.cmap.pop(ord("A"), None)
        font["name"].setName("Symbols", 1, 3, 1, 0x409)
        font.save(root / "symbols.ttf")
    (root / "damaged.otf").write_bytes(b"OTTO")
    return root


@pytest.fixture(scope="module")
def drawn(fonts, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "images"
    glyphs.main(["--fonts", str(fonts), "--out", str(out), "--size", "24"])
    return out


def families_of(index):
    return {Path(index.name(n)).name.split("-")[0] for n in range(len(index))}


def test_every_font_draws_every_character_into_47_classes(drawn):
    train, val = index_folder(drawn)
    assert len(train.classes) == 47
    assert len(train) + len(val) == 62 * 21
    assert {"O", "7", "a_small"} < set(train.classes)
    assert "o_small" not in train.classes
    images = {Path(train.name(n)).read_bytes() for n in range(len(train))}
    assert len(images) == len(train)


def test_no_family_is_in_both_splits(drawn):
    train, val = (families_of(index) for index in index_folder(drawn))
    assert train
    assert val
    assert not train & val
    assert len(train | val) == 20


def test_glyphs_are_grey_on_white_and_whole(drawn):
    for path in sorted((drawn / "val").rglob("*.jpg"))[::40]:
        with Image.open(path) as image:
            pixels = np.asarray(image)
        assert pixels.shape == (24, 24)
        edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert np.median(edges) > 240
        assert pixels.min() < 200


def test_the_same_fonts_give_the_same_images(fonts, drawn, tmp_path):
    glyphs.prepare(fonts, tmp_path / "again", 24)
    first, again = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*.jpg")}
        for root in (drawn, tmp_path / "again")
    )
    assert first == again


def test_too_few_families_and_a_folder_that_is_there_are_refused(drawn, fonts, tmp_path):
    with pytest.raises(DataError, match="at least 20 are needed; apt-get install"):
        glyphs.main(["--fonts", str(tmp_path), "--out", str(tmp_path / "new")])
    with pytest.raises(DataError, match="exists; remove it"):
        glyphs.main(["--fonts", str(fonts), "--out", str(drawn)])
    assert not (tmp_path / "new").exists()


def test_the_packages_are_printed_for_apt_get(capsys):
    glyphs.main(["--packages"])
    packages = capsys.readouterr().out.split()
    assert len(packages) == len(set(packages)) > 100
    assert all(package.startswith("fonts-") for package in packages)
