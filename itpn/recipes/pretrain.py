"""Pre-training recipes. A config file calls one; each docstring is its promise.

Multiply-adds count the backbone alone, unmasked, at 224 pixels (`itpn info`). Accuracies are the papers' own,
after fine-tuning on ImageNet-1K; nothing here has been trained to them yet.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from itpn.data.loader import DataConfig
from itpn.engine.loop import LoopConfig
from itpn.engine.optim import AdamWConfig
from itpn.engine.schedule import ScheduleConfig
from itpn.evaluate.knn import KnnConfig
from itpn.nn.hivit import HiViTConfig
from itpn.nn.pyramid import ModelConfig, PyramidConfig
from itpn.objectives.decoder import DecoderConfig
from itpn.objectives.distill import DistillConfig
from itpn.objectives.features import FeaturesConfig
from itpn.objectives.pixel import PixelConfig

Size = Literal["base", "large"]


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    name: Annotated[str, tyro.conf.Suppress] = ""
    """Stem of the config file. The run is written to runs/NAME."""
    model: ModelConfig
    objective: PixelConfig | DistillConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: AdamWConfig = field(default_factory=AdamWConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")]
    knn: KnnConfig = field(default_factory=KnnConfig)
    init: Path | None = None
    """Weights to start from: a run's pretrained.safetensors, or a checkpoint's model.safetensors."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        side = self.model.backbone.image_size
        return side, side


def mmpretrain_pixel(*, size: Size, epochs: int, feature_weight: float = 0.0) -> Pretrain:
    """iTPN on pixels as in mmpretrain: 102.68 M and 18.47 GMAC, large 314.25 M and 63.98 GMAC.

    4 + 4 early blocks, a decoder of depth 6, frozen position tables, Xavier start of pyramid and decoder.
    Weight decay follows our one rule (no vector, table or token); mmpretrain's depends on a layer's name.

    Run: itpn train itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k --data.root IMAGENET.
    Expect: mmpretrain publishes neither weights nor accuracies; the paper's own sizes are `itpn_pixel`.
    """
    return Pretrain(
        model=ModelConfig(
            backbone=_mmpretrain_backbone(size),
            pyramid=PyramidConfig(init="xavier"),
        ),
        objective=PixelConfig(decoder=_mmpretrain_decoder(), features=FeaturesConfig(weight=feature_weight)),
        schedule=ScheduleConfig(warmup_epochs=40, start_factor=1e-4),
        loop=LoopConfig(epochs=epochs, batch_size=8 * 512),
    )


def itpn_pixel(*, size: Size, epochs: int, feature_weight: float = 0.0) -> Pretrain:
    """iTPN on pixels in the authors' sizes: 108.49 M and 17.85 GMAC, large 318.34 M and 61.19 GMAC.

    3 + 3 early blocks (large 2 + 2), a decoder of depth 8, a trainable position table that starts sin-cos.

    Run: itpn train itpn-pixel_itpn-base-p16_64xb64-amp-coslr-1600e_in1k --data.root IMAGENET.
    Expect: the paper has 85.1 % top-1 after 400 epochs and 85.5 % after 1600, large 86.3 % and 86.7 %.
    """
    return Pretrain(
        model=ModelConfig(backbone=HiViTConfig(size=f"itpn_{size}")),
        objective=PixelConfig(features=FeaturesConfig(weight=feature_weight)),
        schedule=ScheduleConfig(warmup_epochs=40),
        loop=LoopConfig(epochs=epochs, batch_size=64 * 64),
    )


def mae(*, size: Size, epochs: int) -> Pretrain:
    """The paper's baseline, MAE on HiViT: 98.07 M and 18.47 GMAC, large 309.40 M and 63.98 GMAC.

    No pyramid. As in mmpretrain, but for the weight decay (see `mmpretrain_pixel`) and a frozen position of a
    class token, 512 numbers, that its decoder holds and these models have no use for.

    Run: itpn train mae_hivit-base-p16_8xb512-amp-coslr-800e_in1k --data.root IMAGENET.
    Expect: the paper has 84.2 % top-1 for its HiViT-B after 800 epochs and 86.1 % for its HiViT-L after 1600.
    """
    return Pretrain(
        model=ModelConfig(backbone=_mmpretrain_backbone(size), pyramid=None),
        objective=PixelConfig(decoder=_mmpretrain_decoder()),
        schedule=ScheduleConfig(warmup_epochs=40, start_factor=1e-4),
        loop=LoopConfig(epochs=epochs, batch_size=8 * 512),
    )


def own_data(*, size: str = "itpn_base", epochs: int = 400) -> Pretrain:
    """A start for a folder of your own images: pixels and features, 256 images a step, as few as one GPU.

    A tenth of the epochs warms up. Fewer images want a smaller size and more epochs.

    Run: itpn train pretrain_own-data --data.root FOLDER [--epochs 800] [--model.backbone.size hivit_small].
    Expect: no published number; watch the pictures, and k-NN (--knn.every 20) where there are class folders.
    """
    return Pretrain(
        model=ModelConfig(backbone=HiViTConfig(size=size)),
        objective=PixelConfig(features=FeaturesConfig(weight=0.3)),
        data=DataConfig(root=Path("data/images")),
        schedule=ScheduleConfig(),
        loop=LoopConfig(epochs=epochs, batch_size=256),
    )


def demo(*, epochs: int = 15, feature_weight: float = 0.3) -> Pretrain:
    """A nano iTPN on the bundled sample, for two CPU cores.

    Run: make demo, or itpn sample-data data/sample and itpn train pretrain_demo.
    Expect: reconstructions with the right colours and rough shapes; k-NN is a monitor, not a result.
    """
    return Pretrain(
        model=ModelConfig(
            backbone=HiViTConfig(size="itpn_nano", image_size=96),
            pyramid=PyramidConfig(width=96, depth=1),
        ),
        objective=PixelConfig(
            decoder=DecoderConfig(width=128, depth=2, num_heads=4),
            features=FeaturesConfig(weight=feature_weight, momentum_warmup=True),
        ),
        data=DataConfig(root=Path("data/sample/imagefolder")),
        optim=AdamWConfig(base_lr=4e-3),
        schedule=ScheduleConfig(),
        loop=LoopConfig(epochs=epochs, batch_size=64, picture_every=5),
        knn=KnnConfig(every=5),
    )


def _mmpretrain_backbone(size: Size) -> HiViTConfig:
    return HiViTConfig(size=f"hivit_{size}", position="sincos-row", position_frozen=True, stem_init="xavier")


def _mmpretrain_decoder() -> DecoderConfig:
    return DecoderConfig(depth=6, embed_norm_eps=1e-5, init="xavier")
