"""Testing weights on labelled images: a fine-tuned model as it is, or what frozen features are worth."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from PIL.Image import Image
from torch import Tensor

from itpn.data.coco import Coco
from itpn.data.detection import find_validation
from itpn.data.labelled import LabelledImages
from itpn.data.picture import BadImageError
from itpn.data.segmentation import find_splits
from itpn.data.source import Images
from itpn.engine.distributed import World
from itpn.errors import UserError, printable
from itpn.evaluate.classify import Predictions, Report, report
from itpn.evaluate.detect import Result, Scores
from itpn.evaluate.knn import KnnConfig, knn
from itpn.evaluate.linear import LinearConfig, linear_probe
from itpn.evaluate.segment import SegmentationScores, evaluate_segmentation
from itpn.models import ClassifierModel, DetectorModel, FeatureModel, SegmenterModel
from itpn.nn.linear import casting_once
from itpn.nn.normalise import Normalise
from itpn.recipes.classify import Classify
from itpn.recipes.detect import Detect
from itpn.recipes.pretrain import Pretrain
from itpn.recipes.segment import Segment
from itpn.tasks import objects
from itpn.tasks.classify import in_precision, splits, validate
from itpn.tasks.common import going_through
from itpn.tasks.segment import compared, labeller
from itpn.weights.files import Weights

Protocol = Literal["finetuned", "linear", "knn"]
OnBad = Callable[[BadImageError], None]


def test_classifier(
    recipe: Classify, weights: Weights, world: World, on_bad: OnBad
) -> tuple[Report, Predictions, Images]:
    """A file's classifier on the recipe's validation images, each once over all ranks.

    Raises:
        UserError: the file holds no classifier, or one of other classes than the images have.
    """
    if "classifier" not in weights.config:
        raise UserError(
            f"{weights.path} holds no classifier; fine-tune it first (itpn train CONFIG --init "
            f"{weights.path}), or evaluate its features with --protocol linear or knn"
        )
    _, val = splits(recipe.data, recipe.val_share)
    model = ClassifierModel.from_weights(weights, **_sized(recipe)).to(world.device)
    class_names = val.class_names or ()
    _check_classes(model.classes, class_names, weights, recipe)
    normalise = _normalise(model).to(world.device)
    found = validate(lambda images: model(normalise(images)), recipe, val, world, on_bad, progress="testing")
    return report(found, class_names), found, val


def test_detector(
    recipe: Detect, weights: Weights, world: World, on_bad: OnBad
) -> tuple[list[Scores], list[Result], Coco]:
    """A file's detector on the recipe's validation images, each once over all ranks: COCO's numbers of boxes
    and masks (on rank 0), what was found, and the images.

    Raises:
        UserError: the file holds no detector, or one of other classes than the annotations have.
    """
    if "regions" not in weights.parts:
        raise UserError(
            f"{weights.path} holds no detector; fine-tune it first (itpn train CONFIG --init {weights.path})"
        )
    val = find_validation(recipe.data, recipe.val_share)
    model = DetectorModel.from_weights(weights).to(world.device)
    _check_classes(model.classes, tuple(category.name for category in val.categories), weights, recipe)
    results = objects.found_in(
        model,
        val,
        recipe.data,
        batch_size=recipe.eval_batch,
        precision=recipe.loop.precision,
        world=world,
        on_bad=on_bad,
        progress="testing",
    )
    scores = objects.scores_of(val, results, model.config.masks) if world.is_main else []
    return scores, results, val


def test_segmenter(
    recipe: Segment, weights: Weights, world: World, on_bad: OnBad
) -> tuple[SegmentationScores, Image | None, LabelledImages]:
    """A file's segmenter on the recipe's validation images, every pixel once over all ranks, looked at as the
    recipe says; a few of its answers as a picture; and the images.

    Raises:
        UserError: the file holds no segmenter, or one of other classes than the images have.
    """
    if "decode_head" not in weights.parts:
        raise UserError(
            f"{weights.path} holds no segmenter; fine-tune it first (itpn train CONFIG --init {weights.path})"
        )
    _, val = find_splits(recipe.data, recipe.val_share)
    model = SegmenterModel.from_weights(weights).to(world.device)
    _check_classes(model.classes, val.labelling.class_names, weights, recipe)
    labels = labeller(model, recipe.inference, recipe.loop.precision, world.device)
    with casting_once(world.device):
        found = evaluate_segmentation(
            labels,
            val,
            recipe.data,
            device=world.device,
            rank=world.rank,
            world_size=world.size,
            on_bad=on_bad,
            progress="testing",
        )
    picture = compared(labels, val, recipe.data, world.device) if world.is_main else None
    return found, picture, val


def test_features(
    recipe: Pretrain | Classify,
    weights: Weights,
    protocol: Literal["linear", "knn"],
    world: World,
    on_bad: OnBad,
) -> dict[str, float]:
    """What a linear classifier or nearest neighbours make of the mean of a frozen backbone's tokens."""
    train, val = splits(recipe.data, recipe.val_share if isinstance(recipe, Classify) else 0.1)
    model = FeatureModel.from_weights(weights, "tokens", **_sized(recipe)).to(world.device)
    normalise = _normalise(model).to(world.device)

    def pooled(images: Tensor) -> Tensor:
        tokens = model(normalise(images))
        assert isinstance(tokens, Tensor)
        return tokens.mean(1)

    features = in_precision(pooled, recipe.loop.precision, world.device)
    through = going_through(recipe, world, on_bad)
    with casting_once(world.device):
        if protocol == "knn":
            return knn(features, train, val, KnnConfig(), through)
        return linear_probe(features, train, val, LinearConfig(), through)


def lines_of(found: Predictions, val: Images) -> Iterator[str]:
    """Every image's path, label, guesses and their scores, as JSON; an image that cannot be read has none."""
    names = val.class_names or ()
    scores, guesses = found.logits.softmax(1).topk(min(5, len(names)))
    for i, label in enumerate(found.labels.tolist()):
        line: dict[str, object] = {"path": str(val.name(i)), "label": names[label] if label >= 0 else None}
        if label >= 0:
            line["guesses"] = [names[guess] for guess in guesses[i].tolist()]
            line["scores"] = [round(score, 6) for score in scores[i].tolist()]
        yield json.dumps(line)


def write_numbers(numbers: dict[str, float], directory: Path) -> Path:
    """Numbers as report.json."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.json"
    path.write_text(json.dumps(numbers, indent=1) + "\n")
    return path


def _check_classes(
    theirs: tuple[str, ...] | None,
    ours: tuple[str, ...],
    weights: Weights,
    recipe: Classify | Detect | Segment,
) -> None:
    if theirs not in (None, ours):
        here, there = set(ours), set(theirs or ())
        raise UserError(
            f"{weights.path} has other classes than {recipe.data.root}; only in the file: "
            f"{_some(there - here)}; only in the images: {_some(here - there)}"
        )


def _sized(recipe: Pretrain | Classify) -> dict[str, int]:
    """The field of a square image size; other sizes resample position tables in every forward pass."""
    height, width = recipe.image_size
    return {"image_size": height} if height == width else {}


def _normalise(model: ClassifierModel | FeatureModel) -> Normalise:
    return Normalise(model.mean, model.std, model.backbone.config.in_channels)


def _some(names: set[str]) -> str:
    return ", ".join(map(printable, sorted(names)[:10])) + (", …" if len(names) > 10 else "") or "none"
