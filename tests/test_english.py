"""What the command line prints is in clauses of moderate length that stand alone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import itpn

FILES = sorted(Path(itpn.__file__).parent.rglob("*.py"))
OPTIONS = re.compile(r"Config|Options|Bench|Given|Wanted|Reading|Classify|Detect|Segment|Pretrain")
COMMANDS = "commands", "recipes", "bench"
FRAGMENT = re.compile(r"(Of|Those|That|As|Whose|Which|What)\b")
MOST_WORDS = 30


def constants(node: ast.expr) -> str:
    """The text of a message; what is filled in counts as one word."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(constants, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "X"


def help_texts(tree: ast.Module, is_command: bool) -> Iterator[tuple[int, str]]:
    """Docstrings of the fields behind configs and commands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and (OPTIONS.search(node.name) or is_command):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    yield text.lineno, constants(text.value)


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError" and node.args:
            yield node.lineno, constants(node.args[0])


def faults(text: str) -> Iterator[str]:
    if FRAGMENT.match(text):
        yield f"opens with a fragment: {text[:40]}"
    for clause in re.split(r"[.;:](?:\s|$)|\n", text):
        if len(clause.split()) > MOST_WORDS:
            yield f"over {MOST_WORDS} words: {clause.strip()[:60]}"


def test_help_and_errors_are_in_short_clauses_that_stand_alone() -> None:
    found, number = [], 0
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, text in [*help_texts(tree, path.parent.name in COMMANDS), *messages(tree)]:
            number += 1
            found += [f"{path.name}:{line}: {fault}" for fault in faults(text)]
    assert not found, "\n".join(found)
    assert number > 500


def test_faults_of_english_are_found() -> None:
    assert [*faults("Of everything random.")] and [*faults("word " * 31)]
    assert not [*faults("Random seed. " + "word " * 30)]
