"""Recipes that fine-tune a classifier. A config file calls one; each docstring is its promise.

With `--init` the architecture is the file's; the sizes here are those without it. Accuracies are the papers'
own on ImageNet-1K; none has been repeated here.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from itpn.data.loader import DataConfig
from itpn.engine.loop import LoopConfig
from itpn.engine.optim import AdamWConfig
from itpn.engine.schedule import ScheduleConfig
from itpn.errors import UserError
from itpn.heads.classify import ClassifierConfig
from itpn.heads.finetune import FinetuneConfig
from itpn.heads.mixing import MixConfig
from itpn.nn.depth import LayerDecayConfig
from itpn.nn.hivit import HiViTConfig
from itpn.nn.pyramid import ModelConfig
from itpn.recipes.pretrain import Size

RANDAUGMENT = "rand-m9-mstd0.5-inc1"
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Classify:
    name: Annotated[str, tyro.conf.Suppress] = ""
    """Stem of the config file. The run is written to runs/NAME."""
    model: ModelConfig
    """Model to train from scratch. With init, the sizes come from the file. Drop path, checkpointing and
    table resampling still apply. Relative positions that are asked for here are added, starting at zero."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width of the images, multiples of the unit (16 pixels)."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    val_share: float = 0.1
    """Share of the images to hold out for validation if there is no folder val."""
    optim: AdamWConfig = field(default_factory=AdamWConfig)
    layer_decay: LayerDecayConfig = field(default_factory=lambda: LayerDecayConfig(rate=1.0))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")]
    eval_every: int = 1
    """Epochs between evaluations on the validation images. 0: only at the end."""
    eval_batch: int = 64
    """Images per rank and forward pass in evaluations."""
    init: Path | None = None
    """Weights to start from: a run's pretrained.safetensors, or a converted release."""

    def __post_init__(self) -> None:
        patch_size = self.model.backbone.patch_size
        if any(side < patch_size or side % patch_size for side in self.image_size):
            raise UserError(
                f"--image-size {self.image_size[0]} {self.image_size[1]}: height and width must be multiples "
                f"of the unit of {patch_size} pixels"
            )
        if not 0 < self.val_share < 1:
            raise UserError(f"--val-share: {self.val_share} lies outside (0, 1)")
        if self.eval_every < 0 or self.eval_batch < 1:
            raise UserError("--eval-every must be 0 or more, --eval-batch 1 or more")


def itpn_pixel(*, size: Size) -> Classify:
    """iTPN after pre-training on pixels, as the authors: base 100 epochs, large 50.

    Layer decay 0.60 (large 0.55) by their rule, drop path 0.15 (0.2), relative positions that start at zero.

    Run: itpn train itpn-pixel-base_100e_in1k --data.root IMAGENET --init pretrained.safetensors.
    Expect: the paper has 85.1 % top-1 for base after 400 epochs of pre-training and 85.5 % after 1600, large
    86.3 % and 86.7 %.
    """
    base = size == "base"
    return _fine_tuning(
        HiViTConfig(size=f"itpn_{size}", relative_position_bias=True, drop_path=0.15 if base else 0.2),
        epochs=100 if base else 50,
        optim=AdamWConfig(base_lr=4e-4 if base else 1e-3, betas=(0.9, 0.999)),
        layer_decay=LayerDecayConfig(rate=0.60 if base else 0.55, rule="itpn"),
        schedule=ScheduleConfig(warmup_epochs=5, min_lr=5e-6),
    )


def itpn_clip(*, size: Size) -> Classify:
    """iTPN after pre-training on CLIP, as the authors: base 100 epochs, large 50.

    Absolute learning rates 5e-4 and 2e-4; images normalised by 0.5 as in that pre-training. The batch is what
    the released commands most likely mean, 1024 and 512.

    Run: itpn train itpn-clip-base_100e_in1k --data.root IMAGENET --init pretrained.safetensors.
    Expect: the paper has 86.2 % top-1 for base on B/16 after 800 epochs of pre-training, and 87.8 % for large
    on L/14.
    """
    base = size == "base"
    recipe = _fine_tuning(
        HiViTConfig(
            size=f"itpn_{size}", relative_position_bias=True, layer_scale=0.1,
            position="normal", drop_path=0.1 if base else 0.25,
        ),
        epochs=100 if base else 50,
        batch_size=1024 if base else 512,
        optim=AdamWConfig(lr=5e-4 if base else 2e-4, betas=(0.9, 0.999)),
        layer_decay=LayerDecayConfig(rate=0.60 if base else 0.55, rule="itpn"),
        schedule=ScheduleConfig(warmup_epochs=20 if base else 5, min_lr=1e-6),
    )  # fmt: skip
    finetune = replace(recipe.finetune, mean=HALF, std=HALF)
    return replace(recipe, finetune=finetune, classifier=ClassifierConfig(init_std=0.02))


