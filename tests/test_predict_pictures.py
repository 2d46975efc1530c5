"""Pictures of `itpn predict`: each input has its own, and no photo makes room for one."""

import json
import unicodedata

import pytest
import torch
from PIL import Image

from itpn import cli
from itpn.heads.upernet import SegmenterConfig
from itpn.heads.windows import InferenceConfig
from itpn.models import DetectorModel, SegmenterModel
from itpn.objectives.pixel import PixelConfig
from tests.toys import toy_detector_config, toy_model


@pytest.fixture(scope="module", params=["detector", "segmenter"])
def model(request, tmp_path_factory):
    torch.manual_seed(0)
    if request.param == "detector":
        made = DetectorModel(toy_model(), toy_detector_config())
        made.views = {"eval_short_side": 64, "max_side": 64}
    else:
        seen = {"mean": PixelConfig.mean, "std": PixelConfig.std}
        config = SegmenterConfig(num_classes=3, width=16, auxiliary_width=8, norm="group", **seen)
        made = SegmenterModel(toy_model(), config, InferenceConfig(mode="whole"), (64, 64))
    made.save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return folder


@pytest.fixture
def photos(tmp_path):
    for name in ("x.png", "b/x.jpg", "X.webp", "val/caf\u00e9.png", "train/cafe\u0301.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (48, 40), "red").save(tmp_path / name)
    return tmp_path


def predict(*arguments):
    return cli.main(["predict", *map(str, arguments), "--device", "cpu"])


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_photo_makes_room_for_a_picture(model, photos, capsys):
    before = files_of(photos)
    for given in ([photos / "x.png"], [photos / "b", photos / "x.png"]):
        assert predict(model, *given, "--out", photos) == 2
        said = capsys.readouterr().err
        assert f"{photos / 'x.png'} is not replaced" in said and "--out" in said
        assert files_of(photos) == before
    assert predict(model, photos / "b" / "x.jpg", "--out", photos / "b") == 0


def test_every_input_has_its_own_picture_again_and_again(model, photos, capsys):
    found = []
    for out in ("new", "photos/drawn", "photos/drawn"):
        folder, lines = photos / out, photos / out / "all.json"
        assert predict(model, photos, "--out", folder, "--json", lines) == 0
        found.append(sorted(unicodedata.normalize("NFC", path.stem) for path in folder.glob("*.png")))
        assert f"5 images without class folders under {photos}" in capsys.readouterr().out
        assert lines.read_text().count(str(photos)) == 5
    assert found == [["X", "caf\u00e9", "caf\u00e9-2", "x-2", "x-3"]] * 3


def test_pictures_that_were_named_are_left_out_and_a_cure_is_given(model, photos, capsys):
    out = photos / "drawn"
    assert predict(model, photos / "x.png", "--out", out) == 0
    assert predict(model, photos / "x.png", out / "x.png", "--out", out, "--json", out / "j") == 0
    assert f"left out, since itpn wrote it: {out / 'x.png'}" in capsys.readouterr().out
    assert predict(model, out / "x.png", "--out", photos / "again") == 2
    assert "copy it to another folder" in capsys.readouterr().err
    (photos / "copy.png").write_bytes((out / "x.png").read_bytes())
    assert predict(model, photos / "copy.png", "--out", photos / "again") == 0


def test_a_json_file_of_the_users_is_kept(model, photos, capsys):
    path = photos / "instances.json"
    path.write_text(json.dumps({"mine": 1}))
    assert predict(model, photos, "--out", photos / "out", "--json", path) == 2
    assert "--json" in capsys.readouterr().err and json.loads(path.read_text()) == {"mine": 1}
    assert not (photos / "out").exists()
