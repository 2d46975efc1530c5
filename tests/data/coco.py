"""Small data sets in COCO's format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Content = dict[str, Any]
TRIANGLE = [[10, 10, 30, 10, 10, 40]]


def content(sizes: list[tuple[int, int]], **objects: Any) -> Content:
    """Images of (height, width) with ids from 1, two categories, and no annotations."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": height, "width": width}
            for i, (height, width) in enumerate(sizes, 1)
        ],
        "annotations": [],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        **objects,
    }


def thing(number: int, image: int = 1, **fields: Any) -> Content:
    """A triangle, x from 10 to 30, y from 10 to 40."""
    return {
        "id": number,
        "image_id": image,
        "category_id": 3,
        "bbox": [10, 10, 20, 30],
        "area": 300,
        "iscrowd": 0,
        "segmentation": TRIANGLE,
        **fields,
    }


def written(folder: Path, data: Any, name: str = "instances.json") -> Path:
    """The file, with the images that it names beside it."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    if isinstance(data, dict) and isinstance(data.get("images"), list):
        for image in data["images"]:
            size = image["height"], image["width"], 3
            Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(folder / image["file_name"])
    file = folder / name
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return file
