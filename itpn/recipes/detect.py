"""Recipes that fine-tune a detector, boxes and masks. A config file calls one; each docstring is its promise.

With `--init` the architecture is the file's, its pyramid's too; the sizes here are those without it. No
average precision has been measured here.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from itpn.data.detection import DetectionDataConfig
from itpn.data.views import MultiScale
from itpn.engine.loop import LoopConfig
from itpn.engine.optim import AdamWConfig
from itpn.engine.schedule import ScheduleConfig
from itpn.errors import UserError
from itpn.heads.detect import DetectorConfig
from itpn.heads.proposals import ProposalConfig
from itpn.heads.regions import RegionConfig
from itpn.heads.towers import HeadConfig
from itpn.nn.depth import LayerDecayConfig
from itpn.nn.hivit import HiViTConfig
from itpn.nn.pyramid import ModelConfig, PyramidConfig
from itpn.recipes.pretrain import Size


@dataclass(frozen=True, kw_only=True)
class Detect:
    name: Annotated[str, tyro.conf.Suppress] = ""
    """Stem of the config file. The run is written to runs/NAME."""
    model: ModelConfig
    """Model to train from scratch. With init, the sizes come from the file, the pyramid's too. Drop path,
    checkpointing and table resampling still apply. Relative positions that are asked for here are added,
    starting at zero."""
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    val_share: float = 0.1
    """Share of the images to hold out if there are no validation images."""
    optim: AdamWConfig = field(default_factory=AdamWConfig)
    layer_decay: LayerDecayConfig = field(default_factory=lambda: LayerDecayConfig(rate=1.0))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(shape="step"))
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")]
    eval_every: int = 1
    """Epochs between evaluations on the validation images, or steps if iterations is given. 0: only at the
    end."""
    eval_batch: int = 4
    """Images per rank and forward pass in evaluations."""
    init: Path | None = None
    """Weights to start from: a run's pretrained.safetensors, or a converted release."""
    init_pyramid: bool = True
    """Load the pyramid of init too. Off: the backbone alone, as for weights pre-trained without a pyramid."""

    def __post_init__(self) -> None:
        if self.model.pyramid is None:
            raise UserError("model.pyramid: a detector needs a pyramid; it must not be none")
        if not 0 < self.val_share < 1:
            raise UserError(f"--val-share: {self.val_share} lies outside (0, 1)")
        if self.eval_every < 0 or self.eval_batch < 1:
            raise UserError("--eval-every must be 0 or more, --eval-batch 1 or more")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of a lying image in evaluation, in whole units."""
        unit = self.model.backbone.patch_size
        scale = self.data.scale
        return -(-scale.eval_short_side // unit) * unit, -(-scale.max_side // unit) * unit


def mask_rcnn(*, pretrained: Literal["pixel", "clip"], size: Size, epochs: Literal[12, 36]) -> Detect:
    """Mask R-CNN on iTPN as the authors train it on COCO: 64 images a step for 12 ("1x") or 36 ("3x") epochs.

    Learning rate 2e-4 (3x: 1.5e-4), a tenth of it after 9 and 11 twelfths of the run; drop path 0.05 for base
    and 0.2 for large, of 3x 0.3; layer decay 0.90 (large 0.95) a block. The released configs differ in this:
    merges count as layers and the last block learns faster than the heads (`--layer-decay.rule detection`);
    the 3x on pixels stops after 12 epochs; after CLIP relative positions start anew, where they are those of
    the file here. Configs of large on pixels 1x and of base on CLIP 1x were not released; 3x of large is
    ours.

    Run: itpn train mask-rcnn_itpn-pixel-base_1x_coco --data.root COCO --init pretrained.safetensors, under
    torchrun; published on 32 GPUs of 2 images each.
    """
    base, long = size == "base", epochs == 36
    return Detect(
        model=_model(pretrained, size, drop_path=0.3 if long else 0.05 if base else 0.2),
        optim=AdamWConfig(lr=1.5e-4 if long else 2e-4, betas=(0.9, 0.999)),
        layer_decay=LayerDecayConfig(rate=0.90 if base else 0.95),
        schedule=_schedule(),
        loop=LoopConfig(epochs=epochs, batch_size=64, picture_every=3),
        eval_every=3 if long else 1,
    )


def cascade_mask_rcnn(*, pretrained: Literal["pixel", "clip"], size: Size) -> Detect:
    """Cascade Mask R-CNN on iTPN as the authors train it on COCO: 36 epochs of 64 images a step.

    Learning rate 1e-4, drop path 0.2, 2000 proposals in training, else as Mask R-CNN. The released config
    after CLIP is no cascade and does not run; large is ours.

    Run: itpn train cascade-mask-rcnn_itpn-pixel-base_3x_coco --data.root COCO --init pretrained.safetensors,
    under torchrun.
    """
    return Detect(
        model=_model(pretrained, size, drop_path=0.2),
        detector=DetectorConfig(
            proposals=ProposalConfig(num_proposals=(2000, 1000), box_beta=1 / 9),
            regions=RegionConfig(cascade=True),
        ),
        optim=AdamWConfig(lr=1e-4, betas=(0.9, 0.999)),
        layer_decay=LayerDecayConfig(rate=0.90 if size == "base" else 0.95),
        schedule=_schedule(),
        loop=LoopConfig(epochs=36, batch_size=64, picture_every=3),
        eval_every=3,
    )


def own_data(*, size: str = "itpn_base", epochs: int = 24) -> Detect:
    """A start for images and a COCO instances file of your own: 16 images a step, layer decay 0.9 a block.

    Classes and their names are the file's. Images to validate on are named by --data.val-images DIR
    --data.val-annotations FILE; without them a tenth is held out. Norms of the box head go over groups of
    channels, so that any number of images and ranks will do.

    Run: itpn train detect_own-data --data.train-images DIR --data.train-annotations FILE --init
    runs/NAME/pretrained.safetensors.
    Expect: no published number; compare with the same command without --init.
    """
    return Detect(
        model=ModelConfig(backbone=HiViTConfig(size=size, drop_path=0.1, checkpointing=True)),
        detector=DetectorConfig(regions=RegionConfig(head=HeadConfig(norm="group"))),
        data=DetectionDataConfig(root=Path("data/objects")),
        optim=AdamWConfig(lr=1e-4, betas=(0.9, 0.999)),
        layer_decay=LayerDecayConfig(rate=0.9),
        schedule=ScheduleConfig(shape="step", warmup_epochs=1),
        loop=LoopConfig(epochs=epochs, batch_size=16, picture_every=4),
        eval_every=2,
    )


def demo(*, epochs: int = 8) -> Detect:
    """A nano iTPN with narrow heads on the bundled scenes, for two CPU cores: where things are, not what they
    are, since the 18 classes take longer to learn.

    Run: itpn sample-data data/sample and itpn train detect_demo --init PRETRAINED.
    Expect: 12 % box AP and 8 % mask AP (from `pixel-s0` of tools/study_sample.py, in bf16).
    """
    return Detect(
        model=ModelConfig(
            backbone=HiViTConfig(size="itpn_nano", image_size=96), pyramid=PyramidConfig(width=96, depth=1)
        ),
        detector=DetectorConfig(
            proposals=ProposalConfig(
                anchor_scale=4.0, num_sampled=128, num_before_nms=(100, 100), num_proposals=(60, 60)
            ),
            regions=RegionConfig(
                num_sampled=32, head=HeadConfig(norm="group", num_convs=2, conv_width=64, hidden_width=256)
            ),
        ),
        data=DetectionDataConfig(
            root=Path("data/sample/coco"),
            single_class=True,
            scale=MultiScale(
                short_sides=(128,), max_side=160, crop=0.0, eval_short_side=128, num_short_sides=1
            ),
            mask_size=56,
        ),
        optim=AdamWConfig(lr=1e-3, betas=(0.9, 0.999)),
        schedule=ScheduleConfig(warmup_epochs=1),
        loop=LoopConfig(epochs=epochs, batch_size=8, picture_every=2),
        eval_every=2,
    )  # fmt: skip


def _model(pretrained: Literal["pixel", "clip"], size: Size, drop_path: float) -> ModelConfig:
    pixel = pretrained == "pixel"
    backbone = HiViTConfig(
        size=f"itpn_{size}",
        relative_position_bias=not pixel,
        layer_scale=None if pixel else 0.1,
        position="sincos-column" if pixel else "normal",
        drop_path=drop_path,
        checkpointing=True,
    )
    return ModelConfig(backbone=backbone, pyramid=PyramidConfig(depth=2 if pixel else 1))


def _schedule() -> ScheduleConfig:
    return ScheduleConfig(shape="step", warmup_iterations=500, start_factor=0.001)
