"""From a config's name to its file, and from the file to the recipe it holds."""

import difflib
import runpy
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import itpn
from itpn.errors import UserError

if TYPE_CHECKING:
    from itpn.recipes.classify import Classify
    from itpn.recipes.detect import Detect
    from itpn.recipes.pretrain import Pretrain
    from itpn.recipes.segment import Segment

Recipe: TypeAlias = "Pretrain | Classify | Detect | Segment"
R = TypeVar("R")


def packaged() -> Path:
    """The folder of our own configs: inside the installed package, or beside it in a checkout."""
    package = Path(itpn.__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def config_files(folder: Path) -> dict[str, Path]:
    """Every config under a folder by its name, the file's stem."""
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.py")):
        if path.stem in files:
            raise UserError(f"two configs are called {path.stem}: {files[path.stem]} and {path}; rename one")
        files[path.stem] = path
    return files


def find(name: str) -> Path:
    """A name is looked for as a path, then in ./configs, then among the packaged configs.

    A published path (configs/itpn/NAME.py) is found from any directory.
    """
    for path in (Path(name), packaged().parent / name):
        if path.is_file():
            return path
    files = config_files(packaged()) | config_files(Path("configs"))
    if name.removesuffix(".py") in files:
        return files[name.removesuffix(".py")]
    near = difflib.get_close_matches(Path(name).stem, files, n=3, cutoff=0.5)
    hint = f"the nearest are {', '.join(near)}" if near else "`itpn configs` lists them"
    raise UserError(f"there is no config file or name {name!r}; {hint}")


def load(path: Path) -> Recipe:
    """The recipe that a config file calls `config`; it takes its name from the file."""
    from itpn.recipes.classify import Classify
    from itpn.recipes.detect import Detect
    from itpn.recipes.pretrain import Pretrain
    from itpn.recipes.segment import Segment

    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
        ]
        where = f"{path}, line {lines[-1]}" if lines else f"{path}"
        raise UserError(f"{where}: {' '.join(str(error).split()) or type(error).__name__}") from error
    if not isinstance(config, Pretrain | Classify | Detect | Segment):
        raise UserError(f"{path}: it must set `config` to a recipe of itpn.recipes, and {_what(config)}")
    return replace(config, name=path.stem)


def load_as(kind: type[R], path: Path) -> R:
    """The recipe of a config file that must be of the given kind."""
    recipe = load(path)
    if not isinstance(recipe, kind):
        raise UserError(
            f"{path.stem} is a {type(recipe).__name__} config, but a {kind.__name__} config is needed"
        )
    return recipe


def _what(config: object) -> str:
    return "sets none" if config is None else f"sets a {type(config).__name__}"
