import pytest
from loading import index_of
from PIL import Image
from sklearn.datasets import load_sample_images

from fastvitc.data import digits_folder, index_folder

SIZES = [(320, 213), (300, 400), (333, 217), (67, 333), (233, 233), (61, 47), (32, 32), (600, 80)]


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return index_folder(digits_folder(tmp_path_factory.mktemp("cache")))
