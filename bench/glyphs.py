"""Draws the letters and digits of Debian's free fonts as an ImageNet-layout folder of small JPEGs.

    apt-get install --no-install-recommends $(python -m bench.glyphs --packages)
    python -m bench.glyphs --out glyphs

The 47 classes are those of EMNIST's balanced split (Cohen et al. 2017, section II): the ten digits, the 26 capitals,
and the eleven small letters that do not look like their capitals; the others belong to the capital's class. Grey on
white. Fonts whose names begin with the same word are in one split, and no two images are the same: validation asks for
the letters of unseen fonts.
"""

import argparse
import hashlib
import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits

from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from fastvitc.errors import DataError
from fastvitc.programs.command import run_command

PACKAGES = (
    "fonts-3270 fonts-cardo fonts-clear-sans fonts-comic-neue fonts-hermit fonts-dkg-handwriting fonts-essays1743 "
    "fonts-adf-accanthis fonts-adf-baskervald fonts-adf-berenis fonts-adf-gillius fonts-adf-ikarius fonts-adf-irianis "
    "fonts-adf-libris fonts-adf-mekanus fonts-adf-oldania fonts-adf-romande fonts-adf-solothurn fonts-adf-switzera "
    "fonts-adf-tribun fonts-adf-universalis fonts-adf-verana fonts-aenigma fonts-agave fonts-allerta "
    "fonts-anonymous-pro fonts-apropal fonts-arapey fonts-averia-gwf fonts-averia-sans-gwf fonts-averia-serif-gwf "
    "fonts-b612 fonts-bebas-neue fonts-beteckna fonts-blankenburg fonts-breip fonts-cabin fonts-cabinsketch "
    "fonts-cantarell fonts-century-catalogue fonts-cherrybomb fonts-cmu fonts-comfortaa fonts-compagnon "
    "fonts-courier-prime fonts-crosextra-caladea fonts-crosextra-carlito fonts-dancingscript fonts-dejavu fonts-dosis "
    "fonts-dustin fonts-ebgaramond fonts-ecolier-court fonts-elstob fonts-engadget fonts-eurofurence fonts-f500 "
    "fonts-fantasque-sans fonts-fanwood fonts-femkeklaver fonts-firacode fonts-georgewilliams fonts-gnutypewriter "
    "fonts-go fonts-goudybookletter fonts-hack fonts-havana fonts-inconsolata fonts-inter fonts-isabella "
    "fonts-jetbrains-mono fonts-johnsmith-induni fonts-joscelyn fonts-junction fonts-junicode fonts-jura fonts-karla "
    "fonts-kaushanscript fonts-klaudia-berenika fonts-kristi fonts-lato fonts-le-murmure fonts-league-mono "
    "fonts-league-spartan fonts-leckerli-one fonts-lemonada fonts-levien-museum fonts-levien-typoscript "
    "fonts-liberation fonts-lindenhill fonts-linex fonts-linuxlibertine fonts-lobster fonts-lobstertwo fonts-manrope "
    "fonts-millimetre fonts-mononoki fonts-national-park fonts-ocr-a fonts-ocr-b fonts-okolaks fonts-oldstandard "
    "fonts-open-sans fonts-opendin fonts-opendyslexic fonts-paratype fonts-play fonts-prociono fonts-quattrocento "
    "fonts-quicksand fonts-radisnoir fonts-roadgeek fonts-roboto-unhinted fonts-roboto-slab fonts-routed-gothic "
    "fonts-rufscript fonts-sil-andika fonts-sil-charis fonts-sil-gentiumplus fonts-sjfonts fonts-solide-mirage "
    "fonts-sora fonts-staypuft fonts-stix fonts-summersby fonts-texgyre fonts-tiresias fonts-tomsontalks fonts-tuffy "
    "fonts-ubuntu-title fonts-vollkorn fonts-yanone-kaffeesatz fonts-yrsa-rasa fonts-lmodern fonts-noto-mono"
)
ONE_IN = 5  # families go to val
_LIKE_CAPITALS = "cijklmopsuvwxyz"
#: Character → class; small letters have names of their own where file systems ignore case.
CLASSES = (
    {c: c for c in digits + ascii_uppercase}
    | {c: c.upper() for c in _LIKE_CAPITALS}
    | {c: f"{c}_small" for c in ascii_lowercase if c not in _LIKE_CAPITALS}
)
_FEW = 20  # families that are too few for two splits


