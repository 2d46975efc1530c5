"""A disk that fills up while training: the checkpoints before stay, training goes on, nothing is lost."""

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.engine.processes import outcome, train

EVERY_STEP = ("--checkpoint-minutes", 0)
UNSHARE = ["unshare", "--map-root-user", "--mount"]
ON_A_SMALL_DISK = (
    'mount -t tmpfs -o size=24m none "$0" && { "$@"; status=$?; cp -r "$0/run" "$0.kept"; exit $status; }'
)


def may_mount() -> bool:
    test = [*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(test, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="this user may not mount a small disk")
def test_a_full_disk(images: Path, tmp_path: Path, whole: Path) -> None:
    """It fills up at step 12, has room again from 22 to 30, and the run is ended while it is full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    traps = [
        (0, "step", 12, "fill_disk", str(disk / "filler")),
        (0, "step", 22, "list_files", str(disk / "run/checkpoints")),
        (0, "step", 22, "free_disk", str(disk / "filler")),
        (0, "step", 30, "fill_disk", str(disk / "filler")),
        (0, "step", 33, "interrupt", int(signal.SIGTERM)),
    ]
    before = [*UNSHARE, "sh", "-c", ON_A_SMALL_DISK, str(disk)]
    ended = train(images, disk / "run", traps, *EVERY_STEP, before=before, beside=tmp_path / "process")
    assert ended.status == 143, ended.output
    assert "Traceback" not in ended.output
    assert (tmp_path / "process/files").read_text() == "00000010 00000011 00000012 last"
    assert re.search(
        r"checkpoint of step 13 \(.*No space left.*\); the newest is step 12's. Training", ended.output
    )
    assert "metrics.jsonl (No space left on device): keeping its lines, training goes on" in ended.output
    assert "stopped at step 33 of 60; the same command resumes from step 30" in ended.output
    run = tmp_path / "disk.kept"
    assert train(images, run).status == 0
    assert outcome(run) == outcome(whole)


def test_files_that_cannot_grow(images: Path, tmp_path: Path, whole: Path) -> None:
    """As on a disk that is full from step 12 to 22, and again at the end; needs no privileges."""
    run = tmp_path / "run"
    traps = [(0, "step", step, "limit_files", size) for step, size in ((12, 8000), (22, -1), (56, 30_000))]
    # Without workers: the limit would fall on the memory that they share, too.
    ended = train(images, run, traps, *EVERY_STEP, "--data.workers", 0)
    assert ended.status == 2 and "Traceback" not in ended.output, ended.output
    assert re.search(r"checkpoint of step 13 \(.*File too large.*\); the newest is step 12's", ended.output)
    assert re.fullmatch(
        r"itpn: cannot write .*/run \(.*File too large.*\); make room and give the same command again",
        ended.output.splitlines()[-1],
    )
    again = train(images, run)
    assert again.status == 0 and "step 56 of 60" in again.output, again.output
    assert outcome(run) == outcome(whole)


def test_a_disk_that_is_full_at_the_start(images: Path, tmp_path: Path) -> None:
    ended = train(images, tmp_path / "run", [(0, "start", 4, "limit_files", 600)])
    assert ended.status == 2, ended.output
    complaint = ended.output.splitlines()[-1]
    assert re.fullmatch(r"itpn: cannot write .*/run/\w+\.json \(File too large\): make room .*", complaint)
    assert "Traceback" not in ended.output
