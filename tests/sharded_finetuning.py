"""Started by torchrun in test_finetuning.py: fine-tunes for every task on two ranks under FSDP."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from itpn.engine.distributed import join_world
from itpn.recipes.lookup import Recipe
from itpn.tasks.classify import classify
from itpn.tasks.detect import detect
from itpn.tasks.segment import segment
from tests import detecting, test_classify_run, test_segment_run
from tests.toys import STEADY

TASKS = {"classify": classify, "detect": detect, "segment": segment}


def recipes(directory: Path, runs: str, **loop: object) -> dict[str, Recipe]:
    """A recipe for each task whose losses do not depend on ranks, on the data in `directory`."""
    modules = {"classify": test_classify_run, "detect": detecting, "segment": test_segment_run}
    given = {
        name: module.recipe(
            directory / name, directory / runs / name, loop, init=directory / "pretrained.safetensors"
        )
        for name, module in modules.items()
    }
    detector, segmenter = given["detect"].detector, given["segment"].segmenter
    head = replace(detector.regions.head, norm="group")
    given["detect"] = replace(
        given["detect"],
        detector=replace(detector, regions=replace(detector.regions, head=head)),
        optim=replace(given["detect"].optim, eps=STEADY),
    )
    given["segment"] = replace(given["segment"], segmenter=replace(segmenter, dropout=0.0))
    return given


def main(directory: Path) -> None:
    with join_world("cpu") as world:
        for stop in (3, None):  # stopped between evaluations, then resumed
            for name, recipe in recipes(directory, "two", strategy="fsdp", max_steps=stop).items():
                with patch(f"itpn.tasks.{name}.join_world", lambda device: nullcontext(world)):
                    TASKS[name](recipe)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
