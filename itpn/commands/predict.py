"""`itpn predict MODEL IMAGES_OR_FOLDERS…`: what a model says of images: labels with scores, or embeddings."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EISDIR
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from itpn import models
from itpn.commands.arguments import parse
from itpn.data.classes import names_for
from itpn.data.images import ImageList, find_images
from itpn.data.loader import Batch, eval_loader
from itpn.data.picture import BadImageError
from itpn.data.progress import watched
from itpn.data.source import Images, Names
from itpn.data.transforms import crop_ratio_of
from itpn.engine.distributed import DeviceName, choose_device
from itpn.errors import UserError, printable
from itpn.models import ClassifierModel, FeatureModel
from itpn.nn.normalise import Normalise
from itpn.show.classify import prediction_picture

NUM_SHOWN, NUM_NAMED = 100, 20
"""Images in the table on the terminal, and unreadable ones that are named."""
PER_SHEET = 24


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Say what images show, with scores; or what they are like, as embeddings."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run directory, a .safetensors file of ours, a folder of save_pretrained, or a Hub id."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, and folders of images; of a folder with train and val, val."""
    top: int = 5
    """Labels per image, the best first."""
    out: Path | None = None
    """Folder for pictures of the images with their labels, 24 on a sheet: predictions-001.png and so on."""
    json: Path | None = None
    """File for a JSON object per image, one a line: path, labels, scores."""
    embeddings: Path | None = None
    """File ending in .npy for the pooled features, [images, channels] in fp32; a .txt beside it has the
    paths, one a line."""
    batch_size: int = 16
    """Images at a time."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels; what the model was trained for if not given."""
    device: DeviceName = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        if self.top < 1 or self.batch_size < 1 or min(self.image_size or (1,)) < 1:
            raise UserError("--top, --batch-size and --image-size must be 1 or more")
        if self.embeddings and self.embeddings.suffix != ".npy":
            raise UserError(f"--embeddings {self.embeddings}: name a file that ends in .npy")


class Seen(NamedTuple):
    """A batch of images that could be read."""

    paths: list[Path]
    pixels: Tensor
    """uint8 [B, 3, H, W]."""
    tokens: Tensor
    """Stage 3's: [B, N, C], on the device."""


class Answer(NamedTuple):
    """What a classifier says of an image."""

    path: Path
    labels: list[str]
    scores: list[float]
    features: Tensor
    """What its linear layer sees: [C]."""


def run(arguments: list[str]) -> None:
    options = parse(Predict, arguments, "itpn predict")
    if not options.images:
        raise UserError("itpn predict: name one or more images, or folders of images, after the model")
    for path in filter(None, (options.json, options.embeddings, options.out and options.out / "a.png")):
        with _writing(path):  # before the work rather than after it
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(EISDIR, "it is a folder")
    match models.load(options.model):
        case ClassifierModel() as model:
            label(model, options)
        case FeatureModel() as model:
            embed(model, options)


def label(model: ClassifierModel, options: Predict) -> None:
    """Answers on the terminal, and wherever else they are asked for."""
    found = answered(model, options)
    answers: list[Answer] = []
    while sheet := list(islice(found, PER_SHEET)):
        if options.out:
            _draw(sheet, options.out / f"predictions-{len(answers) // PER_SHEET + 1:03}.png")
        answers += [answer for answer, _ in sheet]
    Console(highlight=False, markup=False, soft_wrap=True).print(table_of(answers))
    if len(answers) > NUM_SHOWN:
        print(f"the first {NUM_SHOWN} of {len(answers):,} images; --json FILE writes all")
    if options.json:
        with _writing(options.json):
            options.json.write_text("".join(map(_json_line, answers)))
    if options.embeddings:
        _save(
            options.embeddings, [answer.path for answer in answers], [answer.features for answer in answers]
        )


@torch.no_grad()
def answered(model: ClassifierModel, options: Predict) -> Iterator[tuple[Answer, Tensor]]:
    """Answers one by one, with the pixels that they are about: uint8 [3, H, W]."""
    names = names_for(model.classes, model.config.num_classes)
    for paths, pixels, tokens in look(model, options):
        features = model.pool(tokens)
        scores, classes = model.head(features).softmax(1).topk(min(options.top, len(names)))
        if not scores.isfinite().all():
            raise UserError(
                f"{options.model}: its scores are not finite, for {paths[0]} or an image after it"
            )
        for i, path in enumerate(paths):
            best = [names[label] for label in classes[i].tolist()]
            yield Answer(path, best, scores[i].tolist(), features[i].cpu()), pixels[i]


