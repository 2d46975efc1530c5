"""`itpn reconstruct RUN IMAGES…`: what a model fills in where images are masked, as a picture."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image
from torch import Tensor

from itpn.commands.arguments import parse
from itpn.data.folders import split_folder
from itpn.data.images import find_images
from itpn.data.picture import Picture, Size, open_picture
from itpn.data.transforms import center_crop
from itpn.engine.distributed import DeviceName, choose_device
from itpn.errors import UserError
from itpn.outputs import claim, writing
from itpn.tasks.pretrain import load_objective, picture_of


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Draw images beside their masked version, their reconstruction and the pyramid's maps."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory, a checkpoint's model.safetensors, or a weights file that includes the decoder."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or a folder, whose first images are used."""
    out: Path = Path("reconstruction.png")
    """Picture to write."""
    num: int = 8
    """Number of images to use from a folder."""
    mask_ratio: float | None = None
    """Share of hidden units. Default: as in training."""
    seed: int = 0
    """Random seed of the masks."""
    device: DeviceName = "auto"
    """Device to run on."""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise UserError(f"--num is {self.num}; it is a number of images, 1 or more")


def run(arguments: list[str]) -> None:
    options = parse(Reconstruct, arguments, "itpn reconstruct")
    if options.out.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"cannot write {options.out}: --out takes the name of a picture, such as a.png")
    claim(("--out", options.out))
    device = choose_device(options.device)
    objective = load_objective(options.run, mask_ratio=options.mask_ratio).to(device)
    pictures = [picture for given in options.images for picture in _pictures(given, options.num)]
    if not pictures:
        raise UserError("itpn reconstruct: name one or more images, or a folder of images, after the run")
    side = objective.model.backbone.config.image_size
    pixels = torch.stack([_pixels(opened, (side, side)) for _, opened in pictures]).to(device)
    generator = torch.Generator().manual_seed(options.seed)
    picture = picture_of(objective, pixels, generator, [name for name, _ in pictures])
    with writing(options.out) as file:
        picture.save(file)
    print(
        f"{options.out}: {len(pictures)} images, {objective.num_kept} of {objective.num_units} units visible"
    )


def _pictures(given: Path, num: int) -> list[tuple[str, AbstractContextManager[Picture]]]:
    """Names and pictures yet to be opened."""
    if not given.is_dir():
        return [(given.name, open_picture(given))]
    found = find_images(given, "val" if split_folder(given, "val") else "train")
    chosen = torch.linspace(0, len(found) - 1, min(num, len(found))).long().tolist()
    return [(found.name(i).name, found.open(i)) for i in chosen]


def _pixels(opened: AbstractContextManager[Picture], size: Size) -> Tensor:
    with opened as picture:
        return center_crop(picture.decode(), size)
