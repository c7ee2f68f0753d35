"""Prepares Debian's clip art (public domain) as an ImageNet-layout folder of small JPEGs: real colour images.

    apt-get install openclipart-png
    python -m bench.openclipart --out clipart

Twelve classes of equally many images. An image's split follows from its pixels alone, and none is taken twice: what is
in the training split is not in the validation split, under whatever name or class.
"""

import argparse
import hashlib
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps

CATEGORIES = (
    "animals",
    "computer",
    "food",
    "geography",
    "office",
    "people",
    "recreation",
    "shapes",
    "signs_and_symbols",
    "special",
    "tools",
    "transportation",
)
ONE_IN = 5  # images go to val


class PrepareError(Exception):
    """The folder cannot be prepared; the message says why and what to do."""


def prepare(png_dir: Path, out: Path, per_class: int, size: int) -> dict[str, int]:
    """Write `per_class` images of each category to `out/{train,val}/<category>/`; return the images per split.

    size: longest side in pixels. `out` is complete or absent.

    Raises:
        PrepareError: the clip art is missing, a category has too few distinct images, or `out` exists.
    """
    missing = [category for category in CATEGORIES if not (png_dir / category).is_dir()]
    if missing:
        raise PrepareError(f"{png_dir} has no folder {missing[0]}; apt-get install openclipart-png")
    if out.exists():
        raise PrepareError(f"{out} exists; remove it or choose another --out")
    wanted = {"train": per_class - per_class // ONE_IN, "val": per_class // ONE_IN}
    seen: set[str] = set()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}-", dir=out.parent) as unfinished:
        folder = Path(unfinished) / "images"
        for category in CATEGORIES:
            _write(_distinct(png_dir / category, size, seen), folder, category, wanted)
        folder.rename(out)
    return {split: count * len(CATEGORIES) for split, count in wanted.items()}


def _distinct(folder: Path, size: int, seen: set[str]) -> Iterator[tuple[str, Image.Image]]:
    """(content hash, image on white) of the images below `folder` not seen before; their order mixes the names."""
    files = folder.rglob("*.png")
    for path in sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as opened:
                    drawing = opened.convert("RGBA")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            continue  # some are posters of over a hundred million pixels
        image = Image.new("RGBA", drawing.size, "white")
        image.alpha_composite(drawing)
        image = ImageOps.contain(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        content = hashlib.sha256(image.tobytes()).hexdigest()
        if content not in seen:
            seen.add(content)
            yield content, image


def _write(
    images: Iterator[tuple[str, Image.Image]], folder: Path, category: str, wanted: dict[str, int]
) -> None:
    left = dict(wanted)
    for split in wanted:
        (folder / split / category).mkdir(parents=True)
    for content, image in images:
        split = "val" if int(content[:8], 16) % ONE_IN == 0 else "train"
        if left[split]:
            left[split] -= 1
            image.save(folder / split / category / f"{content[:16]}.jpg", quality=95)
        if not any(left.values()):
            return
    raise PrepareError(
        f"{category} has {sum(left.values())} distinct images too few "
        f"({left['train']} for train, {left['val']} for val); lower --per-class"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--png-dir", type=Path, default=Path("/usr/share/openclipart/png"))
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--per-class", type=int, default=90, help="images per class, one in five to val")
    parser.add_argument("--size", type=int, default=96, help="longest side in pixels")
    args = parser.parse_args(argv)
    if args.per_class < ONE_IN or args.size < 1:
        parser.error(f"--per-class must be at least {ONE_IN} and --size at least 1")
    try:
        counts = prepare(args.png_dir, args.out, args.per_class, args.size)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {counts['train']} training and {counts['val']} validation images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
