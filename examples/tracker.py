"""Template and search image in one transformer, as trackers use the backbone.

    python examples/tracker.py [WEIGHTS.safetensors]

Each image goes through stages 1 and 2 by itself. Stage 3 then sees the tokens of both at once, and what comes
out for the search image is compared with what comes out for the template. As in trackers of several kinds of
images, the stem takes six channels: an RGB image and another beside it, here the same one. The template's
positions are made of the search image's in both ways that trackers have.

Trackers take 112 and 224 pixels and a trained backbone. For stripes on noise 64 and 128 pixels will do, and,
unless a file is named, an untrained backbone.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import itpn
from itpn.models import MEAN, STD
from itpn.nn.hivit import HiViT
from itpn.nn.positions import Grid


def with_six_channels(backbone: HiViT) -> HiViT:
    """The same backbone for an RGB image beside another one; for the same one twice it gives the same."""
    wide = HiViT(replace(backbone.config, in_channels=6)).eval()
    state = backbone.state_dict()
    half = state["stem_proj.weight"].unflatten(1, (-1, 3)) / 2
    state["stem_proj.weight"] = torch.cat([half, half], -1).flatten(1)
    wide.load_state_dict(state)
    return wide


def template_positions(search: Tensor, grid: Grid, template: Grid, cut: bool) -> Tensor:
    """Positions ``[T, C]`` for a template's grid, made of those ``[S, C]`` of a search image.

    Trackers either cut out the upper left part, or resize the whole with aligned corners.
    """
    table = search.T.unflatten(1, grid)[None]
    if cut:
        table = table[..., : template[0], : template[1]]
    else:
        table = F.interpolate(table, size=template, mode="bicubic", align_corners=True)
    return table.flatten(2)[0].T


def tokens_of(backbone: HiViT, images: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Grid]:
    """Images ``[B, c, H, W]`` as tokens ``[B, N, C]``, ready for stage 3, and their grid.

    Without ``positions [N, C]`` they are the backbone's, resampled to the grid.
    """
    grid = backbone.grid_of(images)
    _, _, tokens = backbone.local(backbone.stem(images))
    return backbone.embed(tokens, grid) if positions is None else tokens + positions, grid


def taps_of(backbone: HiViT, numbers: Sequence[int]) -> list[int]:
    """Blocks of stage 3 by their numbers in the authors' list, where stages 1 and 2 and two merges come
    first."""
    first = len(backbone.stage1) + len(backbone.stage2) + 2
    if min(numbers, default=first) < first:
        raise SystemExit(f"stage 3 starts with their block {first}: tap none before it")
    return [number - first for number in numbers]


def joint(
    backbone: HiViT, template: Tensor, search: Tensor, taps: Sequence[int] = ()
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Stage 3 over both sets of tokens, ``[B, T, C]`` and ``[B, S, C]``: the same two sets, and the search
    tokens after each block of ``taps``."""
    if backbone.config.relative_position_bias:
        raise SystemExit("tokens of two images have no relative positions: take weights without a bias")
    together, tapped = backbone.context(torch.cat([template, search], 1), taps=taps)
    start = template.shape[1]
    return together[:, :start], together[:, start:], [tokens[:, start:] for tokens in tapped]


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
def main(weights: str | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = itpn.load(weights) if weights else itpn.create_model("fast_itpn_nano", image_size=128).eval()
    backbone = model.backbone
    if backbone.config.in_channels == 3:
        backbone = with_six_channels(backbone)
    template, search = (torch.cat([images, images], 1) for images in toy_images())
    search_tokens, grid = tokens_of(backbone, search)
    positions = backbone.embed(torch.zeros_like(search_tokens), grid)[0]
    maps = {}
    for way in ("resized", "cut"):
        made = template_positions(positions, grid, backbone.grid_of(template), cut=way == "cut")
        template_tokens, _ = tokens_of(backbone, template, made)
        found, searched, _ = joint(backbone, template_tokens, search_tokens)
        [maps[way]] = correlation(found, searched, grid)
        print(f"the template's positions are {way}:")
        for row in maps[way]:
            print("  ".join(f"{value:5.2f}" for value in row.tolist()))
    return maps


if __name__ == "__main__":
    main(*sys.argv[1:2])
