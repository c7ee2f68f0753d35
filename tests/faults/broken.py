"""Image files that cannot be read, or that are not what their names say."""

import io
import random
import struct
import subprocess
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

#: Whether each loader reads it; None where that is the decoder's affair.
_Read = bool | None
#: Words in the names of those of Pillow's own test images that are meant to be broken.
_BROKEN = (
    "bad",
    "bomb",
    "broken",
    "crash",
    "invalid",
    "oom",
    "ossfuzz",
    "overrun",
    "segfault",
    "timeout",
    "truncated",
)


@dataclass(frozen=True)
class Broken:
    """A file for a class folder.

    Attributes:
        name: of the file.
        contents: its bytes, or for what is no file a `Path` that a symlink leads to.
        pil, dali: whether the loader reads it as an image; None where that is its affair.
    """

    name: str
    contents: bytes | Path
    pil: _Read
    dali: _Read

    def put(self, folder: Path) -> None:
        """Make the file."""
        path = folder / self.name
        if isinstance(self.contents, Path):
            path.symlink_to(self.contents)
        else:
            path.write_bytes(self.contents)


def broken_images() -> list[Broken]:
    """One of each kind."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    image = Image.fromarray(pixels)
    jpeg = _encoded(image, "jpeg")
    files = [
        Broken("empty.jpg", b"", False, False),
        Broken("garbage.jpg", random.Random(0).randbytes(3000), False, False),
        Broken("page.jpg", b"<!DOCTYPE html><html><title>404 Not Found</title></html>", False, False),
        Broken("gif-named.jpg", _encoded(image, "gif"), True, False),
        Broken("png-named.jpg", _encoded(image, "png"), True, True),
        Broken("cmyk.jpg", _encoded(image.convert("CMYK"), "jpeg"), True, True),
        Broken(
            "16-bit.png", _encoded(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "png"), True, None
        ),
        Broken("bomb.png", _bomb(), False, False),
        # Reading it fails as on a broken disk.
        Broken("unreadable.jpg", Path("/proc/self/mem"), False, False),
        Broken("leads-nowhere.jpg", Path("nowhere"), True, True),  # no file, so no image
    ]
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        cut = jpeg[: int(share * len(jpeg))]
        files.append(Broken(f"cut-{share}.jpg", cut, False, False if share < 0.9 else None))
    for seed in range(8):
        files.append(Broken(f"flipped-{seed}.jpg", _flipped(jpeg, seed), None, None))
    return files


def pillow_images(folder: Path) -> list[Broken]:
    """Pillow's own broken images, out of its source distribution, which is downloaded into the folder.

    Raises:
        OSError: it cannot be had; the message says why.
    """
    version = PIL.__version__
    archive = folder / f"pillow-{version}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "pillow"]
        done = subprocess.run(
            [*command, "-d", folder, f"pillow=={version}"], capture_output=True, text=True, check=False
        )
        if not archive.exists():
            raise OSError(f"Pillow's source cannot be downloaded: {done.stderr.strip()[-200:]}")
    files = []
    with tarfile.open(archive) as source:
        for member in source:
            path = Path(member.name)
            if (
                member.isfile()
                and "images" in path.parts
                and any(word in path.name.lower() for word in _BROKEN)
            ):
                files.append(
                    Broken(
                        f"pillow-{len(files)}-{path.name}.jpg", source.extractfile(member).read(), None, None
                    )
                )
    return files


def _encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def _flipped(contents: bytes, seed: int) -> bytes:
    found, flipped = random.Random(seed), bytearray(contents)
    for _ in range(1 + seed):
        flipped[found.randrange(len(flipped))] ^= 1 << found.randrange(8)
    return bytes(flipped)


def _bomb() -> bytes:
    """A PNG of some bytes that says it has 100,000 times 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")