def prepare(fonts: Path, out: Path, size: int) -> dict[str, int]:
    """Draw every character of every Latin font below `fonts` into `out/{train,val}/<class>/`; the images per split.

    size: side in pixels. `out` is complete or absent.

    Raises:
        DataError: there are too few font families, or `out` exists.
    """
    if out.exists():
        raise DataError(f"{out} exists; remove it or choose another --out")
    families = _families(fonts)
    if len(families) < _FEW:
        raise DataError(
            f"{fonts} has {len(families)} families of fonts with all letters and digits, at least {_FEW} are needed; "
            "apt-get install --no-install-recommends $(python -m bench.glyphs --packages)"
        )
    counts = {"train": 0, "val": 0}
    seen: set[bytes] = set()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}-", dir=out.parent) as unfinished:
        folder = Path(unfinished) / "images"
        for split in counts:
            for name in set(CLASSES.values()):
                (folder / split / name).mkdir(parents=True)
        for family, faces in sorted(families.items()):
            split = "val" if _draw(family, ONE_IN) == 0 else "train"
            for number, face in enumerate(faces):
                for character, image in _glyphs(face, size):
                    content = hashlib.sha256(image.tobytes()).digest()
                    if content not in seen:
                        seen.add(content)
                        name = f"{hashlib.sha256(family.encode()).hexdigest()[:12]}-{number:02d}-{ord(character)}"
                        image.save(folder / split / CLASSES[character] / f"{name}.jpg", quality=95)
                        counts[split] += 1
        folder.rename(out)
    return counts


def _families(fonts: Path) -> dict[str, list[Path]]:
    """{first word of the family's name: font files} of the fonts that have every letter and digit."""
    logging.getLogger("fontTools").setLevel(
        logging.ERROR
    )  # many old fonts have faults that do not matter here
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for path in sorted(p for p in fonts.rglob("*") if p.suffix.lower() in (".ttf", ".otf")):
        try:
            with path.open("rb") as file, TTFont(file, lazy=True) as font:
                names, characters = font["name"], font.getBestCmap() or {}
                family = (names.getDebugName(16) or names.getDebugName(1) or "").partition(" ")[0]
        except Exception:  # the reader raises whatever a damaged font trips over
            continue
        if family and all(ord(c) in characters for c in CLASSES):
            found[family].append(path)
    return found


def _glyphs(face: Path, size: int) -> Iterator[tuple[str, Image.Image]]:
    """(character, its picture) for every character that the font draws; size, place and grey follow from the names."""
    largest = ImageFont.truetype(str(face), size)
    for character in CLASSES:
        key = f"{face.name} {character}"
        left, top, right, bottom = largest.getbbox(character)
        if right <= left or bottom <= top:
            continue  # a blank
        share = 0.55 + 0.3 * _draw(f"{key} size", 1000) / 1000
        scale = share * size / max(right - left, bottom - top)
        font = ImageFont.truetype(str(face), max(1, round(size * scale)))
        left, top, right, bottom = font.getbbox(character)
        free = size - (right - left), size - (bottom - top)
        x, y = (_draw(f"{key} {axis}", max(1, room + 1)) for axis, room in zip("xy", free, strict=True))
        image = Image.new("L", (size, size), 255)
        grey = _draw(f"{key} grey", 140)
        ImageDraw.Draw(image).text((x - left, y - top), character, fill=grey, font=font)
        if image.getextrema()[0] < 200:
            yield character, image


def _draw(key: str, choices: int) -> int:
    """One of so many choices, the same for a key each time."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % choices


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"))
    parser.add_argument("--out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument(
        "--packages", action="store_true", help="print the Debian packages of the fonts, and end"
    )
    args = parser.parse_args(argv)
    if args.packages:
        print(PACKAGES)
        return
    if args.out is None or args.size < 8:
        parser.error("--out is needed, and --size of at least 8")
    counts = prepare(args.fonts, args.out, args.size)
    print(f"{args.out}: {counts['train']} training and {counts['val']} validation images")


if __name__ == "__main__":
    run_command("python -m bench.glyphs", main)
