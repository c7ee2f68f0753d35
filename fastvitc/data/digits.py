"""scikit-learn's handwritten digits as a folder of images: real data that needs no download."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from fastvitc.errors import DataError
from fastvitc.files import cache_folder

SIDE = 32
_VAL_EVERY = 5


def digits_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of scikit-learn's 1,797 handwritten digits, written on the first call.

    JPEGs of 32x32 pixels, enlarged from 8x8, in `train/<digit>/` and `val/<digit>/`; of each digit every fifth image is
    in `val`. The folder is complete or absent, also after an interruption or when several processes ask at once.

    Args:
        cache_dir: where to keep it; by default `fastvitc.files.cache_folder()`.

    Raises:
        DataError: the cache cannot be written.
    """
    cache = Path(cache_dir) if cache_dir is not None else cache_folder()
    folder = cache / "digits"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="digits-", dir=cache))
        try:
            _write(unfinished / "digits")
            (unfinished / "digits").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(unfinished)
    except OSError as error:
        raise DataError(
            f"cannot write the digits to {folder} ({error}); set FASTVITC_CACHE to a writable folder, "
            "or give a data folder of your own"
        ) from error
    return folder


def _write(folder: Path) -> None:
    from sklearn.datasets import load_digits  # takes a second, and most callers find the folder written

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for digit in range(10):
        for place, number in enumerate(np.flatnonzero(digits.target == digit)):
            split = "val" if place % _VAL_EVERY == _VAL_EVERY - 1 else "train"
            path = folder / split / str(digit) / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels[number]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            image.save(path, quality=95)