def fast_itpn(*, size: Literal["tiny", "small", "base", "large"], image_size: int = 224) -> Classify:
    """Fast-iTPN as the authors: tiny and small 100 epochs, base and large 20; a moving average is evaluated.

    Large sees 640 pixels and 512 images a step. Sizes above 224 start from a model pre-trained at 224, whose
    position table is resampled.

    Run: itpn train fast-itpn-base_20e_in1k --data.root IMAGENET --init pretrained.safetensors.
    Expect: the paper has 85.1 % top-1 for tiny, 86.4 % for small, 87.4 % for base (88.5 % at 512 pixels), and
    89.5 % for large at 640.
    """
    rate = {"tiny": 0.80, "small": 0.90, "base": 0.90, "large": 0.95}[size]
    long, large = size in ("tiny", "small"), size == "large"
    recipe = _fine_tuning(
        HiViTConfig(
            size=f"fast_itpn_{size}", image_size=image_size, layer_scale=0.1, position="normal",
            drop_path=0.2 if large else 0.1,
        ),
        image_size=image_size,
        epochs=100 if long else 20,
        batch_size=512 if large else 1024,
        optim=AdamWConfig(lr=5e-5 if large else 1e-4, betas=(0.9, 0.999)),
        layer_decay=LayerDecayConfig(rate=rate, rule="fast"),
        schedule=ScheduleConfig(warmup_epochs=5 if long else 3, min_lr=1e-6),
    )  # fmt: skip
    finetune = replace(recipe.finetune, average=0.9999)
    return replace(recipe, finetune=finetune, classifier=ClassifierConfig(init_std=2e-4))


def hivit(*, size: Literal["tiny", "small", "base"]) -> Classify:
    """HiViT from scratch, 300 epochs, as in mmpretrain: 19.18 M and 4.60 GMAC, 37.53 M and 9.07, 79.05 M and
    18.47.

    Relative positions beside the table; the mean of the tokens goes straight into the linear layer.

    Run: itpn train hivit-tiny_300e_in1k --data.root IMAGENET.
    Expect: mmpretrain's README has 82.1 % top-1 for tiny, and no number for the others.
    """
    drop_path = {"tiny": 0.05, "small": 0.3, "base": 0.5}[size]
    recipe = _fine_tuning(
        HiViTConfig(
            size=f"hivit_{size}", relative_position_bias=True, norm_eps=1e-5, position="normal",
            drop_path=drop_path,
        ),
        epochs=300,
        optim=AdamWConfig(lr=1e-3, betas=(0.9, 0.999)),
        layer_decay=LayerDecayConfig(rate=1.0),
        schedule=ScheduleConfig(warmup_epochs=20, start_factor=1e-3, min_lr=1e-5),
        clip_grad=5.0,
    )  # fmt: skip
    return replace(recipe, classifier=ClassifierConfig(pooling="mean", init_std=0.02))


def own_data(*, size: str = "itpn_base", epochs: int = 50) -> Classify:
    """A start for class folders of your own: 128 images a step, mild mixing, layer decay 0.8 a block.

    Without a folder val a tenth of the images is held out. A tenth of the epochs warms up.

    Run: itpn train classify_own-data --data.root FOLDER --init runs/NAME/pretrained.safetensors.
    Expect: no published number; compare with the same command without --init.
    """
    return Classify(
        model=ModelConfig(backbone=HiViTConfig(size=size, drop_path=0.1), pyramid=None),
        finetune=FinetuneConfig(mix=MixConfig(mixup=0.2, cutmix=0.5, erasing=0.1)),
        data=DataConfig(root=Path("data/images"), min_scale=0.2, randaugment="rand-m5-mstd0.5-inc1"),
        optim=AdamWConfig(base_lr=1e-3, betas=(0.9, 0.999)),
        layer_decay=LayerDecayConfig(rate=0.8),
        schedule=ScheduleConfig(min_lr=1e-6),
        loop=LoopConfig(epochs=epochs, batch_size=128, clip_grad=5.0),
    )


def demo(*, epochs: int = 4) -> Classify:
    """A nano iTPN on the bundled sample, for two CPU cores.

    Run: make demo, or itpn sample-data data/sample and itpn train classify_demo --init PRETRAINED.
    Expect: from the bundled weights twice as many right answers as from scratch.
    """
    return Classify(
        model=ModelConfig(backbone=HiViTConfig(size="itpn_nano", image_size=96), pyramid=None),
        image_size=(96, 96),
        finetune=FinetuneConfig(mix=MixConfig(mixup=0.0, cutmix=0.0, erasing=0.0)),
        data=DataConfig(root=Path("data/sample/imagefolder"), min_scale=0.35),
        optim=AdamWConfig(lr=1e-3, betas=(0.9, 0.999)),
        layer_decay=LayerDecayConfig(rate=0.8),
        schedule=ScheduleConfig(min_lr=1e-6),
        loop=LoopConfig(epochs=epochs, batch_size=64),
    )


def _fine_tuning(
    backbone: HiViTConfig,
    *,
    epochs: int,
    optim: AdamWConfig,
    layer_decay: LayerDecayConfig,
    schedule: ScheduleConfig,
    batch_size: int = 1024,
    image_size: int = 224,
    clip_grad: float | None = None,
) -> Classify:
    """What all published recipes share: RandAugment, erasing, Mixup or CutMix, smoothed labels."""
    return Classify(
        model=ModelConfig(backbone=backbone, pyramid=None),
        image_size=(image_size, image_size),
        data=DataConfig(min_scale=0.08, randaugment=RANDAUGMENT),
        optim=optim,
        layer_decay=layer_decay,
        schedule=schedule,
        loop=LoopConfig(epochs=epochs, batch_size=batch_size, clip_grad=clip_grad),
    )
