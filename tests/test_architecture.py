"""Imports point one way, so that a room can be read, tested and changed without those that use it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "errors": set(),
    "outputs": {"errors"},
    "nn": {"errors"},
    "objectives": {"errors", "nn"},
    "heads": {"errors", "nn"},
    "data": {"errors", "outputs"},
    "engine": {"errors", "outputs"},
    "evaluate": {"errors", "outputs", "data"},
    "show": {"errors", "data"},
    "weights": {"errors", "outputs", "nn", "objectives", "heads", "engine"},
    "hub": {"errors", "nn", "objectives", "weights"},
    "models": {"errors", "nn", "objectives", "heads", "weights", "hub"},
    "timm": {"errors", "nn", "heads", "data", "weights", "models"},
    "recipes": {"errors", "nn", "objectives", "heads", "data", "engine", "evaluate"},
    "bench": {
        *("errors", "outputs", "nn", "objectives", "heads", "data", "engine", "show", "recipes", "commands")
    },
}
"""Every room but tasks, cli and commands, which may import all; each may also import itself."""


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=0):
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in names)
            case ast.ImportFrom():
                yield node.lineno, "a relative import"


def room_of(name: str) -> str:
    """`itpn.nn.hivit.HiViT` is of the room `nn`; the package itself is a room of no importance."""
    return name.split(".")[1]


def rooms() -> list[str]:
    return sorted({path.stem for path in (ROOT / "itpn").iterdir() if path.suffix == ".py" or path.is_dir()})


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_rooms_below_it(room):
    allowed = MAY_IMPORT[room] | {room, "__version__"}
    files = [ROOT / "itpn" / f"{room}.py", *(ROOT / "itpn" / room).rglob("*.py")]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        if path.is_file()
        for line, name in imports_of(path)
        if name.startswith("itpn.") and room_of(name) not in allowed
    ]
    assert not wrong


def test_every_room_has_its_rule():
    assert set(rooms()) <= {
        *MAY_IMPORT,
        "tasks",
        "cli",
        "commands",
        "configs",
        "__init__",
        "__main__",
        "__pycache__",
    }


def test_only_the_commands_import_the_wiring():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in (ROOT / "itpn").rglob("*.py")
        if path.parent.name not in ("commands", "tasks")
        for line, name in imports_of(path)
        if name.startswith(("itpn.tasks", "itpn.commands"))
        and not (path.parent.name == "bench" and name.startswith("itpn.commands.arguments"))
    ]
    assert not wrong


def test_no_relative_imports():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in (ROOT / "itpn").rglob("*.py")
        for line, name in imports_of(path)
        if name == "a relative import"
    ]
    assert not wrong


def test_the_command_line_starts_without_heavy_libraries():
    names = {name.split(".")[0] for _, name in imports_of(ROOT / "itpn" / "cli.py")}
    assert names <= {"difflib", "importlib", "os", "sys", "collections", "itpn"}


def test_pickles_are_opened_in_one_place_and_never_trusted():
    calls = [
        (
            path.relative_to(ROOT / "itpn").as_posix(),
            {keyword.arg: keyword.value for keyword in node.keywords},
        )
        for path in (ROOT / "itpn").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert {path for path, _ in calls} == {"weights/convert.py"}
    assert all(ast.unparse(given["weights_only"]) == "True" for _, given in calls)
    modules = {name.split(".")[0] for path in (ROOT / "itpn").rglob("*.py") for _, name in imports_of(path)}
    assert not modules & {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
