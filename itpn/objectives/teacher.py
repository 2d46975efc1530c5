"""A frozen timm vision transformer, CLIP's first of all, whose patch tokens are targets for distillation.

The paper's CLIP recipe takes every patch token after the last norm, projects it as CLIP projects its class
token, and normalises it. Where the authors' code departs from that, an option says "published".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn.errors import UserError
from itpn.nn.positions import Grid, resample_table
from itpn.objectives.vision_transformers import (
    CLIP,
    Vit,
    from_openai,
    from_timm,
    pretrained_config,
    untrained,
)
from itpn.objectives.work import flops_of, without_weights


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    teacher: str = ""
    """timm name of the teacher, such as vit_base_patch16_clip_quickgelu_224.openai. It is downloaded unless
    teacher_weights is given."""
    teacher_weights: Path | None = None
    """Weights file of the teacher. Without a teacher name, it must be one of OpenAI's CLIP models."""
    target: Literal["projected", "tokens"] = "projected"
    """Targets: patch tokens after the teacher's projection (CLIP), or after its last norm."""
    target_normalisation: Literal["layer-norm", "none"] = "layer-norm"
    """Normalisation of the targets: LayerNorm per token without affine, or none."""
    teacher_images: Literal["own", "published"] = "own"
    """Normalisation of the teacher's images: its own mean and standard deviation, or as published. The
    authors' code takes an image x in 0..1 for one in -1..1, so their teacher sees (x + 1) / 2, washed out."""
    teacher_positions: Literal["own", "published"] = "own"
    """Resampling of the teacher's position table: timm's way (bicubic, antialiased), or the authors' (bicubic
    by a factor of (new + 0.1) / old)."""


class Taught(NamedTuple):
    """What a teacher says of images, row by row: targets ``[B, N, D]`` in fp32, and the tokens ``[B, N, T]``
    after its blocks at one third, two thirds and the end of its depth, without its last norm."""

    targets: Tensor
    blocks: list[Tensor]


