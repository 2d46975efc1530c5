"""``import itpn.timm`` registers the models with timm, for ``timm.create_model("itpn_base")``.

Beside timm's own arguments they take ``weights=``, a file of ours or whatever else `itpn.load` takes, and
``features="pyramid"``, which gives the pyramid's maps in place of the stages'.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from itpn import models
from itpn.data.transforms import CROP_RATIO, crop_ratio_of
from itpn.data.views import MultiScale
from itpn.errors import UserError
from itpn.heads.classify import Classifier, ClassifierConfig
from itpn.nn.hivit import SIZES, Features, HiViT
from itpn.nn.layers import to_map
from itpn.nn.pyramid import ModelConfig, Pyramid
from itpn.weights import loading
from itpn.weights.files import Weights, structured


class TimmModel(Classifier):
    """A classifier with the methods and attributes that timm's models have.

    Args:
        cfg: the size, a row of `itpn.nn.hivit.SIZES`.
        img_size: pixels per side that position tables are made for, or resampled to; images of any size are
            taken either way.
        num_classes: 0 for no head.
        global_pool: ``"avg"`` for the pooling of the weights' classifier, or ``""`` for none.
        drop_rate: dropout of the pooled features.
        in_chans, drop_path_rate: channels of an image, drop path of the last block; None: the weights'.
        weights: a file of this size; a classifier's head is taken if it has as many classes.
        features: what `forward_intermediates` gives, and so ``features_only``. A classifier's logits do not
            come from the pyramid: trained as one, its parameters get no gradient.

    Raises:
        UserError: weights without the pyramid asked for, or that do not fit.
    """

    head: nn.Module  # type: ignore[assignment]  # none for 0 classes

    def __init__(
        self,
        cfg: str,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int | None = None,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        weights: Weights | None = None,
        features: Literal["stages", "pyramid"] = "stages",
    ) -> None:
        config = weights.part("model", ModelConfig) if weights else models.config_of(cfg)
        changed: dict[str, Any] = {"image_size": _side(img_size)} if img_size else {}
        changed |= {"in_channels": in_chans} if in_chans is not None else {}
        changed |= {"drop_path": drop_path_rate} if drop_path_rate is not None else {}
        backbone = replace(config.backbone, **changed)
        head = ClassifierConfig(num_classes=num_classes or 1)
        if weights and "classifier" in weights.config:
            head = replace(head, pooling=weights.part("classifier", ClassifierConfig).pooling)
        super().__init__(HiViT(backbone), head)
        width, patch_size = backbone.shape.width, backbone.patch_size
        self.pyramid = None
        channels, names = [width // 4, width // 2, width], [f"backbone.stage{i}" for i in (1, 2, 3)]
        if features == "pyramid":
            if config.pyramid is None:
                raise UserError(f'{weights and weights.path} holds no pyramid; leave features="pyramid" out')
            self.pyramid = Pyramid(width, config.pyramid)
            channels, names = [config.pyramid.width] * 3, [f"pyramid.out{i}" for i in (4, 8, 16)]
        elif features != "stages":
            raise UserError(f"features: {features!r} is not stages or pyramid")
        self.feature_info = [
            {"num_chs": channels[i], "reduction": patch_size * 2**i // 4, "module": names[i]}
            for i in range(3)
        ]
        self.num_stages = 3
        self.in_chans, self.drop_rate = backbone.in_channels, drop_rate
        self.embed_dim = self.num_features = self.head_hidden_size = width
        self.num_classes, self.global_pool = num_classes, _pool(global_pool)
        if num_classes == 0:
            self.head = nn.Identity()
        if weights:
            self._load(weights)

    def _load(self, weights: Weights) -> None:
        taken = {"backbone", "pyramid"} if self.pyramid else {"backbone"}
        if "classifier" in weights.config:
            same = weights.part("classifier", ClassifierConfig).num_classes == self.num_classes
            taken |= {"norm", "head"} if same else {"norm"}
        for part in weights.parts - taken:
            weights = weights.without(part)
        weights = loading.resampled(weights, self.backbone.config)
        fresh = {name: own for name, own in self.state_dict().items() if name.split(".")[0] not in taken}
        loading.load_exactly(self, replace(weights, tensors=fresh | weights.tensors))

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]  # timm's signature
        """Normalised images ``[B, c, H, W]`` to logits ``[B, classes]``, or what `forward_head` gives."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The last stage's output as tokens ``[B, N, C]``, before the head's norm."""
        return _tokens(self._stages(images, self.num_stages)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens ``[B, N, C]`` to logits ``[B, classes]``, or to what the head's linear layer sees."""
        x = self.pool(x) if self.global_pool else self.norm(x)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else cast(Tensor, self.head(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stages or levels, and before them what `forward_features` gives.

        Args:
            indices: numbers of stages or levels, an int for the last so many, None for all.
            norm: put the head's norm on stage 3's map, the only one that it fits.
            stop_early: leave stage 3 out if no map needs it; the features are then an earlier stage's.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: return the maps alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise UserError(f"output_fmt: {output_fmt!r} is not NCHW or NHWC")
        taken = _numbers(indices)
        last = max(taken)
        grid = self.backbone.grid_of(x)
        stages = self._stages(x, last + 1 if stop_early and self.pyramid is None else self.num_stages)
        maps = list(self.pyramid(Features(*stages)) if self.pyramid else stages)
        if norm and self.pyramid is None and len(maps) == 3:
            maps[2] = self.norm(maps[2])
        intermediates = [to_map(maps[i], grid) for i in taken]
        if output_fmt == "NHWC":
            intermediates = [level.permute(0, 2, 3, 1) for level in intermediates]
        return intermediates if intermediates_only else (_tokens(stages[-1]), intermediates)

    def _stages(self, images: Tensor, num: int) -> Sequence[Tensor]:
        if num == 3:
            features: Features = self.backbone(images)
            return features
        early, drop = [*self.backbone.stage1, *self.backbone.stage2], None
        if self.training and self.backbone.config.drop_path:
            drop = torch.rand(len(images), len(early), device=images.device)
        c4, c8, _ = self.backbone.local(self.backbone.stem(images), drop)
        return (c4, c8)[:num]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what comes after the last of the maps asked for; a pyramid needs all stages and keeps them.

        Returns:
            ``indices`` as numbers from 0.
        """
        taken = _numbers(indices)
        last = max(taken)
        shortened = self.pyramid is None and last < 2
        if shortened:
            self.num_stages = last + 1
            self.num_features = self.head_hidden_size = self.backbone.config.shape.width // 2 ** (2 - last)
            self.backbone.stage3, self.backbone.merge2 = nn.ModuleList(), cast(Any, nn.Identity())
            self.backbone.register_parameter("position", None)
            if last < 1:
                self.backbone.stage2, self.backbone.merge1 = nn.ModuleList(), cast(Any, nn.Identity())
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for so many classes, none for 0; ``global_pool`` None leaves the pooling as it is."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = _pool(global_pool)
        self.head = nn.Identity()
        if num_classes:
            like = self.backbone.stem_proj.weight
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.normal_(self.head.weight, std=2e-5)
            nn.init.zeros_(self.head.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        self.backbone.config = replace(self.backbone.config, checkpointing=enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the position tables."""
        return {name for name, _ in self.named_parameters() if "position" in name}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's optimisers: the stem with the positions, each block, head and pyramid. A merge
        counts with the block before it, as in the authors' layer decay. ``coarse``: stages, not blocks."""
        with_previous = (99999,)
        blocks = [(r"^backbone\.stage(\d)\.(\d+)", None), (r"^backbone\.merge(\d)", with_previous)]
        return {
            "stem": r"^backbone\.(?:stem|position)",
            "blocks": r"^backbone\.(?:stage|merge)(\d)" if coarse else blocks,
        }


def _numbers(indices: int | Sequence[int] | None) -> list[int]:
    """Of the three maps, as numbers from 0."""
    try:
        taken, _ = feature_take_indices(3, indices if isinstance(indices, int | None) else list(indices))
    except AssertionError as error:
        raise UserError(f"indices or out_indices: {indices} of 3 maps ({error})") from error
    return list(taken)


def _side(img_size: int | tuple[int, int]) -> int:
    if isinstance(img_size, int):
        return img_size
    if img_size[0] != img_size[1]:
        raise UserError(
            f"img_size: tables are made for a square, not {img_size[0]} x {img_size[1]}; leave it out "
            "or give one number, images of any size are taken"
        )
    return img_size[0]


def _pool(name: str) -> str:
    if name not in ("avg", ""):
        raise UserError(f"global_pool: {name!r} is not avg or empty")
    return name


def _tokens(cells: Tensor) -> Tensor:
    return cells.flatten(1, -2)


default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 224, 224),
            "num_classes": 1000,
            "interpolation": "bicubic",
            "crop_pct": CROP_RATIO,
            "mean": models.MEAN,
            "std": models.STD,
            "first_conv": "backbone.stem_proj",
            "classifier": "head",
            "paper_ids": "arXiv:2211.12735",
            "paper_name": "Integrally Pre-Trained Transformer Pyramid Networks",
        }
        for name in SIZES
    }
)


