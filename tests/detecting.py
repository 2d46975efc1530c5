"""Toy scenes in COCO's form, and a recipe that learns to detect in them."""

import json
from dataclasses import replace

import numpy as np
from PIL import Image

from itpn.data.detection import DetectionDataConfig
from itpn.data.views import MultiScale
from itpn.engine.loop import LoopConfig
from itpn.engine.optim import AdamWConfig
from itpn.nn.depth import LayerDecayConfig
from itpn.nn.pyramid import ModelConfig, PyramidConfig
from itpn.recipes.detect import Detect
from tests.toys import toy_backbone, toy_detector_config, toy_scenes

CATEGORIES = [{"id": 3, "name": "red"}, {"id": 5, "name": "green"}, {"id": 9, "name": "blue"}]


def write_coco(root, split, count, seed):
    """Toy scenes as COCO has them: polygons of ellipses, the colour is the class."""
    scenes = toy_scenes(count, seed=seed)
    (root / f"{split}2017").mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    images, annotations = [], []
    for i in range(count):
        pixels = scenes["images"][i].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / f"{split}2017" / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": 64, "width": 64})
        for box, label in zip(scenes["boxes"][i].tolist(), scenes["labels"][i].tolist(), strict=True):
            if label >= 0:
                x, y, width, height = box[0], box[1], box[2] - box[0], box[3] - box[1]
                outline = np.stack(
                    [x + width * (1 + np.cos(turn)) / 2, y + height * (1 + np.sin(turn)) / 2], 1
                )
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i + 1,
                        "category_id": CATEGORIES[label]["id"],
                        "bbox": [x, y, width, height],
                        "area": width * height * np.pi / 4,
                        "iscrowd": 0,
                        "segmentation": [outline.ravel().tolist()],
                    }
                )
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def write_splits(root):
    """Eight toy scenes to train on, and five others to validate on."""
    write_coco(root, "train", 8, seed=1)
    write_coco(root, "val", 5, seed=2)
    return root


def recipe(root, run_dir, loop=None, **fields):
    given = Detect(
        name="toy",
        model=ModelConfig(
            backbone=toy_backbone(drop_path=0.2), pyramid=PyramidConfig(width=40, depth=2, mlp_ratio=2.0)
        ),
        detector=replace(toy_detector_config(norm="batch"), mean=None, std=None),
        data=DetectionDataConfig(
            root=root,
            workers=0,
            mask_size=28,
            scale=MultiScale(
                short_sides=(64,),
                max_side=64,
                crop_short_sides=(64,),
                crop_sides=(48, 64),
                eval_short_side=64,
            ),
        ),
        optim=AdamWConfig(lr=1e-3),
        layer_decay=LayerDecayConfig(rate=0.9),
        loop=LoopConfig(
            **{
                "epochs": 2, "batch_size": 4, "device": "cpu", "log_every": 1, "run_dir": run_dir,
                "picture_every": 1,
            }
            | (loop or {})
        ),
        eval_batch=2,
    )  # fmt: skip
    return replace(given, **fields)
