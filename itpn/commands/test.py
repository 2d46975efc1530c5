"""`itpn test CONFIG [CHECKPOINT] [--protocol …]`: how good weights are, on a config's validation images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL.Image import Image
from rich.console import Console
from rich.table import Table

from itpn import hub
from itpn.commands.arguments import parse
from itpn.data.check_labels import warnings_of
from itpn.data.classes import readable
from itpn.data.coco import Coco
from itpn.data.picture import BadImageError
from itpn.data.source import Images
from itpn.engine.distributed import World, join_world
from itpn.errors import UserError, printable
from itpn.evaluate.classify import Report
from itpn.evaluate.detect import Result, Scores, write_results
from itpn.evaluate.detect import table as detection_table
from itpn.evaluate.segment import SegmentationScores, table
from itpn.recipes.classify import Classify
from itpn.recipes.detect import Detect
from itpn.recipes.lookup import find, load
from itpn.recipes.pretrain import Pretrain
from itpn.recipes.segment import Segment
from itpn.tasks import objects
from itpn.tasks.classify import write_report
from itpn.tasks.segment import write_report as write_segmentation_report
from itpn.tasks.test import (
    Protocol,
    lines_of,
    test_classifier,
    test_detector,
    test_features,
    test_segmenter,
    write_numbers,
)

NUM_SHOWN = 20
USAGE = """usage: itpn test CONFIG [CHECKPOINT] [--protocol finetuned | linear | knn] [--field value …]
       itpn test CONFIG [CHECKPOINT] [--inference.mode slide | whole] [--field value …], of a segmenter

