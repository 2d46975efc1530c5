"""Detectors on data of other kinds: without masks, with other classes, and eight images by heart."""

import json
from dataclasses import replace

import pytest

import itpn
from itpn.data.views import MultiScale
from itpn.engine.optim import AdamWConfig
from itpn.engine.schedule import ScheduleConfig
from itpn.errors import UserError
from itpn.nn.depth import LayerDecayConfig
from itpn.nn.pyramid import ModelConfig, PyramidConfig
from itpn.tasks.detect import detect
from tests.detecting import recipe, write_coco, write_splits
from tests.toys import toy_backbone, toy_detector_config


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("coco"))


def test_annotations_without_masks_train_boxes_alone(images, tmp_path):
    root = tmp_path / "boxes"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").symlink_to(images / f"{split}2017")
        name = f"annotations/instances_{split}2017.json"
        content = json.loads((images / name).read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        (root / name).write_text(json.dumps(content))
    run = detect(recipe(root, tmp_path / "run", {"epochs": 1}))
    assert not itpn.load(run).config.masks
    assert "mask_AP" not in json.loads((run / "report.json").read_text())


def test_splits_of_other_classes(images, tmp_path):
    root = tmp_path / "other"
    (root / "annotations").mkdir(parents=True)
    content = json.loads((images / "annotations/instances_val2017.json").read_text())
    content["categories"][0]["name"] = "pink"
    (root / "val.json").write_text(json.dumps(content))
    given = recipe(images, tmp_path / "run")
    data = replace(given.data, val_annotations=root / "val.json")
    with pytest.raises(UserError, match=r"need the same categories.*red \(3\).*pink \(3\)"):
        detect(replace(given, data=data))


def test_it_learns_eight_images_by_heart(tmp_path):
    for split in ("train", "val"):  # the same images
        write_coco(tmp_path / "images", split, 8, seed=1)
    given = recipe(tmp_path / "images", tmp_path / "run", {"epochs": 160, "batch_size": 8, "clip_grad": 5.0})
    detector = toy_detector_config(mean=None, std=None)
    head = replace(detector.regions.head, conv_width=48, hidden_width=96)
    whole = MultiScale(
        flip=0.0, crop=0.0, short_sides=(96,), max_side=96, eval_short_side=96, num_short_sides=1
    )
    given = replace(
        given,
        model=ModelConfig(backbone=toy_backbone(), pyramid=PyramidConfig(width=48, depth=1)),
        detector=replace(detector, regions=replace(detector.regions, head=head)),
        data=replace(given.data, scale=whole, mask_size=56),
        optim=AdamWConfig(lr=3e-3, betas=(0.9, 0.999)),
        layer_decay=LayerDecayConfig(rate=1.0),
        schedule=ScheduleConfig(warmup_epochs=10),
        loop=replace(given.loop, picture_every=0),
        eval_every=0,
    )
    report = json.loads((detect(given) / "report.json").read_text())
    assert report["images"] == 8
    assert report["box_AP"] > 0.9
    assert report["mask_AP"] > 0.8
