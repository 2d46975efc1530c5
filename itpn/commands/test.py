"""`itpn test CONFIG [CHECKPOINT] [--protocol …]`: how good weights are, on a config's validation images."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, ClassVar

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
from itpn.outputs import claim, writing
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
    """Folder for report.json and, after fine-tuning, pictures/. Older files that itpn wrote there are
    replaced."""
    FILES: ClassVar[tuple[str, ...]] = ("report.json",)
    """Names of the files written to `out`."""


@dataclass(frozen=True, kw_only=True)
class TestClassify(Options):
    """Evaluate weights on the validation images of a config."""

    FILES = ("report.json", "pictures/confusion.png")
    protocol: Protocol = "finetuned"
    """finetuned: the fine-tuned classifier in the file. linear: a linear probe on frozen features of the
    training images. knn: k-nearest neighbours among them."""
    save_predictions: Path | None = None
    """JSON-lines file for each image's path, label, predicted labels and scores."""
    recipe: Annotated[Classify, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class TestPretrain(Options):
    """Evaluate frozen features on the validation images of a config: --protocol linear or knn."""

    protocol: Protocol = "finetuned"
    """linear: a linear probe on frozen features of the training images. knn: k-nearest neighbours among
    them."""
    recipe: Annotated[Pretrain, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class TestDetect(Options):
    """Evaluate a detector on the validation images of a config, with COCO's metrics for boxes and masks."""

    FILES = ("report.json", "pictures/detections.png")
    save_predictions: Path | None = None
    """File for all detections, in COCO's results format."""
    recipe: Annotated[Detect, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class TestSegment(Options):
    """Evaluate a segmenter on the validation images of a config, with the --inference settings."""

    FILES = ("report.json", "pictures/segmentation.png")
    recipe: Annotated[Segment, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Writer:
    """Writes on rank 0, and says what."""

    out: Path
    save_predictions: Path | None
    world: World
    console: Console

    def report(self, write: Callable[[Path], list[Path]]) -> None:
        """Files that `write` puts in a folder go to --out."""
        if self.world.is_main:
            with TemporaryDirectory() as folder:
                for path in write(Path(folder)):
                    target = self.out / path.relative_to(folder)
                    self._file("--out", target, partial(shutil.copyfile, path))

    def predictions(self, write: Callable[[Path], object]) -> None:
        """A file for what was found in each image, if one was asked for."""
        if self.world.is_main and self.save_predictions:
            self._file("--save-predictions", self.save_predictions, write)

    def _file(self, option: str, path: Path, write: Callable[[Path], object]) -> None:
        with writing(path, option) as file:
            write(file)
        self.console.print(f"written: {printable(path)}")


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
    named = options.save_predictions if isinstance(options, TestClassify | TestDetect) else None
    claim(*(("--out", options.out / file) for file in options.FILES), ("--save-predictions", named))
    with join_world(loop.device) as world:
        console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not world.is_main)

        write = Writer(options.out, named, world, console)

        def on_bad(error: BadImageError) -> None:
            console.print(f"unreadable: {printable(error.path)}: {printable(error.reason)}")

        def warned(images: Images) -> list[str]:
            warnings = warnings_of(images) if world.is_main else []
            for warning in warnings:
                console.print(f"warning: {printable(warning)}")
            return warnings

        match options:
            case TestDetect():
                precision, results, coco = test_detector(options.recipe, weights, world, on_bad)
                console.print(detection_table(precision))
                odd = warned(coco)
                write.report(lambda folder: _write_detection(precision, results, coco, folder, odd))
                write.predictions(lambda file: write_results(file, results))
            case TestSegment():
                scores, picture, images = test_segmenter(options.recipe, weights, world, on_bad)
                console.print(table(scores))
                odd = warned(images)
                write.report(lambda folder: _write_segmentation(scores, picture, folder, odd))
            case TestClassify(protocol="finetuned"):
                found, predictions, val = test_classifier(options.recipe, weights, world, on_bad)
                names = val.class_names or ()
                console.print(table_of(found, readable(names)))
                odd = warned(val)
                write.report(lambda folder: write_report(found, names, folder, odd))
                lines = "".join(f"{line}\n" for line in lines_of(predictions, val))
                write.predictions(lambda file: file.write_text(lines))
            case (
                TestClassify(protocol="linear" | "knn" as protocol)
                | TestPretrain(protocol="linear" | "knn" as protocol)
            ):
                numbers = test_features(options.recipe, weights, protocol, world, on_bad)
                console.print("  ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
                write.report(lambda folder: [write_numbers(numbers, folder)])
            case _:
                raise UserError(
                    f"{name} is a pre-training config without a classifier: give --protocol linear or knn"
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
    scores: list[Scores], results: list[Result], coco: Coco, out: Path, warnings: Sequence[str]
) -> list[Path]:
    written = [objects.write_report(coco, scores, out, warnings)]
    if (picture := objects.compared(objects.pictured(coco), results)) is not None:
        written.append(out / "pictures" / "detections.png")
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        picture.save(written[-1])
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
