"""What trackers and others add to the model that they start from, and how it is taken out again."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import isqrt

from torch import Tensor

from itpn.errors import UserError
from itpn.weights.families import Given
from itpn.weights.names import Kind

POSITIONS = ("pos_embed", "absolute_pos_embed", "backbone.pos_embed")
STEMS = ("patch_embed.proj.weight", "backbone.patch_embed.proj.weight")
FILTERS = {"sarfeature*.weight_*": "fixed filters, from which SARATR-X computes its targets"}
BESIDE = {
    "cls_token": "a class token; the backbone is read without it",
    "search_token": "a tracker's token; the backbone is read without it",
    "template*_token": "a tracker's token; the backbone is read without it",
    "*_segment_pos_embed": "tells a tracker's images apart; the backbone is read without it",
    "pos_embed_z": "positions of the template",
    "fc_norm.*": "a norm after the backbone, without the head that it belongs to",
}
"""What may stand beside a backbone, and why it stays out."""
NORM = {"norm.*": BESIDE["fc_norm.*"]}
"""The same where there is no pyramid, whose norm has this name."""
PRETRAINING = dict.fromkeys(
    ["align_dim_*", "split_*", "block_*", "fpn_modules.*", "decoder_embed.*", "mask_token"],
    "of pre-training, beside a classifier; --leave-out 'head.*' 'fc_norm.*' takes it instead",
)
SMALLEST_TEMPLATE = 4
"""Units per side of a template; one of half the search image's side may be smaller."""


def without_additions(
    state: Mapping[str, Tensor], kind: Kind, given: Given
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is left of a checkpoint without additions that are known, and why each was left out.

    Raises:
        UserError: the position table or the stem does not tell which part is meant.
    """
    left_out: dict[str, str] = {}
    rules = dict(FILTERS)
    if kind == "backbone":
        with_pyramid = any(key.startswith("align_dim_") for key in state)
        rules |= BESIDE if with_pyramid else BESIDE | NORM
    elif kind == "mean-norm":
        rules |= PRETRAINING | dict.fromkeys(NORM, PRETRAINING["mask_token"])
    for pattern, reason in rules.items():
        left_out |= {key: reason for key in state if fnmatchcase(key, pattern)}
    kept = {key: value for key, value in state.items() if key not in left_out}
    table = next((key for key in POSITIONS if key in kept), "absolute_pos_embed")
    if "pos_embed_x" in kept:
        left_out |= {table: "of one image alone; pos_embed_x takes its place"} if table in kept else {}
        kept[table] = kept.pop("pos_embed_x")
    if table in kept and kept[table].ndim in (2, 3):
        kept[table] = _image_rows(table, kept[table], "cls_token" in state, given, left_out)
    for key in STEMS:
        if key in kept and given.stem != "all" and kept[key].ndim == 4:
            kept[key] = _three_channels(key, kept[key], given, left_out)
    return kept, left_out


def _image_rows(key: str, table: Tensor, with_class: bool, given: Given, left_out: dict[str, str]) -> Tensor:
    """The rows of a position table that are those of an image, of a tracker the search image."""
    rows = table.shape[-2]
    if given.position_rows is None and isqrt(rows) ** 2 == rows:
        return table
    if given.position_rows is None:
        first, last, reason = _inferred(key, rows, with_class)
    else:
        (first, last), reason = given.position_rows, "as asked"
        if not 0 <= first < last <= rows or isqrt(last - first) ** 2 != last - first:
            raise UserError(
                f"--position-rows {first} {last}: of the {rows:,} rows of {key} they must be a square number"
            )
    for start, stop in ((0, first), (last, rows)):
        if start < stop:
            left_out[f"{key}[{start}:{stop}]"] = reason
    return table[..., first:last, :]


def _inferred(key: str, rows: int, with_class: bool) -> tuple[int, int, str]:
    """The first row of the search image, the one after its last, and why the others are left out."""
    layouts = [(0, *sides) for sides in _two_grids(rows)]
    if with_class:
        layouts += [(1, *sides) for sides in _two_grids(rows - 1)]
        layouts += [(1, isqrt(rows - 1), 0)] if isqrt(rows - 1) ** 2 == rows - 1 else []
    if len(layouts) == 1:
        [(first, search, template)] = layouts
        start = first + template**2
        swapped = f"; if the template's come first, give --position-rows {start} {start + search**2}"
        return first, first + search**2, f"no positions of the search image{swapped if template else ''}"
    if not layouts and isqrt(rows - 1) ** 2 == rows - 1:
        layouts = [(1, isqrt(rows - 1), 0)]
    likely = " or ".join(f"{first} {first + side**2}" for first, side, _ in layouts)
    raise UserError(
        f"{key} has {rows:,} rows, which is no square grid; name the image's first row and the one after its "
        f"last with --position-rows {likely or 'FIRST LAST'}"
    )


def _two_grids(rows: int) -> list[tuple[int, int]]:
    """Sides of the square grids of a search image and a smaller template that have so many units together.
    Where one side is twice the other, as trackers have it, that is the only answer."""
    pairs = [(isqrt(rows - side**2), side) for side in range(2, isqrt(rows // 2) + 1)]
    pairs = [(search, template) for search, template in pairs if search**2 + template**2 == rows]
    double = [pair for pair in pairs if pair[0] == 2 * pair[1]]
    return double or [pair for pair in pairs if pair[0] > pair[1] >= SMALLEST_TEMPLATE]


def _three_channels(key: str, weight: Tensor, given: Given, left_out: dict[str, str]) -> Tensor:
    """A stem for RGB, made of one for more channels as asked."""
    channels = weight.shape[1]
    if channels <= 3:
        raise UserError(f"--stem {given.stem}: the stem takes {channels} channels, no more than three")
    left_out[f"{key}[:, 3:{channels}]"] = "added to the first three" if given.stem == "sum" else "as asked"
    if given.stem == "first":
        return weight[:, :3]
    if channels % 3:
        raise UserError(
            f"--stem sum: {channels} channels are no multiple of three; --stem first keeps the first three"
        )
    return weight.reshape(len(weight), -1, 3, *weight.shape[2:]).sum(1)
