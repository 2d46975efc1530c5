"""Recipes that fine-tune for semantic segmentation. A config file calls one; each docstring is its promise.

With `--init` the architecture is the file's, its pyramid included; the sizes here are those without it. The
mIoU are the paper's own on ADE20K; none has been repeated here.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from itpn.data.segmentation import SegmentationDataConfig
from itpn.engine.loop import LoopConfig
from itpn.engine.optim import AdamWConfig
from itpn.engine.schedule import ScheduleConfig
from itpn.errors import UserError
from itpn.heads.upernet import SegmenterConfig
from itpn.heads.windows import InferenceConfig
from itpn.nn.depth import LayerDecayConfig
from itpn.nn.hivit import HiViTConfig
from itpn.nn.pyramid import ModelConfig, PyramidConfig
from itpn.recipes.pretrain import Size


@dataclass(frozen=True, kw_only=True)
class Segment:
    name: Annotated[str, tyro.conf.Suppress] = ""
    """Stem of the config file. The run is written to runs/NAME."""
    model: ModelConfig
    """Model to train from scratch. With init, the sizes come from the file. Drop path, checkpointing and
    table resampling still apply. Relative positions that are asked for here are added, starting at zero."""
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """Inference settings of evaluations and predictions."""
    data: SegmentationDataConfig = field(default_factory=SegmentationDataConfig)
    val_share: float = 0.1
    """Share of the images to hold out if there are no validation images."""
    optim: AdamWConfig = field(default_factory=AdamWConfig)
    layer_decay: LayerDecayConfig = field(default_factory=lambda: LayerDecayConfig(rate=1.0))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")]
    eval_every: int = 1
    """Epochs between evaluations on the validation images, or steps if iterations is given. 0: only at the
    end."""
    init: Path | None = None
    """Weights to start from: a run's pretrained.safetensors, or a converted release."""
    init_pyramid: bool = True
    """Load the pyramid of init too. Off: the backbone alone."""

    def __post_init__(self) -> None:
        if self.model.pyramid is None:
            raise UserError("model.pyramid: segmentation needs a pyramid")
        unit = 2 * self.model.backbone.patch_size
        if any(side % unit for side in self.data.crop):
            raise UserError(
                f"--data.crop {self.data.crop[0]} {self.data.crop[1]}: each side must be a multiple of {unit}"
            )
        if not 0 < self.val_share < 1:
            raise UserError(f"--val-share: {self.val_share} lies outside (0, 1)")
        if self.eval_every < 0:
            raise UserError("--eval-every must be 0 or more")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what training sees of an image."""
        return self.data.crop


def upernet(*, pretrained: Literal["pixel", "clip"], size: Size) -> Segment:
    """UPerNet on iTPN as the authors train it on ADE20K: 160,000 steps of 16 images, crops of 512 pixels.

    Learning rate 3e-5, down in a straight line after 1,500 steps of warm-up; layer decay 0.90 (large 0.95) by
    their rule, drop path 0.1 for base on pixels, else 0.2; layer scale 0.1 after CLIP; the loss over all
    pixels of a crop. Relative positions start at zero where the file has none. Different on purpose: CLIP
    base counts its own layers, where the released config counts those of large; after CLIP the pyramid is as
    deep as it was pre-trained, where the authors' has a second block per level that starts anew.

    Run: itpn train upernet_itpn-base_160k_ade20k-512 --data.root ADEChallengeData2016 --init
    pretrained.safetensors; on one GPU in a day or two.
    Expect: the paper has for base 53.5 mIoU after 1600 epochs on pixels and 54.7 after 800 on CLIP B/16; for
    large 56.1 and, on CLIP L/14, 57.7.
    """
    pixel, base = pretrained == "pixel", size == "base"
    return Segment(
        model=ModelConfig(
            backbone=HiViTConfig(
                size=f"itpn_{size}",
                relative_position_bias=True,
                layer_scale=None if pixel else 0.1,
                position="sincos-column" if pixel else "normal",
                drop_path=0.1 if pixel and base else 0.2,
            ),
            pyramid=PyramidConfig(depth=2 if pixel else 1),
        ),
        segmenter=SegmenterConfig(loss_over="all"),
        optim=AdamWConfig(lr=3e-5, betas=(0.9, 0.999), weight_decay_rule="itpn-pixel"),
        layer_decay=LayerDecayConfig(rate=0.90 if base else 0.95, rule="segmentation"),
        schedule=ScheduleConfig(shape="poly", warmup_iterations=1500, start_factor=1e-6),
        loop=LoopConfig(iterations=160_000, batch_size=16, picture_every=16_000),
        eval_every=16_000,
    )


def own_data(*, size: str = "itpn_base", epochs: int = 100) -> Segment:
    """A start for images and label pictures of your own: 16 crops of 512 pixels a step, layer decay 0.9 a
    block.

    FOLDER has images/train and labels/train, images/val and labels/val, and classes.txt with a name a line;
    without val a tenth is held out. Norms of the head go over groups of channels, so that any number of
    images and ranks will do.

    Run: itpn train segment_own-data --data.root FOLDER --init runs/NAME/pretrained.safetensors.
    Expect: no published number; compare with the same command without --init.
    """
    return Segment(
        model=ModelConfig(backbone=HiViTConfig(size=size, drop_path=0.1)),
        segmenter=SegmenterConfig(norm="group"),
        data=SegmentationDataConfig(root=Path("data/labelled"), format="masks"),
        optim=AdamWConfig(lr=1e-4, betas=(0.9, 0.999)),
        layer_decay=LayerDecayConfig(rate=0.9),
        schedule=ScheduleConfig(shape="poly"),
        loop=LoopConfig(epochs=epochs, batch_size=16, clip_grad=5.0),
        eval_every=10,
    )


def demo(*, epochs: int = 10) -> Segment:
    """A nano iTPN with a narrow head on the bundled scenes, for two CPU cores.

    Run: itpn sample-data data/sample and itpn train segment_demo --init PRETRAINED.
    Expect: 16 % mIoU (from `pixel-s0` of tools/study_sample.py, in bf16); backgrounds come first.
    """
    return Segment(
        model=ModelConfig(
            backbone=HiViTConfig(size="itpn_nano", image_size=96), pyramid=PyramidConfig(width=96, depth=1)
        ),
        segmenter=SegmenterConfig(width=64, auxiliary_width=32, norm="group", dropout=0.0),
        inference=InferenceConfig(mode="whole"),
        data=SegmentationDataConfig(
            root=Path("data/sample/ade20k"), short=128, long=512, ratio=(0.75, 1.5), crop=(128, 128)
        ),
        optim=AdamWConfig(lr=3e-3, betas=(0.9, 0.999)),
        schedule=ScheduleConfig(shape="poly", warmup_epochs=1),
        loop=LoopConfig(epochs=epochs, batch_size=8, picture_every=2),
        eval_every=2,
    )
