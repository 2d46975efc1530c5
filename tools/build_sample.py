"""Build the bundled cut-outs of `itpn/data/sample` from the Debian package `openclipart-png`.

    apt-get download openclipart-png && dpkg -x openclipart-png_*.deb openclipart
    python tools/build_sample.py openclipart --sheets /tmp/sheets

Folders of the package become classes; files named in `build_sample_drop.txt` were left out after looking at
every class (mislabelled, broken, text only, diagrams, nudity, photographs of people).
"""

import argparse
import hashlib
import io
import json
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SAMPLE = Path(__file__).parents[1] / "itpn" / "data" / "sample"
DROPPED = set(Path(__file__).with_name("build_sample_drop.txt").read_text().splitlines())
SIZE = 96
VAL_SHARE = 0.18
MAX_PIXELS = 20_000_000
SOURCE = "Debian openclipart-png 1:0.18+dfsg-19"

CLASSES = {
    "bird": ["animals/birds/**/*", "animals/*"],
    "bug": ["animals/bugs/*"],
    "building": ["buildings/*", "buildings/homes/*"],
    "clothing": ["people/clothing/*", "people/clothing/hats/*", "people/clothing/jewelry/*"],
    "drink": ["food/beverages/**/*"],
    "electronics": ["computer/hardware/*", "electronics/*", "office/telephone/*"],
    "flag": [
        "signs_and_symbols/flags/*",
        *(f"signs_and_symbols/flags/{c}/*" for c in ("africa", "america", "asia")),
    ],
    "food": ["food/desserts/*", "food/meats_and_eggs/*", "food/breads_and_carbs/*", "food/*"],
    "fruit": ["food/fruit/*", "food/vegetables/*"],
    "instrument": ["recreation/music/*"],
    "mammal": ["animals/mammals/**/*"],
    "person": ["people/*"],
    "plant": ["plants/**/*"],
    "sign": ["transportation/roadsigns/*", "transportation/aiga-symbols/*_"],
    "stationery": ["office/*", "education/books/*"],
    "tool": ["tools/*"],
    "toy": ["recreation/toys/*", "recreation/sports/*", "recreation/party/*"],
    "vehicle": ["transportation/vehicles/**/*", "transportation/*", "transportation/boating/*"],
}


def cutouts(package: Path) -> Iterator[tuple[str, str, Image.Image]]:
    """(class, path in the package, RGBA cut-out whose longer side is 96 px), every drawing once."""
    root = package / "usr" / "share" / "openclipart" / "png"
    seen: set[bytes] = set()
    for name, patterns in CLASSES.items():
        for path in (path for pattern in patterns for path in sorted(root.glob(pattern + ".png"))):
            source = str(path.relative_to(root))
            image = None if source in DROPPED else cutout(path)
            if image is not None and image.tobytes() not in seen:
                seen.add(image.tobytes())
                yield name, source, image


def cutout(path: Path) -> Image.Image | None:
    """The drawing without its empty border, None where there is too little of it to recognise."""
    image = Image.open(path)
    if image.width * image.height > MAX_PIXELS:
        return None
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 24)).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = SIZE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    covered = (np.asarray(image)[..., 3] > 128).mean()
    return image if min(width, height) >= SIZE // 5 and covered > 0.08 else None


