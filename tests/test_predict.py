"""`itpn predict`: labels, pictures and embeddings of any images, from a classifier's file or a backbone's."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import itpn
from itpn import cli
from itpn.data.transforms import center_crop
from itpn.heads.classify import ClassifierConfig
from itpn.models import ClassifierModel, FeatureModel
from itpn.nn.hivit import HiViT
from tests.toys import toy_backbone, toy_model

CLASSES = ("ant", "bee [red]", "n01440764")


def toy_classifier(num_classes=3):
    torch.manual_seed(0)
    model = ClassifierModel(HiViT(toy_backbone()), ClassifierConfig(num_classes=num_classes)).eval()
    nn.init.normal_(model.head.weight)
    model.mean, model.std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a classifier that was trained on 32 x 64 pixels."""
    folder, model = tmp_path_factory.mktemp("models") / "classifier", toy_classifier()
    model.classes, model.input_size = CLASSES, (32, 64)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "backbone"
    FeatureModel(toy_model()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five images of different sizes, of which one cannot be read."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (40 + 20 * i, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    return folder


def predict(*arguments):
    return cli.main(["predict", *map(str, arguments), "--device", "cpu"])


def expected(model, path, size, crop_ratio=224 / 256):
    """Features and scores by another way: one image, written out."""
    pixels = center_crop(Image.open(path).convert("RGB"), size, crop_ratio) / 255
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (model.mean, model.std))
    with torch.no_grad():
        tokens = model.backbone(((pixels - mean) / std)[None]).c16
        if isinstance(model, FeatureModel):
            return tokens.mean(1)[0]
        features = model.pool(tokens)
        return features[0], model.head(features).softmax(1)[0]


def test_labels_scores_picture_and_embeddings(model, images, tmp_path, capsys):
    lines, rows = tmp_path / "new/lines.jsonl", tmp_path / "rows.npy"
    given = ["--json", lines, "--embeddings", rows, "--out", tmp_path / "pictures", "--batch-size", 2]
    assert predict(model, images, images / "0.png", *given) == 0
    out, err = capsys.readouterr()
    assert "bee [red]" in out and "tench" in out and "n01440764" not in out
    assert f"{images}/3.png: not an image" in err and "1 of 6 images cannot be read" in err

    readable = [str(images / f"{i}.png") for i in (0, 1, 2, 4, 0)]
    answers = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [answer["path"] for answer in answers] == readable
    assert (tmp_path / "rows.txt").read_text().splitlines() == readable
    embeddings, loaded = np.load(rows), itpn.load(model)
    assert embeddings.shape == (5, 32) and embeddings.dtype == np.float32
    for answer, row in zip(answers, embeddings, strict=True):
        features, scores = expected(loaded, answer["path"], (32, 64))
        assert answer["scores"] == pytest.approx(scores.sort(descending=True).values.tolist(), abs=1e-5)
        assert answer["labels"][0] == ("ant", "bee [red]", "tench")[scores.argmax()]
        assert row == pytest.approx(features.numpy(), abs=1e-4)
    assert [path.name for path in (tmp_path / "pictures").glob("[!.]*")] == ["predictions-001.png"]
    assert np.asarray(Image.open(tmp_path / "pictures/predictions-001.png")).std() > 10


def test_top_image_size_and_sheets(model, images, tmp_path):
    lines, pictures = tmp_path / "lines.jsonl", tmp_path / "pictures"
    given = ["--top", 1, "--image-size", 256, 32, "--json", lines, "--out", pictures]
    assert predict(model, *[images / "1.png"] * 25, *given) == 0
    answers = [json.loads(line) for line in lines.read_text().splitlines()]
    _, scores = expected(itpn.load(model), images / "1.png", (256, 32), crop_ratio=1.0)
    assert len(answers) == 25 and answers[24]["scores"] == pytest.approx([float(scores.max())], abs=1e-5)
    sheets = ["predictions-001.png", "predictions-002.png"]
    assert sorted(path.name for path in pictures.glob("*.png")) == sheets
    sizes = [Image.open(pictures / sheet).size for sheet in sheets]
    assert sizes[0] > sizes[1]


