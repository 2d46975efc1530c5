"""A run and its directory: config.json, run.json, metrics.jsonl, tensorboard/, pictures/, checkpoints/."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from itpn.engine.checkpoint import write_text
from itpn.engine.distributed import World
from itpn.errors import UserError


class Run:
    """One training run. The same directory again goes on where it stopped.

    `config` is the whole run as JSON-able values; how it differs from the one in the directory is said.

    Raises:
        UserError: the directory cannot be written.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], world: World) -> None:
        self.directory, self.world = directory, world
        self.config: dict[str, Any] = json.loads(json.dumps(config))
        self.console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not world.is_main)
        if world.is_main:
            self._prepare()

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def pictures(self) -> Path:
        return self.directory / "pictures"

    @property
    def finished_step(self) -> int | None:
        """The last step of a run that reached its end."""
        step = self.notes.get("finished_step")
        return None if step is None else int(step)

    @property
    def notes(self) -> dict[str, Any]:
        """What the run itself fixed, kept in run.json: `device_batch` by device, `finished_step`."""
        path = self.directory / "run.json"
        notes: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return notes

    def note(self, **values: Any) -> None:
        if self.world.is_main:
            write_text(self.directory / "run.json", json.dumps({**self.notes, **values}, indent=1) + "\n")

    def finish(self, step: int) -> None:
        """Marks the run as finished: the last thing that happens to it."""
        self.note(finished_step=step)

    def say(self, message: str) -> None:
        """One line for the user, from rank 0 only."""
        self.console.print(message)

    def begin(self) -> None:
        """Once it is sure that the run goes on with this config: writes it down."""
        if self.world.is_main:
            write_text(self.directory / "config.json", json.dumps(self.config, indent=1) + "\n")

    def _prepare(self) -> None:
        path = self.directory / "config.json"
        try:
            self.pictures.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self.note()  # shows that files can be written
            before = json.loads(path.read_text()) if path.is_file() else self.config
        except OSError as error:
            raise UserError(
                f"cannot write to the run directory {self.directory} ({error.strerror}): "
                "name another with --run-dir"
            ) from error
        except ValueError as error:
            raise UserError(f"{self.directory} has a damaged config.json or run.json: delete it") from error
        for line in differences(before, self.config):
            self.say(f"the config of {self.directory} changes: {line}")


def differences(before: Any, after: Any, name: str = "") -> Iterator[str]:
    """`field: old -> new` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from differences(before.get(key), after.get(key), f"{name}.{key}" if name else key)
    elif before != after:
        yield f"{name}: {before} -> {after}"
