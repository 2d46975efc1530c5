"""Command-line arguments by tyro, whose boxed error messages become one line."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from itpn.errors import UserError

T = TypeVar("T")


def parse(target: type[T], arguments: Sequence[str], program: str, default: T | None = None) -> T:
    """Reads arguments into a dataclass; `--help` prints and exits 0.

    Args:
        program: what the user typed before the arguments, for help and errors.
        default: an instance whose values hold where no argument says otherwise.

    Raises:
        UserError: an unknown, missing or ill-typed argument.
    """
    options: dict[str, Any] = {} if default is None else {"default": default}
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            parsed: T = tyro.cli(
                target, args=arguments, prog=program, config=(tyro.conf.AvoidSubcommands,), **options
            )
            return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
        raise own_error(stop) or UserError(f"{one_line(box.getvalue())}; see {program} --help") from None


def own_error(error: BaseException | None) -> UserError | None:
    """The UserError that a config's own checks raised and tyro wrapped, if that is what happened."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def one_line(box: str) -> str:
    """What one of tyro's boxes says: the complaint and the options it suggests."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    _, *rows = [row.strip(" │╰╯") for row in text.strip().splitlines()]  # the first is the title
    parts: list[list[str]] = [[]]
    for row in filter(None, rows):
        if row.strip("─-"):
            parts[-1].append(row)
        else:
            parts.append([])
    complaint, *hints = filter(None, parts)
    said = [" ".join(complaint).rstrip(".")]
    for heading, *body in hints:
        options = [row for row in body if row.startswith("-")]
        said += [f"{heading} {', '.join(options)}"] if options else []
    return "; ".join(said)
