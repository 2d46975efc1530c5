"""Released checkpoints as commands take them: the options that say how to read one, and what was found."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import tyro

from itpn.errors import UserError, printable
from itpn.weights.convert import Foreign, read_foreign
from itpn.weights.families import FAMILIES, Given
from itpn.weights.translate import Translated, translate
from itpn.weights.wrappings import Wanted


@dataclass(frozen=True, kw_only=True)
class Reading(Given, Wanted):
    """Options for reading a checkpoint of another library."""

    family: str | None = None
    """Family of the source, if its keys do not show it."""
    leave_out: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Pattern of keys to leave out, such as 'extra.*'. Repeat the option for several patterns."""


def read_released(path: Path, reading: Reading) -> tuple[Foreign, Translated]:
    """A checkpoint of another library, and what it becomes here.

    Raises:
        UserError: it cannot be read, or is of no known family.
    """
    foreign = read_foreign(path, reading, list(chain(*reading.leave_out)))
    try:
        return foreign, translate(
            foreign.tensors, family=reading.family, wrapping=foreign.wrapping, given=reading
        )
    except UserError as error:
        raise UserError(f"{printable(path)}: {error}") from error


def findings(foreign: Foreign, translated: Translated) -> Iterator[str]:
    """Summary of a foreign file: its kind, what was taken off or left out and why, and what looks wrong."""
    yield f"{printable(foreign.path)}: {FAMILIES[translated.family].title} ({translated.family})"
    yield f"sha256 {foreign.sha256}"
    if foreign.wrapping:
        yield f"unwrapped: {', '.join(map(printable, foreign.wrapping))}"
    for name, reason in (foreign.left_out | translated.left_out).items():
        yield f"left out: {printable(name)}: {printable(reason)}"
    if foreign.placeholders:
        yield f"objects of {', '.join(foreign.placeholders)}: not needed, and not imported"
    channels = translated.config["model"]["backbone"]["in_channels"]
    if channels > 3:
        yield (
            f"its images have {channels} channels; for RGB images alone give --stem sum, where each three "
            "channels saw one, or --stem first"
        )
    for name, count in foreign.nonfinite.items():
        yield f"warning: {printable(name)} has {count:,} values that are NaN or infinite"
