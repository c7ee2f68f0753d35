"""Reading one image file with PIL."""

import warnings

from PIL import Image

from fastvitc.errors import DataError


def read_image(path: str) -> Image.Image:
    """The image as RGB: gray is repeated, CMYK and palettes converted, transparency and EXIF orientation ignored.

    Raises:
        DataError: the file cannot be read or is no image.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
            return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise whatever their parsing trips over
        reason = str(error) or type(error).__name__
        raise DataError(f"cannot read the image {path}: {reason}; replace or remove the file") from error
