"""ADE20K as its scene parsing benchmark ships it: ADEChallengeData2016, 150 classes."""

from pathlib import Path

from itpn.data.class_names import numbered, read_table
from itpn.data.folders import Split
from itpn.data.labelled import IGNORED, LabelledImages, paired
from itpn.data.labels import Labelling
from itpn.errors import UserError

FOLDER = "ADEChallengeData2016"
TABLE = "objectInfo150.txt"
SPLITS: dict[Split, str] = {"train": "training", "val": "validation"}
NUM_CLASSES = 150


def find_ade20k(root: Path, split: Split = "train", *, skip_bad: bool = False) -> LabelledImages:
    """`images/training` and `annotations/training` (or `validation`) below ROOT or ROOT/ADEChallengeData2016.

    Stored are 0 for what is none of the classes, which is no label here (reduce_zero_label), and k + 1 for
    class k. The names are those of objectInfo150.txt, of several the first; without it there are 150 numbers.

    Args:
        skip_bad: leave out files that have no partner, instead of raising an error.

    Raises:
        UserError: a folder is missing or empty, the table is damaged, or files have no partner.
    """
    folder = folder_of(root)
    table = folder / TABLE
    names = _names(table) if table.is_file() else numbered(NUM_CLASSES)
    labelling = Labelling(names, first=1, ignored=(0, IGNORED))
    images, labels = (folder / kind / SPLITS[split] for kind in ("images", "annotations"))
    return paired(images, labels, labelling, skip_bad=skip_bad)


def folder_of(root: Path) -> Path:
    return root / FOLDER if (root / FOLDER).is_dir() else root


def _names(table: Path) -> tuple[str, ...]:
    """By class: tab-separated rows of its number, from 1 on, then others, last its names."""
    rows = [[field.strip() for field in line.split("\t")] for line in read_table(table)[1:]]
    numbers = [row[0] for row in rows]
    if not rows or numbers != [str(i) for i in range(1, len(rows) + 1)] or len(rows) >= IGNORED:
        raise UserError(f"{table} is not a table of the classes 1, 2, … in order; restore or remove the file")
    names = [next((field for field in reversed(row[1:]) if field), row[0]) for row in rows]
    return tuple(name.split(",")[0].strip() or name for name in names)