def fingerprint(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Difference hash [128] of the drawing on grey, and its silhouette [256], both blind to aspect ratio."""
    ground = Image.new("RGBA", image.size, (160, 160, 160, 255))
    grey = Image.alpha_composite(ground, image).convert("L")
    rows = np.asarray(grey.resize((9, 8), Image.Resampling.BOX)).astype(int)
    columns = np.asarray(grey.resize((8, 9), Image.Resampling.BOX)).astype(int)
    hashed = np.concatenate([(np.diff(rows, axis=1) > 2).ravel(), (np.diff(columns, axis=0) > 2).ravel()])
    silhouette = np.asarray(image.getchannel("A").resize((16, 16), Image.Resampling.BOX)) > 127
    return hashed, silhouette.ravel()


def near_duplicates(images: list[Image.Image]) -> list[int]:
    """Group number of every image. The same hash joins, or the same silhouette (recoloured), transitively."""
    hashes, silhouettes = (np.stack(bits) for bits in zip(*map(fingerprint, images), strict=True))
    parent = list(range(len(images)))

    def find(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i in range(len(images)):
        distance = (hashes[:i] != hashes[i]).sum(1)
        outline = (silhouettes[:i] != silhouettes[i]).sum(1)
        plain = silhouettes[i].mean() > 0.9
        for j in np.flatnonzero((distance <= 10) | ((outline <= 8) & (distance <= (0 if plain else 40)))):
            parent[find(i)] = find(int(j))
    return [find(i) for i in range(len(images))]


def split(classes: list[str], groups: list[int], digests: list[str]) -> list[str]:
    """Whole groups go to val, small ones first by hash order, until a class has its share."""
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    total, chosen, val = Counter(classes), Counter[str](), set[int]()
    for group in sorted(members, key=lambda group: digests[members[group][0]]):
        counts = Counter(classes[i] for i in members[group])
        if all(chosen[name] + count <= round(VAL_SHARE * total[name]) for name, count in counts.items()):
            chosen.update(counts)
            val.update(members[group])
    return ["val" if i in val else "train" for i in range(len(classes))]


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88, alpha_quality=100, method=6)
    return buffer.getvalue()


def sheet(images: list[Image.Image], path: Path, columns: int = 16) -> None:
    """A numbered picture of one class, to judge it by eye."""
    picture = Image.new("RGB", (columns * 84, -(-len(images) // columns) * 84), "#b8c8d8")
    draw = ImageDraw.Draw(picture)
    for i, image in enumerate(images):
        x, y = i % columns * 84, i // columns * 84
        small = image.copy()
        small.thumbnail((78, 78))
        picture.paste(small, (x + 4, y + 4), small)
        draw.text((x, y), str(i), fill="red")
    picture.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, help="the unpacked package")
    parser.add_argument("--sheets", type=Path, help="also write one numbered picture per class there")
    arguments = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    classes, paths, images = (list(column) for column in zip(*cutouts(arguments.package), strict=True))
    groups = near_duplicates(images)
    encoded = [encode(image) for image in images]
    digests = [hashlib.sha256(data).hexdigest() for data in encoded]
    sides = split(classes, groups, digests)
    SAMPLE.mkdir(parents=True, exist_ok=True)
    entries = []
    with zipfile.ZipFile(SAMPLE / "cutouts.zip", "w", zipfile.ZIP_STORED) as archive:
        for i, data in enumerate(encoded):
            file = f"{i:04d}.webp"
            archive.writestr(zipfile.ZipInfo(file, (2000, 1, 1, 0, 0, 0)), data)
            entries.append(
                {
                    "file": file,
                    "class": classes[i],
                    "split": sides[i],
                    "group": groups[i],
                    "source": paths[i],
                    "sha256": digests[i],
                }
            )
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    header = f'{{"source": {json.dumps(SOURCE)}, "classes": {json.dumps(list(CLASSES))}, "images": [\n  '
    (SAMPLE / "index.json").write_text(header + lines + "\n]}\n")
    counts = Counter(zip(classes, sides, strict=True))
    for name in CLASSES:
        print(f"{name:12s} {counts[name, 'train']:4d} train {counts[name, 'val']:4d} val")
        if arguments.sheets:
            arguments.sheets.mkdir(parents=True, exist_ok=True)
            chosen = [image for image, label in zip(images, classes, strict=True) if label == name]
            sheet(chosen, arguments.sheets / f"{name}.png")
            names = [path for path, label in zip(paths, classes, strict=True) if label == name]
            (arguments.sheets / f"{name}.txt").write_text(
                "".join(f"{i} {path}\n" for i, path in enumerate(names))
            )
    print(f"{len(images)} images, {Counter(sides)}, largest groups {Counter(groups).most_common(4)}")


if __name__ == "__main__":
    main()
