"""A run and its directory: config.json, run.json, *.jsonl, tensorboard/, pictures/, checkpoints/, replay/."""

import fcntl
import json
import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from itpn.engine import checkpoint
from itpn.engine.checkpoint import write_text
from itpn.engine.distributed import World
from itpn.errors import UserError, printable
from itpn.outputs import RUN_FILES, is_run

ENDS = ("loop.epochs", "loop.iterations")


class Run:
    """One training run. The same directory again goes on where it stopped; one process at a time may write.

    Args:
        config: the whole run as JSON-able values.
        free: dotted names of fields and groups of fields that may change while it lasts.
        force: go on whatever else has changed.
        completed: a config, perhaps an earlier version's, in this version's form.
        portable: the config that files of weights carry, without what is of this machine alone; None: all.

    Raises:
        UserError: the directory cannot be written, is in use, or began with another config.
    """

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        world: World,
        *,
        free: Collection[str] = (),
        force: bool = False,
        completed: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        portable: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory, self.world, self.force = directory, world, force
        self.is_extended = False
        """Whether the run was finished, and now has a later end."""
        self.config: dict[str, Any] = json.loads(json.dumps(config))
        self.portable = self.config if portable is None else portable
        self.console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not world.is_main)
        if world.is_main:
            before = self._prepare()
            changes = list(differences(completed(before), completed(self.config)))
            self._accept(changes, [name for name, *_ in changes if not _is_within(name, free)])

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
            self._write("run.json", {**self.notes, **values})

    def describe(self, config: Mapping[str, Any]) -> None:
        """Notes what a file of weights says beyond the run's config, so that checkpoints can say it too."""
        self.note(
            **{checkpoint.SAYS: {name: value for name, value in config.items() if name not in self.config}}
        )

    def finish(self, step: int) -> None:
        """Marks the run as finished: the last thing that happens to it."""
        self.note(finished_step=step)

    def say(self, message: str) -> None:
        """Lines for the user, from rank 0 only; names in them are harmless to a terminal."""
        self.console.print("\n".join(map(printable, message.split("\n"))))

    def warn(self, warnings: Sequence[str]) -> None:
        """Say what would go wrong without a word, a line each, and keep it for the report."""
        for warning in warnings:
            self.say(printable(f"warning: {warning}"))
        self.note(warnings=list(warnings))

    @property
    def warnings(self) -> list[str]:
        """Warnings of the start."""
        found: list[str] = self.notes.get("warnings", [])
        return found

    def begin(self) -> None:
        """Once it is sure that the run goes on with this config: writes it down."""
        if self.world.is_main:
            self._write("config.json", self.config)
            if self.is_extended:
                self.note(finished_step=None)

    def pin(self, name: str, value: str) -> None:
        """Something besides the config that must stay as the run found it at first, e.g. its images."""
        before = self.notes.get(name, value)
        by_rank = self.world.gather_json(value)  # and all have read the notes before rank 0 writes them
        if len({*by_rank}) > 1:
            odd = next(rank for rank, other in enumerate(by_rank) if other != by_rank[0])
            raise UserError(f"rank {odd} has a different {name} from rank 0: give all nodes the same")
        changed = [(name, before, value)] if before != value else []
        self._accept(changed, [name for name, *_ in changed])
        self.note(**{name: value})

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        try:
            write_text(self.directory / name, json.dumps(values, indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.directory / name} ({error.strerror}): "
                "make room there and give the same command again, or name another --run-dir"
            ) from error

    def _accept(self, changes: list[tuple[str, Any, Any]], refused: list[str]) -> None:
        """Shows what changed; an error if any of it may not, once there is training that it would spoil."""
        for name, before, after in changes:
            self.say(f"{self.directory} changes {name}: {before} -> {after}")
        if refused and self.finished_step is not None and not self.is_extended:
            is_later = any(name in ENDS and _is_later(before, after) for name, before, after in changes)
            self._extend(refused, is_later)
        elif refused and not self.force and checkpoint.steps(self.checkpoints):
            raise UserError(
                f"{self.directory} began with another {', '.join(refused)}: restore it, "
                "name another --run-dir, or give --force to resume with the change"
            )

    def _extend(self, refused: list[str], is_later: bool) -> None:
        """Lets a finished run go on with another config, if its end is a later one and that is forced."""
        again = f"a new run starts from its weights with --init {self.directory} and another --run-dir"
        if not is_later or not checkpoint.steps(self.checkpoints):
            raise UserError(
                f"{self.directory} is finished, and began with another {', '.join(refused)}: {again}"
            )
        if not self.force:
            raise UserError(
                f"{self.directory} is finished: --force extends it to the later end, with the learning rate "
                f"that a run of that length has there; or {again}"
            )
        self.is_extended = True

    def _prepare(self) -> Any:
        """Makes the directory ours; the config that it holds."""
        path = self.directory / "config.json"
        is_ours = is_run(self.directory) or any(self.checkpoints.glob("[0-9]*/state.json"))
        if not is_ours and (found := next(filter(self._holds, RUN_FILES), None)):
            raise UserError(
                f"{self.directory} is not a run directory, and its {found} would be replaced: name another "
                "with --run-dir"
            )
        try:
            self.pictures.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self._lock()
            self.note()  # shows that files can be written
            return json.loads(path.read_text()) if path.is_file() else self.config
        except OSError as error:
            raise UserError(
                f"cannot write to the run directory {self.directory} ({error.strerror}): "
                "name another with --run-dir"
            ) from error
        except json.JSONDecodeError as error:
            raise UserError(f"{self.directory} has a damaged config.json or run.json: delete it") from error

    def _holds(self, name: str) -> bool:
        path = self.directory / name
        return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)

    def _lock(self) -> None:
        """Held until this process ends, however it ends."""
        self.lock_file = (self.directory / "lock").open("a+")
        try:
            # A record lock, which forked data workers do not inherit: they may outlive a killed process.
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.lock_file.seek(0)
            raise UserError(
                f"{self.directory} is in use by {self.lock_file.read().strip() or 'another process'}: "
                "wait until it ends, or name another --run-dir"
            ) from error
        except OSError as error:
            self.say(
                f"{self.directory} cannot be locked ({error.strerror}): see that no one else trains in it"
            )
        self.lock_file.truncate(0)
        self.lock_file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.lock_file.flush()


def differences(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(field, before, after) for every leaf that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from differences(before.get(key), after.get(key), f"{name}.{key}" if name else key)
    elif before != after:
        yield name, before, after


def _is_later(before: Any, after: Any) -> bool:
    return isinstance(before, int) and isinstance(after, int) and before < after


def _is_within(name: str, groups: Collection[str]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)