def _told(weights: Weights, img_size: int | tuple[int, int] | None) -> dict[str, Any]:
    """Say in timm's words how evaluations of a file prepare images, and how many classes it tells apart.

    Detectors and segmenters see all of an image, scaled by its shorter side; timm cuts out the middle.
    """
    backbone = weights.part("model", ModelConfig).backbone
    channels, short = backbone.in_channels, _short_side(weights)
    side = short // backbone.patch_size * backbone.patch_size if short else backbone.image_size
    size = (_side(img_size),) * 2 if img_size else weights.input_size() or (side, side)
    mean, std = weights.statistics(models.MEAN, models.STD)
    classifier = "classifier" in weights.config and weights.part("classifier", ClassifierConfig)
    return {
        "input_size": (channels, *size),
        "crop_pct": min(1.0, min(size) / short) if short else crop_ratio_of(size),
        "interpolation": "bilinear" if "segmenter" in weights.config else "bicubic",
        "mean": mean * (channels // len(mean)),  # one number is every channel's
        "std": std * (channels // len(std)),
        "num_classes": classifier.num_classes if classifier else 0,
    }


def _short_side(weights: Weights) -> int | None:
    """Pixels that a detector or segmenter scales an image's shorter side to; None for other models."""
    if "detector" in weights.config:
        views = (weights.config.get("input") or {}).get("views") or {}
        return structured(views, MultiScale, f"{weights.path}: its views").eval_short_side
    if "segmenter" in weights.config:
        return (weights.scale() or (512, 2048))[0]
    return None


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:  # timm's form, which takes all it knows
        features = {"out_indices": (0, 1, 2), "feature_cls": "getter"}
        if path := kwargs.pop("weights", None):
            weights = kwargs["weights"] = models.read_as(name, path)
            told = _told(weights, kwargs.get("img_size"))
            kwargs["pretrained_cfg_overlay"] = told | (kwargs.get("pretrained_cfg_overlay") or {})
        if kwargs.get("feature_cls", "getter") != "getter":
            raise UserError(f"feature_cls: {kwargs['feature_cls']!r} cannot take these maps; leave it out")
        return build_model_with_cfg(
            TimmModel, name, pretrained, model_cfg=name, feature_cfg=features, **kwargs
        )

    create.__name__ = create.__qualname__ = name
    return register_model(create)


globals().update({name: _entrypoint(name) for name in SIZES})
