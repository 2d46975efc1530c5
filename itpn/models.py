"""Models by name or from a file, in the form that other people's code takes.

Images come in normalised, ``(pixels in 0..1 - MEAN) / STD`` unless the weights were trained otherwise.
"""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from itpn import hub
from itpn.errors import UserError
from itpn.heads.classify import Classifier, ClassifierConfig
from itpn.heads.detect import Detector
from itpn.heads.regions import Detections
from itpn.heads.segment import Segmenter
from itpn.heads.upernet import SegmenterConfig
from itpn.heads.windows import InferenceConfig
from itpn.nn.hivit import SIZES, HiViT, HiViTConfig
from itpn.nn.layers import to_map
from itpn.nn.pyramid import ModelConfig, Pyramid, PyramidConfig, detection_maps
from itpn.objectives.pixel import PixelConfig
from itpn.weights import files, loading
from itpn.weights.files import Weights

Kind = Literal["pyramid", "stages", "tokens"]

MEAN = PixelConfig.mean
STD = PixelConfig.std
"""Mean and standard deviation of each channel, in 0..1: ImageNet's."""


class FeatureModel(nn.Module, hub.HubModel):
    """A backbone that gives maps, with its pyramid where maps of the pyramid are asked for.

    Args:
        features: ``"pyramid"``: maps ``p4``, ``p8``, ``p16`` ``[B, F, h, w]``; ``"stages"``: maps ``c4``,
            ``c8``, ``c16`` ``[B, C/4 … C, h, w]``; ``"tokens"``: stage 3 as ``[B, N, C]``.
        num_levels: 3, or 5 to add ``p32`` and ``p64`` to the pyramid, pooled as for the authors' detectors.

    ``channels`` and ``strides`` belong to the outputs, fine to coarse; ``out_channels`` is the last of the
    channels, and every map's for the pyramid, so that torchvision's detectors take the model as a backbone
    (name the maps to their `MultiScaleRoIAlign`: ``["p4", "p8", "p16", "p32"]``).

    Raises:
        UserError: the config has no pyramid to give maps of.
    """

    def __init__(self, config: ModelConfig, features: Kind = "pyramid", num_levels: int = 3) -> None:
        super().__init__()
        if features not in ("pyramid", "stages", "tokens"):
            raise UserError(f"features: {features!r} is not pyramid, stages or tokens")
        if num_levels != 3 and (features, num_levels) != ("pyramid", 5):
            raise UserError(f"num_levels: {num_levels} {features}; there are 3, or 5 levels of the pyramid")
        if features == "pyramid" and config.pyramid is None:
            raise UserError('this model has no pyramid; ask for features="stages" or features="tokens"')
        self.config = config if features == "pyramid" else replace(config, pyramid=None)
        self.features, self.num_levels = features, num_levels
        width, patch_size = config.backbone.shape.width, config.backbone.patch_size
        self.backbone = HiViT(config.backbone)
        self.pyramid = Pyramid(width, self.config.pyramid) if self.config.pyramid else None
        self.channels: tuple[int, ...] = (width // 4, width // 2, width)
        self.strides: tuple[int, ...] = tuple(patch_size * 2**i // 4 for i in range(num_levels))
        if self.pyramid:
            self.channels = (self.pyramid.config.width,) * num_levels
        elif features == "tokens":
            self.channels, self.strides = (width,), (patch_size,)
        self.out_channels = self.channels[-1]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor] | Tensor:
        """Normalised images ``[B, c, H, W]`` to the maps by name, fine to coarse, or to tokens.

        Raises:
            UserError: a side is not a multiple of the unit (16 pixels), or too short for five levels.
        """
        features, grid = self.backbone(images), self.backbone.grid_of(images)
        if self.features == "tokens":
            tokens: Tensor = features.c16
            return tokens
        if self.pyramid is None:
            return OrderedDict(
                (name, to_map(stage, grid)) for name, stage in zip(features._fields, features, strict=True)
            )
        if min(grid) < 4 and self.num_levels == 5:
            H, W, P = images.shape[2], images.shape[3], self.backbone.config.patch_size
            raise UserError(f"image of {H} x {W} pixels: five levels need {4 * P} pixels per side or more")
        levels = self.pyramid(features)
        if self.num_levels == 5:
            names, maps = ("p4", "p8", "p16", "p32", "p64"), detection_maps(levels, grid)
        else:
            names, maps = levels._fields, [to_map(level, grid) for level in levels]
        return OrderedDict(zip(names, maps, strict=True))

    def file_config(self) -> dict[str, Any]:
        maps = {"features": self.features, "num_levels": self.num_levels}
        return {"model": hub.as_json(self.config), "maps": maps}

    @classmethod
    def from_weights(
        cls,
        weights: Weights,
        features: Kind | None = None,
        num_levels: int | None = None,
        **backbone: Any,
    ) -> Self:
        """The model of a file of ours; ``features`` None: as it was saved, else the pyramid if it has one,
        else the stages. ``num_levels`` None: as it was saved with the same features, else 3.

        Args:
            backbone: fields of `HiViTConfig` other than the file's; position tables are resampled.

        Raises:
            UserError: there is no pyramid, or the fields given need tensors of other shapes.
        """
        config, saved = weights.part("model", ModelConfig), weights.config.get("maps") or {}
        usual: Kind = "pyramid" if config.pyramid else "stages"
        features = features or saved.get("features", usual)
        if num_levels is None:
            num_levels = saved.get("num_levels", 3) if features == saved.get("features") else 3
        if features == "pyramid" and config.pyramid is None:
            raise UserError(
                f'{weights.path} holds no pyramid; ask for features="stages" or features="tokens"'
            )
        config = replace(config, backbone=replace(config.backbone, **backbone))
        model = cls(config, features, num_levels)
        for part in weights.parts - {"backbone", features}:
            weights = weights.without(part)
        loading.load_exactly(model, loading.resampled(weights, config.backbone))
        model.remember(weights)
        if "image_size" in backbone:
            model.input_size = None
        return model.eval()


class ClassifierModel(Classifier, hub.HubModel):
    """A classifier that can be saved, loaded and pushed."""

    classes: tuple[str, ...] | None = None
    """Names by class id; None if they are not known."""

    def remember(self, weights: Weights) -> None:
        super().remember(weights)
        self.classes = weights.class_names()

    def file_config(self) -> dict[str, Any]:
        model = ModelConfig(backbone=self.backbone.config, pyramid=None)
        config = {"model": hub.as_json(model), "classifier": hub.as_json(self.config)}
        return config if self.classes is None else config | {"classes": list(self.classes)}

    @classmethod
    def from_weights(cls, weights: Weights, **backbone: Any) -> Self:
        """The classifier of a file of ours, exactly; for ``backbone`` see `FeatureModel.from_weights`."""
        config = replace(weights.part("model", ModelConfig).backbone, **backbone)
        model = cls(HiViT(config), weights.part("classifier", ClassifierConfig))
        loading.load_exactly(model, loading.resampled(weights, config))
        model.remember(weights)
        if "image_size" in backbone:
            model.input_size = None
        return model.eval()


class DetectorModel(Detector, hub.HubModel):
    """A detector that can be saved, loaded and pushed."""

    classes: tuple[str, ...] | None = None
    """Names by class id; None if they are not known."""
    category_ids: tuple[int, ...] | None = None
    """Ids of the classes in the annotations that it was trained on; None if they are not known."""
    views: dict[str, Any] | None = None
    """How images are scaled and padded before; see `itpn.data.views.MultiScale`."""

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> list[Detections]:
        """What is found in normalised images ``[B, c, H, W]``: see `Detector.detect`.

        Args:
            sizes: ``long [B, 2]``, height and width without padding; None: there is none.
        """
        if sizes is None:
            sizes = torch.tensor([images.shape[2:]] * len(images))
        return self.detect(images, sizes)

    def remember(self, weights: Weights) -> None:
        super().remember(weights)
        self.classes, self.category_ids = weights.class_names(), weights.category_ids()
        self.views = (weights.config.get("input") or {}).get("views")

    def file_config(self) -> dict[str, Any]:
        config = {"model": hub.as_json(self.model.config), "detector": hub.as_json(self.config)}
        known = {"classes": self.classes, "category_ids": self.category_ids}
        return config | {name: list(values) for name, values in known.items() if values is not None}

    def input_config(self) -> dict[str, Any]:
        return super().input_config() | ({} if self.views is None else {"views": self.views})

    @classmethod
    def from_weights(cls, weights: Weights, **backbone: Any) -> Self:
        """The detector of a file of ours, exactly; for ``backbone`` see `FeatureModel.from_weights`."""
        config = weights.part("model", ModelConfig)
        config = replace(config, backbone=replace(config.backbone, **backbone))
        model = cls(config, files.detector_config(weights))
        loading.load_exactly(model, loading.resampled(weights, config.backbone))
        model.remember(weights)
        return model.eval()


class SegmenterModel(Segmenter, hub.HubModel):
    """A segmenter that can be saved, loaded and pushed.

    Args:
        inference: how images are looked at unless a call says otherwise: windows or whole, mirrored, scales.
        scale: pixels that images are scaled to before: the shorter side to the first, as far as the longer
            one stays within the second.
    """

    classes: tuple[str, ...] | None = None
    """Names by class id; None if they are not known."""

    def __init__(
        self,
        config: ModelConfig,
        segmenter: SegmenterConfig,
        inference: InferenceConfig | None = None,
        scale: tuple[int, int] = (512, 2048),
    ) -> None:
        super().__init__(config, segmenter)
        self.inference, self.scale = inference or InferenceConfig(), scale

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``[B, c, H, W]`` of any size to logits ``[B, classes, H, W]``, in one pass."""
        return self.logits_of(images)

    def remember(self, weights: Weights) -> None:
        super().remember(weights)
        self.classes = weights.class_names()

    def file_config(self) -> dict[str, Any]:
        config = {
            "model": hub.as_json(self.model.config),
            "segmenter": hub.as_json(self.config),
            "inference": hub.as_json(self.inference),
        }
        return config if self.classes is None else config | {"classes": list(self.classes)}

    def input_config(self) -> dict[str, Any]:
        return super().input_config() | {"scale": self.scale}

    @classmethod
    def from_weights(cls, weights: Weights, **backbone: Any) -> Self:
        """The segmenter of a file of ours, exactly; for ``backbone`` see `FeatureModel.from_weights`."""
        config = weights.part("model", ModelConfig)
        config = replace(config, backbone=replace(config.backbone, **backbone))
        segmenter = weights.part("segmenter", SegmenterConfig)
        mean, std = weights.statistics(segmenter.mean or MEAN, segmenter.std or STD)
        inference = weights.part("inference", InferenceConfig) if "inference" in weights.config else None
        segmenter = replace(segmenter, mean=mean, std=std)
        model = cls(config, segmenter, inference, weights.scale() or (512, 2048))
        loading.load_exactly(model, loading.resampled(weights, config.backbone))
        model.remember(weights)
        return model.eval()


def load(
    path: str | Path,
    *,
    features: Kind | None = None,
    num_levels: int | None = None,
    image_size: int | None = None,
) -> FeatureModel | ClassifierModel | DetectorModel | SegmenterModel:
    """The model that a file holds, in evaluation mode.

    A classifier, detector or segmenter where the file is one and no ``features`` are asked for; else a
    `FeatureModel`, with its pyramid if the file has one. What only pre-training needs is left out.

    Args:
        path: a .safetensors file of ours, a run directory, a folder of `save_pretrained`, or a Hub id.
        features, num_levels: see `FeatureModel`.
        image_size: pixels per side that position tables are resampled to; None: the file's. Images of any
            size are taken either way.

    Raises:
        UserError: there is no such file, it is none of ours, or a tensor does not fit or is unknown.
    """
    weights = hub.read(path)
    changed = {} if image_size is None else {"image_size": image_size}
    if features is None and "classifier" in weights.config:
        return ClassifierModel.from_weights(weights, **changed)
    if features is None and "regions" in weights.parts:
        return DetectorModel.from_weights(weights, **changed)
    if features is None and "decode_head" in weights.parts:
        return SegmenterModel.from_weights(weights, **changed)
    return FeatureModel.from_weights(weights, features, num_levels, **changed)


def create_model(
    name: str,
    *,
    weights: str | Path | None = None,
    features: Kind = "pyramid",
    num_levels: int = 3,
    image_size: int | None = None,
    in_channels: int | None = None,
    drop_path: float | None = None,
    checkpointing: bool = False,
) -> FeatureModel:
    """A model by the name of its size, in training mode, freshly initialised or with weights.

    Args:
        name: a row of `itpn.nn.hivit.SIZES`, such as ``itpn_base`` or ``fast_itpn_small``.
        weights: what `load` takes; the architecture is then the file's, and must be of the size named.
        features, num_levels: see `FeatureModel`.
        image_size, in_channels, drop_path, checkpointing: see `HiViTConfig`; None: the file's, or 224, 3, 0.

    Raises:
        UserError: there is no such size, or the file is of another one; and whatever `load` raises.
    """
    given = {"image_size": image_size, "in_channels": in_channels, "drop_path": drop_path}
    changed: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    changed["checkpointing"] = checkpointing
    if weights is None:
        config = config_of(name)
        backbone = replace(config.backbone, **changed)
        return FeatureModel(replace(config, backbone=backbone), features, num_levels)
    read = read_as(name, weights)
    return FeatureModel.from_weights(read, features, num_levels, **changed).train()


def config_of(name: str) -> ModelConfig:
    """The authors' model of a size: pixel iTPN has no relative positions and no layer scale, Fast-iTPN a
    layer scale of 0.1 and a pyramid of its own kind."""
    if name not in SIZES:
        raise UserError(f"there is no model {name!r}; choose one of {', '.join(SIZES)}")
    if SIZES[name].layers != "fast":
        return ModelConfig(backbone=HiViTConfig(size=name))
    pyramid = PyramidConfig(layers="fast", depth=1, mlp_ratio=8 / 3)
    return ModelConfig(backbone=HiViTConfig(size=name, layer_scale=0.1), pyramid=pyramid)


def read_as(name: str, path: str | Path) -> Weights:
    """The weights of a file, which must be of the size named."""
    config_of(name)
    weights = hub.read(path)
    held = weights.part("model", ModelConfig).backbone
    if held.shape != SIZES[name]:
        raise UserError(f"{name} was asked for, but {weights.path} holds {held.label}; itpn.load takes any")
    return weights
