"""The first training scenes of `itpn sample-data`, as data sets whose validation images are the same ones.

A model that cannot learn them by heart has a fault somewhere (docs/results.md).
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

ADE20K = Path("ade20k/ADEChallengeData2016")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    sample: Path
    """Folder that `itpn sample-data` has written."""
    out: Path
    """Where coco and ade20k go; must not be there yet."""
    num: int = 8
    """Scenes to take."""


def cut_coco(sample: Path, out: Path, num: int) -> None:
    content = json.loads((sample / "annotations/instances_train2017.json").read_text())
    images = content["images"][:num]
    ids = {image["id"] for image in images}
    things = [thing for thing in content["annotations"] if thing["image_id"] in ids]
    (out / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (out / split).mkdir()
        for image in images:
            shutil.copy(sample / "train2017" / image["file_name"], out / split)
        few = json.dumps(content | {"images": images, "annotations": things})
        (out / "annotations" / f"instances_{split}.json").write_text(few)


def cut_ade20k(sample: Path, out: Path, num: int) -> None:
    for kind in ("images", "annotations"):
        for split, name in (("training", "train"), ("validation", "val")):
            (out / kind / split).mkdir(parents=True)
            for path in sorted((sample / kind / "training").iterdir())[:num]:
                shutil.copy(path, out / kind / split / path.name.replace("train", name))
    shutil.copy(sample / "objectInfo150.txt", out)


if __name__ == "__main__":
    given = tyro.cli(Arguments, description=__doc__)
    cut_coco(given.sample / "coco", given.out / "coco", given.num)
    cut_ade20k(given.sample / ADE20K, given.out / ADE20K, given.num)
