"""Decoding one image with PIL."""

import io
import warnings

from PIL import Image, UnidentifiedImageError

from fastvitc.data.index import ImageIndex
from fastvitc.errors import DataError


def read_image(index: ImageIndex, number: int) -> Image.Image:
    """The image as RGB: gray is repeated, CMYK and palettes converted, transparency and EXIF orientation ignored.

    Raises:
        DataError: the image cannot be read, or it is none; the message names it.
    """
    data = index.read(number)
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise DataError(f"cannot read the image {index.name(number)}: it is none that PIL knows") from error
    except Exception as error:  # PIL's decoders raise whatever their parsing trips over
        reason = str(error) or type(error).__name__
        raise DataError(f"cannot read the image {index.name(number)}: {reason}") from error
