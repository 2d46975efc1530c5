"""Images with a label picture each: pairs of files, found and read together."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath

from PIL import Image

from itpn.data.class_names import names_in
from itpn.data.folders import LeftOut, Split, walk
from itpn.data.images import ImageList
from itpn.data.labels import MAX_CLASSES, Labelling, Labels, listed, read_labels
from itpn.data.pairing import folders_of, partners
from itpn.data.picture import BadImageError
from itpn.data.source import Names
from itpn.errors import UserError, printable

IGNORED = 255


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImages(ImageList):
    """Images that are files of their own, each with a picture that has a class for every pixel.

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
        values = self.labelling.values or ""  # which earlier versions did not have
        digest = sha256(f"{super().fingerprint} {self.labelling}{values}".encode())
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
    values: tuple[int, ...] = (),
    skip_bad: bool = False,
) -> LabelledImages:
    """Images with a label picture of the same name each, in folders that `folders_of` finds, sorted by name.

    Args:
        num_classes: needed where there are neither names nor values.
        names: a file with a class name a line; ROOT/classes.txt if it is there.
        ignored: the number of pixels without a label; None: every pixel has one.
        zero_is_no_label: 0 marks pixels without a label too, and the classes count from 1.
        values: the number that each class is stored as, none of which is ignored.
        skip_bad: leave out what has no partner, instead of raising an error.

    Raises:
        UserError: a folder is missing or empty, the classes are not known, or files have no partner.
    """
    class_names = names_in(root, names, num_classes, values)
    no_label = {*([] if ignored is None else [ignored]), *([0] if zero_is_no_label else [])} - {*values}
    if values:
        _check_values(values, class_names, zero_is_no_label)
        labelling = Labelling(class_names, 0, tuple(sorted(no_label)), values)
    else:
        labelling = Labelling(class_names, int(zero_is_no_label), tuple(sorted(no_label)))
    if ignored is not None and ignored in labelling.numbers and not values:
        name = class_names[labelling.numbers.index(ignored)]
        raise UserError(
            f"{ignored} cannot mark unlabelled pixels, because it is one of the {len(class_names):,} "
            f"classes, {name!r}; give another number with --data.ignored"
        )
    return paired(*folders_of(root, split), labelling, skip_bad=skip_bad)


def _check_values(values: tuple[int, ...], class_names: Sequence[str], zero_is_no_label: bool) -> None:
    if len({*values}) < len(values) or not 0 <= min(values) <= max(values) <= MAX_CLASSES:
        raise UserError(f"--data.values {listed(values)}: give distinct numbers from 0 to {MAX_CLASSES:,}")
    if len(values) != len(class_names):
        raise UserError(
            f"--data.values has {len(values):,} numbers, but there are {len(class_names):,} classes, "
            f"{', '.join(class_names[:5])}; give one number for each"
        )
    if zero_is_no_label and 0 in values:
        raise UserError("--data.values has 0, which --data.zero-is-no-label marks as unlabelled; drop one")


def paired(image_folder: Path, label_folder: Path, labelling: Labelling, *, skip_bad: bool) -> LabelledImages:
    """The images below one folder with the label pictures below another that `partners` finds for them.

    Raises:
        UserError: a folder is missing or empty, two images share a name, or, unless these are to be skipped,
            files have no partner.
    """
    beside = LeftOut()
    images = _by_stem(image_folder, walk(image_folder, beside))
    labels = _by_stem(label_folder, walk(label_folder))  # a model's labels may be learned from
    partner = partners(images.keys(), labels.keys())
    both = sorted(partner)
    if not both:
        raise UserError(
            f"no image in {image_folder} has a label picture in {label_folder}, as "
            f"{next(iter(images.values()))} and {next(iter(labels.values()))} there; give each pair "
            "the same name, and each image only one label picture"
        )
    unpaired = (
        *_alone(image_folder, (images[stem] for stem in sorted(images.keys() - partner.keys())),
                f"no label picture of this name in {label_folder}"),
        *_alone(label_folder, (labels[stem] for stem in sorted(labels.keys() - partner.values())),
                f"no image of this name in {image_folder}"),
    )  # fmt: skip
    if unpaired and not skip_bad:
        some = "; ".join(f"{bad.path}: {bad.reason}" for bad in unpaired[:3])
        more = f" and {len(unpaired) - 3:,} more" if len(unpaired) > 3 else ""
        raise UserError(
            f"{len(unpaired):,} files have no partner: {some}{more}; add what is missing, or leave such "
            "files out with --data.skip-bad"
        )
    other = [stem for stem in both if partner[stem] != stem]
    unlike = f", {images[other[0]]} with {labels[partner[other[0]]]}" if other else ""
    left_out = f"; {len(unpaired):,} files without a partner are left out" if unpaired else ""
    return LabelledImages(
        root=image_folder,
        names=Names([images[stem] for stem in both]),
        labels=None,
        class_names=None,
        description=f"{len(both):,} images with labels of {labelling.num_classes:,} classes under "
        f"{image_folder}{printable(unlike)}{left_out}{beside}",
        notes=tuple(filter(None, [beside.pictures(image_folder)])),
        label_root=label_folder,
        label_names=Names([labels[partner[stem]] for stem in both]),
        labelling=labelling,
        unpaired=unpaired,
    )


def _by_stem(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Pictures below a folder by their names without the ending."""
    if not folder.is_dir():
        raise UserError(_missing(folder))
    found: dict[str, str] = {}
    for name in sorted(names):
        stem = os.path.splitext(name)[0]
        if stem in found:
            raise UserError(f"{folder / found[stem]} and {folder / name} share a name; remove one of them")
        found[stem] = name
    if not found:
        raise UserError(
            f"{folder} holds no picture; {_contents(folder)}; labels are PNG, TIFF, BMP or GIF files"
        )
    return found


def _missing(folder: Path) -> str:
    """What to say of a folder that is not there, and where it may be."""
    root = next((above for above in folder.parents if above.is_dir()), Path())
    return (
        f"there is no folder {folder}; {_contents(root)}; images go to ROOT/images/train and their labels to "
        "ROOT/labels/train, where --data.root is ROOT"
    )


def _contents(folder: Path) -> str:
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return f"{folder} has {', '.join(names[:5])}{', …' * (len(names) > 5)}" if names else f"{folder} is empty"


def _alone(folder: Path, names: Iterable[str], reason: str) -> list[BadImageError]:
    return [BadImageError(folder / PurePosixPath(name), reason) for name in names]
