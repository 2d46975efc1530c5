"""AdamW and the rules for what it decays."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from itpn.errors import UserError

WeightDecayRule = Literal[
    "sound",
    "itpn-pixel",
    "itpn-clip",
    "mmpretrain-pixel-base",
    "mmpretrain-pixel-large",
    "mmpretrain-clip",
]


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    base_lr: float = 1.5e-4
    """Peak learning rate per 256 images of the global batch."""
    lr: float | None = None
    """Peak learning rate itself. If given, base_lr is not used."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Term added to the denominator."""
    weight_decay: float = 0.05
    """Decoupled weight decay of all parameters that weight_decay_rule does not exempt."""
    weight_decay_rule: WeightDecayRule = "sound"
    """Parameters that are exempt from weight decay. sound: vectors, position tables, relative-position tables
    and tokens, as in all of the authors' fine-tuning. The other rules are as published. itpn-pixel
    (pre-training on pixels, segmentation): vectors alone, without tokens. itpn-clip (pre-training on CLIP,
    detection): position tables too. The mmpretrain rules match parts of names, so some norms or biases are
    decayed."""

    def peak_lr(self, batch_size: int) -> float:
        return self.base_lr * batch_size / 256 if self.lr is None else self.lr


class _Exempt(NamedTuple):
    """What has no weight decay."""

    vectors: bool
    """Whether parameters of fewer than two dimensions are exempt, but for tokens."""
    names: str | None = None
    """A regular expression: names in which it is found are exempt."""


_EXEMPT: dict[WeightDecayRule, _Exempt] = {
    "sound": _Exempt(True, r"(relative_position[^.]*|position|_token)$"),
    "itpn-pixel": _Exempt(True),
    "itpn-clip": _Exempt(True, r"(?<!relative_)position$"),
    "mmpretrain-pixel-base": _Exempt(False, r"(bias|position|_token)$|^(?!.*\b(decoder|embed)\.).*norm"),
    "mmpretrain-pixel-large": _Exempt(False, r"(bias|position|_token)$|\bdecoder\..*norm"),
    "mmpretrain-clip": _Exempt(False, r"((?<!relative_)position|gamma)$|^(?!.*\bembed\.).*norm"),
}
_KNOWN = re.compile(r"(weight|position|_token|relative_position[^.]*)$")


def parameter_groups(
    model: nn.Module, config: AdamWConfig, lr_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Every trainable parameter in one group, with others of its weight decay and scale; frozen ones in none.

    Args:
        lr_scales: for every trainable parameter by name, what its learning rate is multiplied by. Groups then
            have it as ``lr_scale``, for whoever sets their ``lr``.

    Raises:
        UserError: a parameter's name does not tell what it is, or nothing is trainable.
        KeyError: a trainable parameter has no scale.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    unknown = [name for name, parameter in trained if parameter.ndim > 1 and not _KNOWN.search(name)]
    if unknown:
        raise UserError(
            f"no optimiser group for {', '.join(unknown)}: a parameter of two or more dimensions needs "
            "a name that decides its decay: …weight, …position, …_token or …relative_position…"
        )
    if not trained:
        raise UserError("the model has no trainable parameter: unfreeze a part of it")
    groups = defaultdict(list)
    for name, parameter in trained:
        exempt = _is_exempt(name, parameter.ndim, config.weight_decay_rule)
        groups[1.0 if lr_scales is None else lr_scales[name], exempt].append((name, parameter))
    return [
        {"params": groups[scale, exempt], "weight_decay": 0.0 if exempt else config.weight_decay}
        | ({} if lr_scales is None else {"lr_scale": scale})
        for scale, exempt in sorted(groups)
    ]


def _is_exempt(name: str, dimensions: int, rule: WeightDecayRule) -> bool:
    vectors, names = _EXEMPT[rule]
    if vectors and dimensions <= 1 and not name.endswith("_token"):
        return True
    return names is not None and re.search(names, name) is not None


def adamw(
    model: nn.Module, config: AdamWConfig, lr_scales: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """The learning rate is set by the loop before every step; ``lr_scales`` as in `parameter_groups`."""
    groups = parameter_groups(model, config, lr_scales)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
