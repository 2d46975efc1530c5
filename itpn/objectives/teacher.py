"""A frozen timm vision transformer, CLIP's first of all, whose patch tokens are targets for distillation.

The paper's CLIP recipe takes every patch token after the last norm, projects it as CLIP projects its class
token, and normalises it. Where the authors' code departs from that, an option says "published".
"""

import difflib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn.errors import UserError
from itpn.nn.positions import Grid, resample_table
from itpn.objectives.work import flops_of, without_weights

if TYPE_CHECKING:  # timm takes two seconds to import; only those who build a teacher wait for it
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

Vit: TypeAlias = "VisionTransformer | Eva"
CLIP = "vit_base_patch16_clip_quickgelu_224.openai"


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    teacher: str = ""
    """The teacher as timm names it, such as vit_base_patch16_clip_quickgelu_224.openai; without
    teacher_weights it is downloaded."""
    teacher_weights: Path | None = None
    """File of the teacher's weights: of the model of that name, or without a name of a CLIP of OpenAI's."""
    target: Literal["projected", "tokens"] = "projected"
    """Targets: patch tokens through the teacher's last linear layer (CLIP's projection), or as they are after
    its last norm."""
    target_normalisation: Literal["layer-norm", "none"] = "layer-norm"
    """Targets normalised by LayerNorm per token without affine, or as they are."""
    teacher_images: Literal["own", "published"] = "own"
    """The teacher's own mean and standard deviation; the authors' code first takes an image x of 0..1 for one
    of -1..1, so that their teacher sees (x + 1) / 2, washed out."""
    teacher_positions: Literal["own", "published"] = "own"
    """The teacher's position table at another size: timm's way (bicubic, antialiased), or the authors'
    (bicubic by a factor of (new + 0.1) / old)."""


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


def pretrained_config(vit: nn.Module) -> dict[str, Any]:
    """What timm knows of a model's weights and their images, under timm's names."""
    return cast(dict[str, Any], vit.pretrained_cfg)


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
            f"--objective.teacher: there is none; give a timm name to download (--objective.teacher {CLIP}) "
            "or a file of CLIP's weights (--objective.teacher-weights)"
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
        return Teacher(_outlined(config.teacher, {}, {}, device), config, grid)


def from_timm(name: str, overlay: Mapping[str, Any], sizes: Mapping[str, Any] | None = None) -> Vit:
    """The timm model ``name`` with its weights; ``overlay`` and ``sizes`` go before what timm knows of them.

    Raises:
        UserError: no such model, no weights, weights of another model, or no plain vision transformer.
    """
    import timm

    sizes = sizes or {}
    _outlined(name, overlay, sizes)  # what cannot teach is refused before it is downloaded
    expected = Exception if "state_dict" in overlay else (OSError, RuntimeError)  # files can be anything
    try:
        with _quiet_hub():
            vit = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(overlay), **sizes)
    except expected as error:
        reason = _short(error)
        if "state_dict" in overlay:
            raise UserError(f"--objective.teacher-weights: they do not fit {name}: {reason}") from error
        raise UserError(
            f"--objective.teacher: no weights of {name} came from the Hub ({reason}); connect to it, or give "
            "a file of them with --objective.teacher-weights"
        ) from error
    pretrained_config(vit).pop("state_dict", None)  # else the weights stay in memory twice
    return _without_added_bias(cast(Vit, vit))


def _outlined(
    name: str, overlay: Mapping[str, Any], sizes: Mapping[str, Any], device: torch.device | str = "meta"
) -> Vit:
    """The timm model ``name`` without its weights, if it is one that can teach."""
    import timm
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    try:
        with torch.device(device):
            vit = timm.create_model(name, pretrained_cfg_overlay=dict(overlay), **sizes)
    except (OSError, RuntimeError) as error:
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained())
        hint = f"; timm's nearest are {', '.join(near)}" if near else "; give a model as timm names it"
        raise UserError(f"--objective.teacher {name}: {_short(error).rstrip('.')}{hint}") from error
    if not isinstance(vit, VisionTransformer | Eva):
        raise UserError(f"--objective.teacher: {name} ({type(vit).__name__}) is no plain vision transformer")
    notes = pretrained_config(vit).get("notes", ())
    if any("quickgelu" in note for note in notes) and "quickgelu" not in name:
        raise UserError(
            f"--objective.teacher: {name} has GELU where its weights need QuickGELU; use "
            f"{name.replace('_clip_', '_clip_quickgelu_')}"
        )
    return _without_added_bias(vit)


def _without_added_bias(vit: Vit) -> Vit:
    """OpenAI's projections have no bias; timm gives them one, of zeros."""
    bias = getattr(vit.head, "bias", None)
    openai = pretrained_config(vit).get("tag") == "openai"
    if openai and bias is not None and (bias.is_meta or not bias.any()):
        vit.head.register_parameter("bias", None)
    return vit


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """The Hub's client tells of each of its tries, where one line at the end will do."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def from_openai(state: Mapping[str, Tensor], num_heads: int | None = None) -> Vit:
    """The vision tower of OpenAI's CLIP under its own names, with or without ``visual.``, as a timm model.

    All sizes follow from shapes; heads are 64 wide unless ``num_heads`` is given. Its head is the projection.

    Raises:
        UserError: there is no whole vision transformer in ``state``.
    """
    prefix = "visual." if "visual.class_embedding" in state else ""
    visual = {f"visual.{key.removeprefix(prefix)}": x for key, x in state.items() if key.startswith(prefix)}
    try:
        width, _, patch_size, _ = visual["visual.conv1.weight"].shape
        num_cells, _ = visual["visual.positional_embedding"].shape
        hidden, _ = visual["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape
        _, num_classes = visual["visual.proj"].shape
    except KeyError as error:
        raise UserError(
            f"--objective.teacher-weights: no vision transformer under OpenAI's names, {error} is missing; "
            "for weights under other names say which model they are of (--objective.teacher)"
        ) from error
    except ValueError as error:
        raise UserError(
            f"--objective.teacher-weights: OpenAI's names, but not a vision transformer's shapes ({error})"
        ) from error
    if min(width, patch_size, num_cells - 1) < 1:
        raise UserError("--objective.teacher-weights: a weight is empty; the file is not CLIP's")
    if num_heads is None and width % 64:
        raise UserError(f"--objective.teacher-weights: {width} channels are no whole number of heads of 64")
    sizes = {
        "img_size": patch_size * math.isqrt(num_cells - 1),
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": sum(key.endswith(".ln_1.weight") for key in visual),
        "num_heads": num_heads or width // 64,
        "mlp_ratio": hidden / width,
    }
    overlay = {"state_dict": visual, "num_classes": num_classes}
    return from_timm(CLIP, overlay, sizes)  # all but the sizes is the same in OpenAI's other models
