"""The names of the classes in label pictures: from a file, or made of numbers."""

from collections.abc import Sequence
from pathlib import Path

from itpn.data.pairing import root_of
from itpn.errors import UserError

NAMES = "classes.txt"
MAX_NAMES = 1 << 20
"""The longest file of class names, in bytes."""


def names_in(
    root: Path, names: Path | None, num_classes: int | None, values: tuple[int, ...]
) -> tuple[str, ...]:
    """The names of a data set's classes, by class id.

    Args:
        names: a file with a class name a line; None: that of `names_file`.
        num_classes, values: how many there are, and what they are stored as, where no file names them.

    Raises:
        UserError: the file cannot be read, or says something else; nothing tells how many there are.
    """
    path = names or names_file(root)
    if names is None and not path.is_file():
        if values and num_classes in (None, len(values)):
            return tuple(f"class {value}" for value in values)
        if num_classes is None:
            raise UserError(
                f"the number of classes is not known: write their names to {path}, one a line, or give "
                "--data.num-classes; itpn check-data lists the numbers that occur"
            )
        return numbered(num_classes)
    found = tuple(line.strip() for line in read_table(path))
    if "" in found or len(set(found)) < len(found):
        raise UserError(f"{path} has a line without a name, or a name twice; give one class per line")
    if num_classes not in (None, len(found)):
        raise UserError(f"{path} names {len(found):,} classes, but --data.num-classes says {num_classes:,}")
    return found


def names_file(root: Path) -> Path:
    """The file of class names of a data set; where it should be, if there is none."""
    return root / NAMES if (root / NAMES).is_file() else root_of(root) / NAMES


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
