"""A progress bar for work that can take minutes."""

import os
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def watched(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """The items, with a bar and the time left on stderr where that is a terminal; of several ranks on one.

    Args:
        total: How many there are, where `len` does not tell.
    """
    console = Console(stderr=True)
    quiet = not console.is_terminal or os.environ.get("RANK", "0") != "0"
    return track(items, description, total, console=console, transient=True, disable=quiet)