def embed(model: FeatureModel, options: Predict) -> None:
    """The mean of each image's tokens, which is what a model without a head can say."""
    if not options.embeddings or options.json or options.out:
        raise UserError(
            f"{options.model} holds no classifier, so it gives no labels: ask for its features alone, "
            "--embeddings FILE.npy, or fine-tune it first"
        )
    paths: list[Path] = []
    rows: list[Tensor] = []
    for seen in look(model, options):
        paths += seen.paths
        rows += seen.tokens.mean(1).cpu()
    _save(options.embeddings, paths, rows)


@torch.no_grad()
def look(model: ClassifierModel | FeatureModel, options: Predict) -> Iterator[Seen]:
    """Every image that can be read, once and in order; the others are named on stderr at the end.

    Raises:
        UserError: none can be read, or the model does not take such images.
    """
    config = model.backbone.config
    if config.in_channels != 3:
        raise UserError(f"{options.model} takes images of {config.in_channels} channels; these have three")
    device = choose_device(options.device)
    size = options.image_size or model.input_size or (config.image_size, config.image_size)
    model, normalise = model.to(device), Normalise(model.mean, model.std, 3).to(device)
    sources = list(_sources(options.images))
    num_images, bad = sum(map(len, sources)), list[BadImageError]()

    def batches() -> Iterator[tuple[Images, Batch]]:
        for images in sources:
            loader = eval_loader(
                images,
                image_size=size,
                crop_ratio=crop_ratio_of(size),
                batch_size=options.batch_size,
                workers=None if len(images) > options.batch_size else 0,
                device=device,
                on_bad=bad.append,
            )
            yield from ((images, batch) for batch in loader)

    num_batches = sum(-(-len(images) // options.batch_size) for images in sources)
    num_bad = 0
    for images, batch in watched(batches(), "predicting", num_batches):
        unreadable = {error.path for error in bad[num_bad:]}
        num_bad = len(bad)
        paths = [images.name(index) for index in batch["index"].tolist()]
        kept = [row for row, path in enumerate(paths) if path not in unreadable]
        if kept:
            pixels = batch["images"][kept]
            tokens = model.backbone(normalise(pixels.to(device))).c16
            yield Seen([paths[row] for row in kept], pixels, tokens)
    if num_bad == num_images:
        raise UserError(f"none of {num_images:,} images can be read; the first is {bad[0]}")
    for error in bad[:NUM_NAMED]:
        print(
            f"unreadable image left out: {printable(error.path)}: {printable(error.reason)}", file=sys.stderr
        )
    if num_bad:
        print(f"{num_bad:,} of {num_images:,} images cannot be read", file=sys.stderr)


def table_of(answers: list[Answer]) -> Table:
    table = Table("image", "label", box=None, padding=(0, 2, 0, 0))
    table.add_column("score", justify="right")
    for path, labels, scores, _ in answers[:NUM_SHOWN]:
        percents = "\n".join(f"{score:.1%}" for score in scores)
        table.add_row(printable(path), "\n".join(map(printable, labels)), percents)
    return table


def _sources(given: tuple[Path, ...]) -> Iterator[Images]:
    """Each folder's images, and between them the files that are named one by one."""
    for is_folder, paths in groupby(given, Path.is_dir):
        if is_folder:
            yield from (find_images(path, "val" if (path / "val").is_dir() else "train") for path in paths)
        else:
            names = [str(path) for path in paths]
            yield ImageList(
                root=Path(),
                names=Names(names),
                labels=None,
                class_names=None,
                description=f"{len(names):,} images",
            )


def _draw(sheet: list[tuple[Answer, Tensor]], out: Path) -> None:
    answers = [answer for answer, _ in sheet]
    picture = prediction_picture(
        torch.stack([pixels for _, pixels in sheet]) / 255,
        [answer.labels for answer in answers],
        [answer.scores for answer in answers],
        [answer.path.name for answer in answers],
    )
    with _writing(out):
        picture.save(out)


def _json_line(answer: Answer) -> str:
    scores = [round(score, 6) for score in answer.scores]
    return json.dumps({"path": str(answer.path), "labels": answer.labels, "scores": scores}) + "\n"


def _save(out: Path, paths: list[Path], rows: list[Tensor]) -> None:
    """Features [C] of each image, and beside them the images' paths."""
    beside = out.with_suffix(".txt")
    with _writing(out):
        np.save(out, torch.stack(rows).numpy())
        beside.write_text("".join(f"{printable(path)}\n" for path in paths), encoding="utf-8")
    print(
        f"{printable(out)}: {len(rows):,} embeddings of {len(rows[0])} channels; "
        f"{printable(beside.name)} has the paths"
    )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): name another place") from error
