"""`itpn sample-data DIR`: the bundled clip art as an image folder, a COCO folder and an ADE20K folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from itpn.commands.arguments import parse
from itpn.data.sample_data import write_sample
from itpn.errors import UserError


@dataclass(frozen=True)
class SampleData:
    """Write the bundled sample as three data sets in the formats of ImageNet, COCO and ADE20K."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder to write to. It is created if it does not exist."""
    seed: int = 0
    """Random seed of backgrounds, sizes and places. The same seed writes the same files."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; it must be at least 0")


def run(arguments: Sequence[str]) -> None:
    options = parse(SampleData, arguments, "itpn sample-data")
    directory = options.directory
    written = write_sample(directory, seed=options.seed)
    images, scenes, things = (
        f"{counts['train']:,} train, {counts['val']:,} val"
        for counts in (written.num_images, written.num_scenes, written.num_things)
    )
    print(f"{directory / 'imagefolder'}: {images} images in {len(written.class_names)} classes")
    print(f"{directory / 'coco'}: {scenes} images; {things} objects with boxes and masks")
    print(f"{directory / 'ade20k' / 'ADEChallengeData2016'}: the same images with a label for every pixel")
    print(f"Look at {written.contact_sheet} first.")
