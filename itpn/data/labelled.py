"""Images with a label picture each: pairs of files, found and read together."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath

from PIL import Image

from itpn.data.images import ImageList, Split, walk
from itpn.data.labels import Labelling, Labels, read_labels
from itpn.data.picture import BadImageError
from itpn.data.source import Names
from itpn.errors import UserError

IGNORED = 255
NAMES = "classes.txt"
MAX_NAMES = 1 << 20
"""The longest file of class names, in bytes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImages(ImageList):
    """Images that are files of their own, each with a PNG that has a class for every pixel.

    Attributes:
        label_root: The folder that `label_names` are relative to.
        label_names: The label pictures, one for each image.
        labelling: What the numbers in them mean.
        unpaired: Images without labels and labels without an image, which were left out, and why.
    """

    label_root: Path
    label_names: Names
    labelling: Labelling
    unpaired: tuple[BadImageError, ...] = ()

    def label_path(self, index: int) -> Path:
        return self.label_root / self.label_names[index]

    def pair(self, index: int) -> tuple[Image.Image, Labels]:
        """The image as upright 8-bit RGB, and its class ids [H, W].

        Raises:
            BadImageError: One of the files cannot be read, or they do not belong together.
        """
        with self.open(index) as picture:
            width, height = picture.size
            try:
                labels = read_labels(self.label_path(index), self.labelling, (height, width))
            except BadImageError as error:
                raise self.blaming(index, error) from error
            return picture.decode(), labels

    def some(self, indices: Iterable[int], description: str) -> "LabelledImages":
        """Those of the indices."""
        chosen = list(indices)
        return replace(
            self,
            names=Names([self.names[index] for index in chosen]),
            label_names=Names([self.label_names[index] for index in chosen]),
            description=description,
        )

    def blaming(self, index: int, error: BadImageError) -> BadImageError:
        """What is wrong with an image's labels, told of the image: loaders know samples by that."""
        return BadImageError(self.path(index), f"its labels {error.path}: {error.reason}")

    @property
    def fingerprint(self) -> str:
        digest = sha256(f"{super().fingerprint} {self.labelling}".encode())
        digest.update(self.label_names.ends.tobytes())
        digest.update(self.label_names.characters.tobytes())
        return digest.hexdigest()


def find_masks(
    root: Path,
    split: Split = "train",
    *,
    num_classes: int | None = None,
    names: Path | None = None,
    ignored: int | None = IGNORED,
    zero_is_no_label: bool = False,
    skip_bad: bool = False,
) -> LabelledImages:
    """ROOT/images/SPLIT with a PNG of the same name for each image in ROOT/labels/SPLIT, sorted by name.

    Args:
        num_classes: needed where no names are given.
        names: a file with a class name a line; ROOT/classes.txt if it is there.
        ignored: the number of pixels without a label; None: every pixel has one.
        zero_is_no_label: 0 marks pixels without a label too, and the classes count from 1.
        skip_bad: leave out what has no partner, instead of raising an error.

    Raises:
        UserError: a folder is missing or empty, the classes are not known, or files have no partner.
    """
    class_names = _class_names(root, names, num_classes)
    first = int(zero_is_no_label)
    if ignored is not None and first <= ignored < first + len(class_names):
        raise UserError(
            f"{ignored} cannot mark pixels without a label: it is a class, {class_names[ignored - first]!r}, "
            f"of {len(class_names):,}; choose a number that is none with --data.ignored"
        )
    no_label = {*([] if ignored is None else [ignored]), *([0] if zero_is_no_label else [])}
    labelling = Labelling(class_names, first, tuple(sorted(no_label)))
    return paired(root / "images" / split, root / "labels" / split, labelling, skip_bad=skip_bad)


def paired(image_folder: Path, label_folder: Path, labelling: Labelling, *, skip_bad: bool) -> LabelledImages:
    """The images below one folder with the PNGs of the same names below another.

    Raises:
        UserError: a folder is missing or empty, two images share a name, or, unless these are to be skipped,
            files have no partner.
    """
    images = _by_stem(image_folder, walk(image_folder, []))
    labels = _by_stem(label_folder, walk(label_folder))  # a model's labels may be learned from
    both = sorted(images.keys() & labels.keys())
    unpaired = (
        *_alone(image_folder, (images[stem] for stem in sorted(images.keys() - labels.keys())),
                f"no label picture of this name in {label_folder}"),
        *_alone(label_folder, (labels[stem] for stem in sorted(labels.keys() - images.keys())),
                f"no image of this name in {image_folder}"),
    )  # fmt: skip
    if unpaired and not skip_bad:
        some = "; ".join(f"{bad.path}: {bad.reason}" for bad in unpaired[:3])
        more = f" and {len(unpaired) - 3:,} more" if len(unpaired) > 3 else ""
        raise UserError(
            f"{len(unpaired):,} files have no partner: {some}{more}; add what is missing, or leave such "
            "files out with --data.skip-bad"
        )
    if not both:
        raise UserError(f"no image in {image_folder} has a label picture in {label_folder}")
    left_out = f"; {len(unpaired):,} files without a partner are left out" if unpaired else ""
    return LabelledImages(
        root=image_folder,
        names=Names([images[stem] for stem in both]),
        labels=None,
        class_names=None,
        description=f"{len(both):,} images with labels of {labelling.num_classes:,} classes under "
        f"{image_folder}{left_out}",
        label_root=label_folder,
        label_names=Names([labels[stem] for stem in both]),
        labelling=labelling,
        unpaired=unpaired,
    )


def _by_stem(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Pictures below a folder by their names without the ending."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; see docs/data.md for how labelled images are laid out")
    found: dict[str, str] = {}
    for name in sorted(names):
        stem = os.path.splitext(name)[0]
        if stem in found:
            raise UserError(f"{folder / found[stem]} and {folder / name} share a name; remove one of them")
        found[stem] = name
    return found


def _alone(folder: Path, names: Iterable[str], reason: str) -> list[BadImageError]:
    return [BadImageError(folder / PurePosixPath(name), reason) for name in names]


def _class_names(root: Path, names: Path | None, num_classes: int | None) -> tuple[str, ...]:
    path = names or root / NAMES
    if names is None and not path.is_file():
        if num_classes is None:
            raise UserError(
                f"the number of classes is not known: write their names to {path}, one a line, or give "
                "--data.num-classes"
            )
        return numbered(num_classes)
    found = tuple(line.strip() for line in read_table(path))
    if "" in found or len(set(found)) < len(found):
        raise UserError(f"{path} has a line without a name, or a name twice; it takes one class a line")
    if num_classes not in (None, len(found)):
        raise UserError(f"{path} names {len(found):,} classes, but --data.num-classes says {num_classes:,}")
    return found


def numbered(num_classes: int) -> tuple[str, ...]:
    """Names for classes that have none."""
    return tuple(f"class {i}" for i in range(num_classes))


def read_table(path: Path) -> Sequence[str]:
    """The lines of a small text file, without empty ones at its end.

    Raises:
        UserError: it cannot be read, or is too long to be one.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_NAMES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; it lists the classes' names") from error
    if len(data) > MAX_NAMES:
        raise UserError(f"{path} is longer than {MAX_NAMES:,} bytes; it lists the classes' names")
    return data.decode("utf-8-sig", errors="replace").rstrip().splitlines()