class Teacher(nn.Module):
    """Images to targets and blocks, without gradient, always in evaluation mode.

    Args:
        vit: a timm model; mean and standard deviation of its images are in its ``pretrained_cfg``.
        grid: rows and columns of tokens that are wanted; the size of its images follows from it. None: the
            model's own.

    Raises:
        UserError: the grid is not square, or the model has no projection.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vit: Vit, config: TeacherConfig, grid: Grid | None = None) -> None:
        super().__init__()
        self.vit, self.config = vit, config
        if config.target == "projected" and (vit.attn_pool is not None or isinstance(vit.head, nn.Identity)):
            raise UserError("--objective.target: the teacher has no projection of tokens; use 'tokens'")
        self.grid: Grid = grid or vit.patch_embed.grid_size
        self.image_size = self.needed_size(self.grid)
        _resize(vit, self.image_size, config)
        mean, std = (torch.tensor(pretrained_config(vit)[key]).view(-1, 1, 1) for key in ("mean", "std"))
        if config.teacher_images == "published":  # ((x + 1) / 2 - mean) / std
            mean, std = 2 * mean - 1, 2 * std
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.requires_grad_(False).eval()

    @property
    def width(self) -> int:
        """Numbers in a target."""
        return self.vit.num_classes if self.config.target == "projected" else self.vit.embed_dim

    @property
    def thirds(self) -> list[int]:
        """Numbers of the blocks at one third, two thirds and the end of the depth; of 12: 3, 7 and 11."""
        depth = len(self.vit.blocks)
        return [max(1, depth * third // 3) - 1 for third in (1, 2, 3)]

    def needed_size(self, grid: Grid) -> int:
        """Pixels per side of an image with ``grid`` tokens: 196 for 14 x 14 tokens of 14 pixels."""
        rows, cols = grid
        if rows != cols:
            raise UserError(f"--objective.teacher: {rows} x {cols} tokens need an image that is not square")
        return rows * cast(int, self.vit.patch_embed.feat_ratio())

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Taught:
        """What it says of images ``[B, 3, H, W]``, floats in 0..1 or uint8."""
        if images.shape[2:] != (self.image_size, self.image_size):
            raise UserError(
                f"the teacher was given {images.shape[2]} x {images.shape[3]} pixels, but its "
                f"{self.grid[0]} x {self.grid[1]} tokens need {self.image_size} x {self.image_size}"
            )
        top = 255 if images.dtype == torch.uint8 else 1
        numbers = sorted(set(self.thirds))
        tokens, blocks = cast(
            tuple[Tensor, list[Tensor]],
            self.vit.forward_intermediates(
                (images / top - self.mean) / self.std, indices=numbers, output_fmt="NLC"
            ),
        )
        by_number = dict(zip(numbers, blocks, strict=True))
        targets = self.vit.fc_norm(tokens[:, self.vit.num_prefix_tokens :])
        if self.config.target == "projected":
            targets = self.vit.head(targets)
        targets = targets.float()
        if self.config.target_normalisation == "layer-norm":
            targets = F.layer_norm(targets, targets.shape[-1:])
        return Taught(targets, [by_number[number] for number in self.thirds])

    def check(self, grid: Grid) -> None:
        """That it has a token for each unit of a student.

        Raises:
            UserError: it has not.
        """
        if self.grid != grid:
            raise UserError(f"the teacher has {self.grid} tokens, the student {grid} units")

    def flops_per_image(self) -> tuple[int, Taught]:
        """Floating-point operations for one image, and what comes out, on the meta device."""
        twin = without_weights(self)
        images = torch.empty(1, 3, self.image_size, self.image_size, device="meta")
        return flops_of(lambda: cast(Taught, twin(images)))

    def teach(self, images: Tensor) -> Taught:
        """What it says of uint8 ``images`` of any size, resized to what it needs, in bf16."""
        size = (self.image_size, self.image_size)
        pixels = images.float() / 255
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        with torch.autocast(images.device.type, torch.bfloat16):
            taught: Taught = self.to(images.device)(pixels)
        return taught


def _resize(vit: Vit, image_size: int, config: TeacherConfig) -> None:
    old, table = vit.patch_embed.grid_size, vit.pos_embed
    vit.set_input_size((image_size, image_size))
    new = vit.patch_embed.grid_size
    if config.teacher_positions == "published" and table is not None and new != old:
        prefix, cells = table[0].tensor_split([table.shape[1] - old[0] * old[1]])
        resampled = torch.cat([prefix, resample_table(cells, old, new, offset=0.1)])
        vit.pos_embed = nn.Parameter(resampled[None], requires_grad=False)


def build_teacher(
    config: TeacherConfig, grid: Grid | None = None, state: Mapping[str, Tensor] | None = None
) -> Teacher:
    """The teacher that ``config`` describes, for a student's ``grid``.

    Args:
        state: what the file ``config.teacher_weights`` holds; without one, timm downloads.

    Raises:
        UserError: no name and no weights, no such weights, or they do not fit.
    """
    if (config.teacher_weights is None) != (state is None):
        raise ValueError("state is what config.teacher_weights holds: give both or neither")
    if config.teacher:
        vit = from_timm(config.teacher, {"state_dict": dict(state)} if state else {})
    elif state is not None:
        vit = from_openai(state)
    else:
        raise UserError(
            f"--objective.teacher: no teacher is given; give a timm name to download (--objective.teacher "
            f"{CLIP}) or a file of CLIP's weights (--objective.teacher-weights)"
        )
    odd = next((name for name, weight in vit.named_parameters() if not weight.isfinite().all()), None)
    if odd is not None:
        raise UserError(f"--objective.teacher-weights: {odd} has values that are NaN or infinite")
    return Teacher(vit, config, grid)


def outline(
    config: TeacherConfig, grid: Grid | None = None, device: torch.device | str = "meta"
) -> Teacher | None:
    """The teacher without its weights: on the meta device to count it and to see whether it fits, on another
    with random ones, to time it. Nothing is downloaded.

    None where no name but a file alone says what it is.

    Raises:
        UserError: no such model, or none that can teach so.
    """
    if not config.teacher:
        return None
    with torch.device(device):
        return Teacher(untrained(config.teacher, device=device), config, grid)
