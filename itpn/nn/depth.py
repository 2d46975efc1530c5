"""How deep in the backbone a parameter lies, and layer decay: learning rates that shrink towards the stem."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from itpn.errors import UserError

LayerDecayRule = Literal["sound", "itpn", "fast", "detection", "segmentation"]
Depths = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class LayerDecayConfig:
    rate: float
    """Ratio of a layer's learning rate to that of the layer above it. Published rates under different rules
    do not compare. Under "itpn", 0.60 is 0.807 per layer in base, and 0.55 is 0.841 in large. Under
    "segmentation", 0.90 is 0.958 in base. Under "sound", "fast" and "detection", the rate is per layer."""
    rule: LayerDecayRule = "sound"
    """Definition of a layer. sound: each residual block, with the merge that follows it; stem and position
    table lie below, heads and pyramid on top. The other rules reproduce published training. itpn: as sound,
    but the rate is spread over 13 steps, however many layers there are. fast (Fast-iTPN): merges are layers
    too. detection, segmentation: merges are layers that the head's place does not count, so the last block
    learns faster than the head. In detection, position tables learn as fast as the head. In segmentation, 13
    steps are spread over two more layers than there are blocks."""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise UserError(f"layer_decay.rate: {self.rate} lies outside (0, 1]; 1 is no decay")


class _Rule(NamedTuple):
    """Defaults are the sound rule."""

    merges_count: bool = False
    """Whether a merge is a layer, or belongs to the block before it, whose output it gathers."""
    top: int = 1
    """The layer of heads and pyramid, over the number of residual blocks."""
    position_on_top: bool = False
    spread: int | None = None
    """The rate is for 13 layers of so many, over the number of residual blocks; None: for each layer."""


_RULES: dict[LayerDecayRule, _Rule] = {
    "sound": _Rule(),
    "itpn": _Rule(spread=1),
    "fast": _Rule(merges_count=True, top=3),
    "detection": _Rule(merges_count=True, position_on_top=True),
    "segmentation": _Rule(merges_count=True, spread=2),
}
_PLACE = re.compile(r"(?:^|\.)backbone\.(stem|position|stage|merge)(\d?)\.?(\d*)")


def layer_ids(names: Iterable[str], depths: Depths, rule: LayerDecayRule = "sound") -> dict[str, int]:
    """The layer of every parameter: 0 for the stem, then the blocks, the highest for all that is no backbone.

    Args:
        names: of parameters; those of the backbone have ``backbone.`` in front of HiViT's own, and anything
            before that.
        depths: residual blocks per stage.

    Raises:
        UserError: none of the names is of a backbone.
        ValueError: a block that a backbone of these depths does not have.
    """
    chosen = _RULES[rule]
    top = sum(depths) + chosen.top
    ids = {name: _layer_of(name, depths, chosen, top) for name in names}
    if not any(_PLACE.search(name) for name in ids):
        raise UserError("layer decay: no parameter's name contains backbone., so all belong to the head")
    return ids


def lr_scales(names: Iterable[str], depths: Depths, config: LayerDecayConfig) -> dict[str, float]:
    """What the learning rate of every parameter is multiplied by: ``rate ** (layers above it)``, 1 on top.

    Arguments and errors are those of `layer_ids`.
    """
    chosen, blocks = _RULES[config.rule], sum(depths)
    rate = config.rate if chosen.spread is None else config.rate ** (13 / (blocks + chosen.spread))
    ids = layer_ids(names, depths, config.rule)
    return {name: rate ** (blocks + chosen.top - layer) for name, layer in ids.items()}


def _layer_of(name: str, depths: Depths, rule: _Rule, top: int) -> int:
    found = _PLACE.search(name)
    if found is None:
        return top
    part, stage, block = found[1], int(found[2] or 0), int(found[3] or 0)
    if part == "stage":
        if block >= depths[stage - 1]:
            raise ValueError(f"{name}: there is no such block among {depths}")
        below = sum(depths[: stage - 1]) + block + 1
        return below + (stage - 1) * rule.merges_count
    if part == "merge":
        return sum(depths[:stage]) + stage * rule.merges_count
    return top if part == "position" and rule.position_on_top else 0