def test_the_table_ends_where_nobody_reads_on(model, images, capsys):
    assert predict(model, *[images / "1.png"] * 120, "--top", 1, "--batch-size", 60) == 0
    out = capsys.readouterr().out
    assert out.count("1.png") == 100 and "the first 100 of 120 images" in out


def test_a_backbone_gives_embeddings(backbone, images, tmp_path, capsys):
    rows = tmp_path / "rows.npy"
    assert predict(backbone, images, "--embeddings", rows) == 0
    assert "4 embeddings of 32 channels" in capsys.readouterr().out
    embeddings, loaded = np.load(rows), itpn.load(backbone)
    for row, i in zip(embeddings, (0, 1, 2, 4), strict=True):
        assert row == pytest.approx(expected(loaded, images / f"{i}.png", (64, 64)).numpy(), abs=1e-4)


@pytest.mark.parametrize(
    ("num_classes", "label", "name"),
    [(3, 2, "class 2"), (1000, 0, "tench"), (1000, 517, "crane (n03126707)")],
)
def test_classes_without_names(images, tmp_path, capsys, num_classes, label, name):
    unnamed = toy_classifier(num_classes)
    nn.init.zeros_(unnamed.head.weight)
    unnamed.head.bias.data[label] = 3.0
    unnamed.save_pretrained(tmp_path / "unnamed")
    assert predict(tmp_path / "unnamed", images / "0.png", "--top", 1) == 0
    said = capsys.readouterr()
    assert name in said.out and ("unnamed does not name its classes" in said.err) == (num_classes == 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("MODEL", "name one or more images"),
        ("NONE IMAGES", "no file"),
        ("MODEL IMAGES/3.png IMAGES/none.png", "none of 2 images can be read"),
        ("MODEL IMAGES/new", "none of 1 images can be read"),
        ("MODEL MODEL", "holds no image"),
        ("MODEL IMAGES --top 0", "must be 1 or more"),
        ("MODEL IMAGES --image-size 0 64", "must be 1 or more"),
        ("MODEL IMAGES --image-size 40 64", "each side must be a multiple of the unit of 16"),
        ("MODEL IMAGES --embeddings TMP/a.txt", "ends in .npy"),
        ("MODEL IMAGES --json IMAGES", "cannot write"),
        ("MODEL IMAGES --json IMAGES/0.png/a", "cannot write"),
        ("MODEL IMAGES --out IMAGES/0.png", "cannot write"),
        ("BACKBONE IMAGES", "holds no classifier and predicts no labels: give --embeddings"),
        ("BACKBONE IMAGES --embeddings TMP/a.npy --json TMP/a", "holds no classifier"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(model, backbone, images, tmp_path, capsys, arguments, words):
    places = {"MODEL": model, "BACKBONE": backbone, "IMAGES": images, "NONE": tmp_path / "x", "TMP": tmp_path}
    for name, place in places.items():
        arguments = arguments.replace(name, str(place))
    assert predict(*arguments.split()) == 2
    complaint = capsys.readouterr().err
    assert words in complaint and complaint.count("\n") == 1


def test_a_model_of_other_channels_or_of_no_numbers_is_named(images, tmp_path, capsys):
    grey = ClassifierModel(HiViT(toy_backbone(in_channels=1)), ClassifierConfig(num_classes=2))
    grey.save_pretrained(tmp_path / "grey")
    assert predict(tmp_path / "grey", images) == 2
    assert "takes images of 1 channels" in capsys.readouterr().err
    broken = toy_classifier()
    nn.init.constant_(broken.head.bias, float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    assert predict(tmp_path / "broken", images) == 2
    assert "not finite" in capsys.readouterr().err
