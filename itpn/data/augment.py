"""RandAugment, as timm publishes it, of one sample's own random numbers."""

import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from itpn.data.picture import Size
from itpn.data.randomness import global_generators
from itpn.data.transforms import to_tensor
from itpn.errors import UserError

Transform = Callable[[Image.Image], Image.Image]

# What timm's parser heeds. All else fails an assertion there, without saying which part, or is passed over.
_SECTIONS = r"m\d\d?", r"n[1-9]", r"p(0(\.\d+)?|1(\.0+)?)", r"mstd\d+(\.\d+)?", r"mmax[1-9]\d?", r"inc[01]"
_SYNTAX = re.compile(rf"rand(-({'|'.join(_SECTIONS)}|t(weights|3aw?)))*")


def check_randaugment(text: str) -> None:
    """Raises:
    UserError: the string is none of timm's for RandAugment.
    """
    if not _SYNTAX.fullmatch(text):
        raise UserError(
            f"--data.randaugment is {text!r}; it takes timm's notation, such as rand-m9-mstd0.5-inc1. After "
            "rand come any of m9 (strength), n2 (operations per image), p0.5 (probability of each), mstd0.5 "
            "(deviation of the strength), mmax10 (its bound), inc1 (all operations grow with it). tweights, "
            "t3a and t3aw choose the operations"
        )


@lru_cache
def randaugment(text: str, size: Size) -> Transform:
    """timm's transform with the settings of its ``create_transform``; it draws from the global generators."""
    from timm.data import IMAGENET_DEFAULT_MEAN  # seconds to import, for those who ask for it
    from timm.data.auto_augment import rand_augment_transform

    settings = {
        "translate_const": int(0.45 * min(size)),
        "img_mean": tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN),
        "interpolation": Image.Resampling.BICUBIC,
    }
    transform = rand_augment_transform(text, settings)
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = partial(_posterized, operation.aug_fn)
    return cast(Transform, transform)


def _posterized(
    posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **options: Any
) -> Image.Image:
    """timm's, which may ask for no bits at all: black, until Pillow 13 made an error of it."""
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


def augmented(pixels: Tensor, text: str, generator: torch.Generator) -> Tensor:
    """uint8 ``[3, H, W]`` changed by the RandAugment that ``text`` describes, of the generator's numbers."""
    _, height, width = pixels.shape
    transform = randaugment(text, (height, width))
    with global_generators(generator):
        return to_tensor(transform(Image.fromarray(pixels.permute(1, 2, 0).numpy())))
