"""Semantic segmentation: UPerNet on the pyramid's four maps, its loss, and labels for images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from itpn.errors import UserError
from itpn.heads.drops import RandomDrops
from itpn.heads.upernet import FCNHead, SegmenterConfig, UPerHead, resized
from itpn.heads.windows import InferenceConfig, argmax_at, scores
from itpn.nn.normalise import Normalise
from itpn.nn.pyramid import Model, ModelConfig, segmentation_maps

STRIDE_16 = 2
"""Which of the four maps the auxiliary head sees."""


class Segmenter(nn.Module):
    """Backbone, pyramid and heads: labels for images.

    Args:
        config: with its mean and std.

    Raises:
        UserError: the model has no pyramid.
    """

    def __init__(self, model: ModelConfig, config: SegmenterConfig) -> None:
        super().__init__()
        if config.mean is None or config.std is None:
            raise ValueError("config.mean and config.std are not settled")
        if model.pyramid is None:
            raise UserError("segmentation needs a pyramid: the model was made without (model.pyramid)")
        C, width = model.backbone.shape.width, model.pyramid.width
        channels = [width + C // 4, width + C // 2, width + C, width + C]
        self.config = config
        self.normalise = Normalise(config.mean, config.std, model.backbone.in_channels)
        self.model = Model(model)
        self.decode_head = UPerHead(channels, config)
        self.auxiliary_head = FCNHead(channels[STRIDE_16], config) if config.auxiliary_weight else None

    def maps(self, images: Tensor, drop: Tensor | None = None) -> list[Tensor]:
        """Normalised images ``[B, c, H, W]`` to the maps that the heads see, strides 4 to 32."""
        features, levels = self.model(images, drop=drop)
        return segmentation_maps(features, levels, self.model.backbone.grid_of(images))

    def logits(self, images: Tensor) -> Tensor:
        """Images ``[B, c, H, W]``, uint8 or floats in 0..1, to logits ``[B, classes, H, W]`` in one pass.

        Any size: what is missing to whole cells of stride 32 is filled with the mean colour.
        """
        return self.logits_of(self.normalise(images))

    def logits_of(self, pixels: Tensor) -> Tensor:
        """The same of normalised images."""
        height, width = pixels.shape[-2:]
        unit = 2 * self.model.backbone.config.patch_size
        padded = F.pad(pixels, (0, -width % unit, 0, -height % unit))
        logits = resized(self.decode_head(self.maps(padded)).float(), padded)
        return logits[..., :height, :width]

    @torch.no_grad()
    def predict(self, images: Tensor, inference: InferenceConfig | None = None) -> Tensor:
        """Images ``uint8 [B, c, H, W]`` to scores ``[B, classes, H, W]``: see `heads.windows.scores`."""
        return scores(self.logits, images, inference or InferenceConfig())

    @torch.no_grad()
    def segment(
        self, images: Tensor, size: tuple[int, int], inference: InferenceConfig | None = None
    ) -> Tensor:
        """The best class of every pixel, ``long [B, height, width]`` of the given size, which may be another
        one than that of the images ``uint8 [B, c, H, W]``."""
        return argmax_at(self.predict(images, inference), size)


class SegmentObjective(Segmenter):
    """The loss of a batch.

    Args:
        config: with its mean and std.
        image_size: height and width of the training crops.

    Raises:
        UserError: the model has no pyramid, or crops are not of whole cells of stride 32.
    """

    def __init__(self, model: ModelConfig, config: SegmenterConfig, image_size: tuple[int, int]) -> None:
        super().__init__(model, config)
        unit = 2 * model.backbone.patch_size
        if any(side < 1 or side % unit for side in image_size):
            raise UserError(
                f"crops of {image_size[0]} x {image_size[1]} pixels: each side must be a multiple of {unit}"
            )
        self.image_size = image_size

    @property
    def draw(self) -> RandomDrops:
        """What the loader draws for each sample."""
        return RandomDrops.of(self.model.backbone)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """From ``images: uint8 [B, c, H, W]``, ``labels: [B, H, W]`` integers, perhaps ``drop [B, D]``.

        A label that is no class (255, say) marks a pixel without one; a sample of such pixels alone counts as
        loss 0 and accuracy 0.

        Returns:
            ``loss``, its parts ``decode`` and ``auxiliary``, and ``accuracy``, the share of the labelled
            pixels that are right, as a mean over samples.

        Raises:
            UserError: an image alone under batch norm, which cannot normalise its average.
        """
        self._check_batch(len(batch["images"]))
        maps = self.maps(self.normalise(batch["images"]), batch.get("drop"))
        labels = batch["labels"].long()
        labelled = labels < self.config.num_classes
        logits = resized(self.decode_head(maps).float(), labels)
        decode = self.pixel_loss(logits, labels, labelled)
        right = (logits.detach().argmax(1) == labels) & labelled
        accuracy = (right.sum((1, 2)) / labelled.sum((1, 2)).clamp(min=1)).mean()
        if self.auxiliary_head is None:
            return {"loss": decode, "decode": decode.detach(), "accuracy": accuracy}
        coarse = resized(self.auxiliary_head(maps[STRIDE_16]).float(), labels)
        auxiliary = self.pixel_loss(coarse, labels, labelled)
        return {
            "loss": decode + self.config.auxiliary_weight * auxiliary,
            "decode": decode.detach(),
            "auxiliary": auxiliary.detach(),
            "accuracy": accuracy,
        }

    def pixel_loss(self, logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
        """Cross-entropy: the sum over a sample's labelled pixels over their number, then the mean over
        samples. With ``loss_over = "all"`` over the number of all its pixels, as mmseg 0.11 averages."""
        losses = F.cross_entropy(logits, labels.where(labelled, -100), ignore_index=-100, reduction="none")
        counted = (
            labelled.sum((1, 2)).clamp(min=1) if self.config.loss_over == "labelled" else losses[0].numel()
        )
        return (losses.sum((1, 2)) / counted).mean()

    def begin_step(self, step: int, num_steps: int) -> None:
        pass

    def end_step(self, step: int, num_steps: int) -> None:
        pass

    def compile_blocks(self) -> list[nn.Module]:
        """The modules that are worth compiling one by one."""
        blocks: list[nn.Module] = [*self.model.backbone.blocks(), self.decode_head]
        blocks += [part for part in (self.model.pyramid, self.auxiliary_head) if part is not None]
        return blocks

    def flops_per_image(self) -> float:
        """Floating-point operations of a training step on one image: matrix products and convolutions,
        backward as twice forward."""
        with torch.device("meta"):
            twin = SegmentObjective(self.model.config, self.config, self.image_size).eval()
            images = torch.empty(1, self.model.backbone.config.in_channels, *self.image_size)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                maps = twin.maps(images)
                twin.decode_head(maps)
                if twin.auxiliary_head is not None:
                    twin.auxiliary_head(maps[STRIDE_16])
        return 3 * float(counter.get_total_flops())

    def _check_batch(self, size: int) -> None:
        alone = self.training and size == 1 and self.config.norm == "batch"
        if alone and not any(isinstance(layer, nn.SyncBatchNorm) for layer in self.decode_head.modules()):
            raise UserError(
                "batch norm cannot train on one image at a time: give --device-batch 2 or more, or use "
                "--segmenter.norm group"
            )
