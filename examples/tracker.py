"""Template and search image in one transformer, as trackers use the backbone.

    python examples/tracker.py [WEIGHTS.safetensors]

Each image goes through stages 1 and 2 by itself and gets positions on its own grid; then stage 3 sees the
tokens of both at once, and what comes out for the search image is compared with what comes out for the
template. Trackers take 112 and 224 pixels and a trained backbone; for stripes on noise 64 and 128 will do,
and, unless a file is named, an untrained one.
"""

import sys

import torch
from torch import Tensor

import itpn
from itpn.models import MEAN, STD
from itpn.nn.hivit import HiViT
from itpn.nn.positions import Grid


def tokens_of(backbone: HiViT, images: Tensor) -> tuple[Tensor, Grid]:
    """Images ``[B, 3, H, W]`` as tokens ``[B, N, C]`` with positions, ready for stage 3, and their grid."""
    grid = backbone.grid_of(images)
    _, _, tokens = backbone.local(backbone.stem(images))
    return backbone.embed(tokens, grid), grid


def joint(backbone: HiViT, template: Tensor, search: Tensor) -> tuple[Tensor, Tensor]:
    """Stage 3 over both sets of tokens, ``[B, T, C]`` and ``[B, S, C]``; the same two sets come out."""
    if backbone.config.relative_position_bias:
        raise SystemExit("tokens of two images have no relative positions: take weights without a bias")
    together, _ = backbone.context(torch.cat([template, search], 1))
    return together[:, : template.shape[1]], together[:, template.shape[1] :]


def correlation(template: Tensor, search: Tensor, grid: Grid) -> Tensor:
    """Cosine of each search token and the template's mean token, as a map ``[B, rows, cols]``."""
    similarity = torch.cosine_similarity(search, template.mean(1, keepdim=True), dim=-1)
    return similarity.unflatten(1, grid)


def toy_images() -> tuple[Tensor, Tensor]:
    """A striped square of 64 pixels, and noise of 128 pixels with that square at its lower right."""
    generator = torch.Generator().manual_seed(0)
    stripes = (torch.arange(64) // 4 % 2).float().expand(3, 64, 64)
    scene = 0.3 * torch.rand(3, 128, 128, generator=generator)
    scene[:, 64:, 64:] = stripes
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((stripes - mean) / std)[None], ((scene - mean) / std)[None]


@torch.no_grad()
def main(weights: str | None = None) -> Tensor:
    torch.manual_seed(0)
    model = itpn.load(weights) if weights else itpn.create_model("fast_itpn_nano", image_size=128).eval()
    template, search = toy_images()
    template_tokens, _ = tokens_of(model.backbone, template)
    search_tokens, grid = tokens_of(model.backbone, search)
    found = correlation(*joint(model.backbone, template_tokens, search_tokens), grid)[0]
    for row in found:
        print("  ".join(f"{value:5.2f}" for value in row.tolist()))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2])
