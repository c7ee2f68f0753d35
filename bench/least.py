"""The bytes that a stem moves at least; those of the other ops stand beside them, where they are a product."""

from fastvitc.models.config import ViTConfig


def stem_bytes(config: ViTConfig) -> tuple[int, int]:
    """(forward, backward) of one image, where outputs z of convolutions are kept in 16 bits and the rest is recomputed.

    Batch statistics need all of z before any of it is used. Forward reads the uint8 image, writes and reads each z once
    and writes the float32 tokens; backward reads the image, each z and the gradient of the tokens once, and writes and
    reads the gradient of each z once.
    """
    height, width = config.image_size
    image, z = config.in_chans * height * width, 0
    for channels, stride in zip(config.stem.channels[:-1], config.stem.strides, strict=False):
        height, width = height // stride, width // stride
        z += 2 * channels * height * width
    tokens = 4 * config.tokens * config.width
    return image + 2 * z + tokens, image + 3 * z + tokens
