"""`itpn configs [--markdown]`: every config by folder, with its length, its size and a remark.

The sizes of the packaged configs are stored beside them, in `sizes.json`: listing builds no model.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from itpn.errors import UserError
from itpn.recipes.lookup import config_files, packaged

USAGE = """usage: itpn configs [--markdown]

Lists the packaged configs, then those under ./configs. `itpn info NAME` counts the parameters of any of them.
"""


class Row(NamedTuple):
    config: str
    epochs: str
    parameters: str
    trained: str
    gmac: str
    remark: str


UNKNOWN = {"epochs": "", "parameters": "", "trained": "", "gmac": ""}
HEADER = Row("config", "epochs", "parameters", "trained", "GMAC", "remark")


def run(arguments: list[str]) -> None:
    match arguments:
        case ["-h" | "--help", *_]:
            print(USAGE, end="")
        case []:
            print("\n".join(as_text(tables())))
        case ["--markdown"]:
            print("\n".join(as_markdown(tables())))
        case _:
            raise UserError(f"`itpn configs` takes no argument but --markdown, and was given {arguments[0]}")


def tables() -> dict[str, list[Row]]:
    """The rows of every folder of configs, by the folder's name."""
    local = Path("configs")
    roots = [packaged()] + ([local] if local.is_dir() and not local.samefile(packaged()) else [])
    found: dict[str, list[Row]] = {}
    for root in roots:
        known = sizes(root)
        for path in sorted(config_files(root).values(), key=lambda path: (path.parent, in_order(path))):
            folder = (root.name / path.parent.relative_to(root)).as_posix()
            found.setdefault(folder, []).append(row(path, known.get(path.stem)))
    return found


def sizes(root: Path) -> dict[str, dict[str, str]]:
    """Read length, parameters and multiply-adds by config, where `tools/count_configs.py` has stored them."""
    stored = root / "sizes.json"
    return json.loads(stored.read_text()) if stored.is_file() else {}


def row(path: Path, size: dict[str, str] | None) -> Row:
    return Row(path.stem, **(size or UNKNOWN), remark=remark(path))


def in_order(path: Path) -> list[tuple[int, str]]:
    """Sort by name, with 400 before 1600."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.stem)]


def remark(path: Path) -> str:
    """Read the first line of a config's docstring without running the file."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def as_text(tables: dict[str, list[Row]]) -> Iterator[str]:
    rows = [HEADER, *(row for table in tables.values() for row in table)]
    first, *others, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    for folder, table in tables.items():
        for name, *numbers, last in (HEADER._replace(config=folder), *table):
            cells = (f"{number:>{width}}" for number, width in zip(numbers, others, strict=True))
            yield "  ".join([f"{name:{first}}", *cells, last]).rstrip()
        yield ""


def as_markdown(tables: dict[str, list[Row]]) -> Iterator[str]:
    for folder, table in tables.items():
        yield f"### {folder}"
        yield ""
        yield f"| {' | '.join(HEADER)} |"
        yield "|---|---:|---:|---:|---:|---|"
        yield from (f"| `{name}` | {' | '.join(cells)} |" for name, *cells in table)
        yield ""