CHECKPOINT is a file of weights or a run directory; without it, the config's own run directory.
`itpn test CONFIG --help` lists the fields."""


@dataclass(frozen=True, kw_only=True)
class Options:
    out: Path = Path("evaluation")
    """Folder for report.json and, of whatever is fine-tuned, pictures/."""


@dataclass(frozen=True, kw_only=True)
class TestClassify(Options):
    """Evaluate weights on the validation images of a config."""

    protocol: Protocol = "finetuned"
    """finetuned: the classifier that the file holds. linear: a linear classifier fitted to frozen features of
    the training images. knn: their nearest neighbours."""
    save_predictions: Path | None = None
    """File for every image's path, label, guesses and scores, a JSON object a line."""
    recipe: Annotated[Classify, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class TestPretrain(Options):
    """Evaluate frozen features on the validation images of a config: --protocol linear or knn."""

    protocol: Protocol = "finetuned"
    """linear: a linear classifier fitted to frozen features of the training images. knn: their nearest
    neighbours."""
    recipe: Annotated[Pretrain, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class TestDetect(Options):
    """Evaluate a detector on the validation images of a config: COCO's numbers of boxes and masks."""

    save_predictions: Path | None = None
    """File for all detections, as COCO's results."""
    recipe: Annotated[Detect, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class TestSegment(Options):
    """Evaluate a segmenter on the validation images of a config, looked at as --inference says."""

    recipe: Annotated[Segment, tyro.conf.arg(name="")]


def run(arguments: list[str]) -> None:
    match arguments:
        case [] | ["-h" | "--help", *_]:
            print(USAGE)
            raise SystemExit(0 if arguments else 2)
        case [name, checkpoint, *overrides] if not checkpoint.startswith("-"):
            given: Path | None = Path(checkpoint)
        case [name, *overrides]:
            given = None
    options = options_of(name, overrides)
    loop = options.recipe.loop
    weights = hub.read(given or loop.run_dir or Path("runs") / options.recipe.name)
    with join_world(loop.device) as world:
        console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not world.is_main)

        def on_bad(error: BadImageError) -> None:
            console.print(f"unreadable: {printable(error.path)}: {printable(error.reason)}")

        def warned(images: Images) -> list[str]:
            warnings = warnings_of(images) if world.is_main else []
            for warning in warnings:
                console.print(f"warning: {printable(warning)}")
            return warnings

        match options:
            case TestDetect(save_predictions=path):
                precision, results, coco = test_detector(options.recipe, weights, world, on_bad)
                console.print(detection_table(precision))
                odd = warned(coco)
                _write(
                    world, console, lambda: _write_detection(precision, results, coco, options.out, path, odd)
                )
            case TestSegment():
                scores, picture, images = test_segmenter(options.recipe, weights, world, on_bad)
                console.print(table(scores))
                odd = warned(images)
                _write(world, console, lambda: _write_segmentation(scores, picture, options.out, odd))
            case TestClassify(protocol="finetuned"):
                found, predictions, val = test_classifier(options.recipe, weights, world, on_bad)
                names = val.class_names or ()
                console.print(table_of(found, readable(names)))
                odd = warned(val)
                _write(world, console, lambda: write_report(found, names, options.out, odd))
                if path := options.save_predictions:
                    text = "".join(f"{line}\n" for line in lines_of(predictions, val))
                    _write(world, console, lambda: [path] if path.write_text(text) else [])
            case (
                TestClassify(protocol="linear" | "knn" as protocol)
                | TestPretrain(protocol="linear" | "knn" as protocol)
            ):
                numbers = test_features(options.recipe, weights, protocol, world, on_bad)
                console.print("  ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
                _write(world, console, lambda: [write_numbers(numbers, options.out)])
            case _:
                raise UserError(
                    f"{name} pre-trains, so that there is no classifier to test: --protocol linear or knn"
                )


def options_of(name: str, overrides: list[str]) -> TestClassify | TestDetect | TestPretrain | TestSegment:
    """A config and what the arguments change in it."""
    program = f"itpn test {name}"
    match config := load(find(name)):
        case Classify():
            return parse(TestClassify, overrides, program, TestClassify(recipe=config))
        case Detect():
            return parse(TestDetect, overrides, program, TestDetect(recipe=config))
        case Pretrain():
            return parse(TestPretrain, overrides, program, TestPretrain(recipe=config))
        case Segment():
            return parse(TestSegment, overrides, program, TestSegment(recipe=config))


def _write_detection(
    scores: list[Scores],
    results: list[Result],
    coco: Coco,
    out: Path,
    predictions: Path | None,
    warnings: Sequence[str],
) -> list[Path]:
    written = [objects.write_report(coco, scores, out, warnings)]
    if (picture := objects.compared(objects.pictured(coco), results)) is not None:
        written.append(out / "pictures" / "detections.png")
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        picture.save(written[-1])
    if predictions is not None:
        write_results(predictions, results)
        written.append(predictions)
    return written


def _write_segmentation(
    scores: SegmentationScores, picture: Image | None, out: Path, warnings: Sequence[str]
) -> list[Path]:
    written = [write_segmentation_report(scores, out, warnings)]
    if picture is not None:
        path = out / "pictures" / "segmentation.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        written.append(path)
    return written


def _write(world: World, console: Console, write: Callable[[], list[Path]]) -> None:
    """Rank 0 writes, and says what."""
    if not world.is_main:
        return
    try:
        console.print(f"written: {', '.join(map(str, write()))}")
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename} ({error.strerror}): name another with --out"
        ) from error


def table_of(found: Report, names: tuple[str, ...]) -> Table:
    """The numbers over all images, then the classes, the worst first."""
    accuracy = (
        f"top-1 {found.top1:.2%}, top-5 {found.top5:.2%}, mean over classes {found.class_top1:.2%}"
        if found.tells
        else "all of one class, so that accuracy tells nothing"
    )
    title = f"{found.images:,} images: {accuracy}, loss {found.loss:.4f}, calibration error {found.ece:.4f}"
    rows = Table("class", title=title, title_justify="left")
    for column in ("images", "right"):
        rows.add_column(column, justify="right")
    rows.add_column("most often taken for")
    seen = [i for i, row in enumerate(found.classes) if row.images]
    worst = sorted(seen, key=lambda i: (found.classes[i].top1, -found.classes[i].images))
    for i in worst[:NUM_SHOWN]:
        row = found.classes[i]
        confusion = f"{printable(row.confusion)} ({row.confused})" if row.confusion else ""
        rows.add_row(printable(names[i]), str(row.images), f"{row.top1:.1%}", confusion)
    if len(seen) > NUM_SHOWN:
        rows.caption = f"the {NUM_SHOWN} worst of {len(seen):,} classes; report.json has all"
    return rows
