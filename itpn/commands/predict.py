"""`itpn predict MODEL IMAGES_OR_FOLDERS…`: what a model says of images: labels of them, of objects in them
or of their pixels, or embeddings."""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from itpn import models
from itpn.commands.arguments import parse
from itpn.commands.predict_objects import detect
from itpn.commands.predict_pixels import segment
from itpn.commands.predicting import Predict, sources_of, tell_unreadable
from itpn.data.classes import names_for
from itpn.data.loader import Batch, eval_loader
from itpn.data.picture import BadImageError
from itpn.data.progress import watched
from itpn.data.source import Images
from itpn.data.transforms import crop_ratio_of
from itpn.engine.distributed import choose_device
from itpn.errors import UserError, printable
from itpn.models import ClassifierModel, DetectorModel, FeatureModel, SegmenterModel
from itpn.nn.normalise import Normalise
from itpn.outputs import claim, writing
from itpn.show.classify import prediction_picture

NUM_SHOWN = 100
"""Images in the table on the terminal."""
PER_SHEET = 24


class Seen(NamedTuple):
    """A batch of images that could be read."""

    paths: list[Path]
    pixels: Tensor
    """uint8 [B, 3, H, W]."""
    tokens: Tensor
    """Stage 3's: [B, N, C], on the device."""


class Answer(NamedTuple):
    """Prediction of a classifier for an image."""

    path: Path
    labels: list[str]
    scores: list[float]
    features: Tensor
    """Features that its linear layer sees: [C]."""


def run(arguments: list[str]) -> None:
    options = parse(Predict, arguments, "itpn predict")
    if not options.images:
        raise UserError("itpn predict: name one or more images, or folders of images, after the model")
    embeddings = options.embeddings
    claim(
        ("--json", options.json),
        ("--embeddings", embeddings),
        ("--embeddings", embeddings and embeddings.with_suffix(".txt")),
    )
    model = models.load(options.model)
    if not isinstance(model, FeatureModel) and model.classes is None and model.config.num_classes != 1000:
        print(f"{options.model} does not name its classes, so they are numbered", file=sys.stderr)
    match model:
        case DetectorModel() as model:
            detect(model, options)
        case SegmenterModel() as model:
            segment(model, options)
        case ClassifierModel() as model:
            label(model, options)
        case FeatureModel() as model:
            embed(model, options)


def label(model: ClassifierModel, options: Predict) -> None:
    """Answers on the terminal, and wherever else they are asked for."""
    sources = sources_of(options.images)
    num_sheets = -(-sum(map(len, sources)) // PER_SHEET)
    sheets = (
        [options.out / f"predictions-{i:03}.png" for i in range(1, num_sheets + 1)] if options.out else []
    )
    claim(*(("--out", path) for path in sheets))
    found = answered(model, options, sources)
    answers: list[Answer] = []
    while sheet := list(islice(found, PER_SHEET)):
        if sheets:
            _draw(sheet, sheets[len(answers) // PER_SHEET])
        answers += [answer for answer, _ in sheet]
    Console(highlight=False, markup=False, soft_wrap=True).print(table_of(answers))
    if len(answers) > NUM_SHOWN:
        print(f"showing the first {NUM_SHOWN} of {len(answers):,} images; --json FILE writes all")
    if options.json:
        with writing(options.json, "--json") as file:
            file.write_text("".join(map(_json_line, answers)))
    if options.embeddings:
        _save(
            options.embeddings, [answer.path for answer in answers], [answer.features for answer in answers]
        )


@torch.no_grad()
def answered(
    model: ClassifierModel, options: Predict, sources: Sequence[Images]
) -> Iterator[tuple[Answer, Tensor]]:
    """Answers one by one, with the pixels that they are about: uint8 [3, H, W]."""
    names = names_for(model.classes, model.config.num_classes)
    for paths, pixels, tokens in look(model, options, sources):
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
            f"{options.model} holds no classifier and predicts no labels: give --embeddings FILE.npy for its "
            "features, or fine-tune it first"
        )
    paths: list[Path] = []
    rows: list[Tensor] = []
    for seen in look(model, options, sources_of(options.images)):
        paths += seen.paths
        rows += seen.tokens.mean(1).cpu()
    _save(options.embeddings, paths, rows)


@torch.no_grad()
def look(
    model: ClassifierModel | FeatureModel, options: Predict, sources: Sequence[Images]
) -> Iterator[Seen]:
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
    tell_unreadable(bad, num_images)


def table_of(answers: list[Answer]) -> Table:
    table = Table("image", "label", box=None, padding=(0, 2, 0, 0))
    table.add_column("score", justify="right")
    for path, labels, scores, _ in answers[:NUM_SHOWN]:
        percents = "\n".join(f"{score:.1%}" for score in scores)
        table.add_row(printable(path), "\n".join(map(printable, labels)), percents)
    return table


def _draw(sheet: list[tuple[Answer, Tensor]], out: Path) -> None:
    answers = [answer for answer, _ in sheet]
    picture = prediction_picture(
        torch.stack([pixels for _, pixels in sheet]) / 255,
        [answer.labels for answer in answers],
        [answer.scores for answer in answers],
        [answer.path.name for answer in answers],
    )
    with writing(out) as file:
        picture.save(file)


def _json_line(answer: Answer) -> str:
    scores = [round(score, 6) for score in answer.scores]
    return json.dumps({"path": str(answer.path), "labels": answer.labels, "scores": scores}) + "\n"


def _save(out: Path, paths: list[Path], rows: list[Tensor]) -> None:
    """Features [C] of each image, and beside them the images' paths."""
    beside = out.with_suffix(".txt")
    with writing(out, "--embeddings") as file:
        np.save(file, torch.stack(rows).numpy())
    with writing(beside, "--embeddings") as file:
        file.write_text("".join(f"{printable(path)}\n" for path in paths), encoding="utf-8")
    print(
        f"{printable(out)}: {len(rows):,} embeddings of {len(rows[0])} channels; "
        f"{printable(beside.name)} has the paths"
    )
