"""`itpn configs`: every config by folder, with the first line of its docstring."""

import ast
import re
from pathlib import Path

from itpn.errors import UserError
from itpn.recipes.lookup import config_files, packaged


def run(arguments: list[str]) -> None:
    if arguments and arguments[0] not in ("-h", "--help"):
        raise UserError(f"`itpn configs` takes no argument, and was given {arguments[0]}")
    local = Path("configs")
    roots = [packaged()] + ([local] if local.is_dir() and not local.samefile(packaged()) else [])
    for root in roots:
        files = sorted(config_files(root).values(), key=in_order)
        width = max((len(path.stem) for path in files), default=0)
        for folder in sorted({path.parent for path in files}):
            print(root.name / folder.relative_to(root))
            for path in files:
                if path.parent == folder:
                    print(f"  {path.stem:{width}}  {promise(path)}")


def in_order(path: Path) -> list[tuple[int, str]]:
    """By name, with 400 before 1600."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.stem)]


def promise(path: Path) -> str:
    """The first line of a config's docstring, read without running the file."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
