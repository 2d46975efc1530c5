"""A progress bar for work that can take minutes."""

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def watched(items: Sequence[T], description: str) -> Iterable[T]:
    """The items, with a bar and the time left on stderr where that is a terminal; of several ranks on one."""
    console = Console(stderr=True)
    quiet = not console.is_terminal or os.environ.get("RANK", "0") != "0"
    return track(items, description, console=console, transient=True, disable=quiet)
