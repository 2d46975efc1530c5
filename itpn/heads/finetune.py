"""Fine-tuning a classifier: mixed images and soft targets in, a loss out, and an average of the weights."""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from itpn.errors import UserError
from itpn.heads.classify import Classifier, ClassifierConfig
from itpn.heads.mixing import MixConfig, MixDraw, erase, mix, smoothed_targets, soft_cross_entropy
from itpn.nn.hivit import HiViT, HiViTConfig
from itpn.nn.normalise import Normalise


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    mix: MixConfig = field(default_factory=MixConfig)
    average: float = 0.0
    """Decay of a moving average of the weights, which is evaluated and saved (0.9999 in Fast-iTPN). At step t
    it is at most (t + 1) / (t + 10), so the start is soon forgotten. 0: no average."""
    mean: tuple[float, ...] | None = None
    """Mean of each image channel, in 0..1. None: as for the initial weights, else ImageNet's."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each image channel, in 0..1. None: as for the initial weights, else
    ImageNet's."""

    def __post_init__(self) -> None:
        if not 0 <= self.average < 1:
            raise UserError(f"finetune.average: {self.average} lies outside [0, 1); 0 keeps no average")
        if (self.mean is None) != (self.std is None):
            raise UserError("finetune.mean and finetune.std: give both or neither")


class ClassifyObjective(nn.Module):
    """A classifier and what trains it.

    Args:
        image_size: height and width of the training images.
        config: with its mean and std.
    """

    def __init__(
        self,
        backbone: HiViTConfig,
        classifier: ClassifierConfig,
        config: FinetuneConfig,
        image_size: tuple[int, int],
    ) -> None:
        super().__init__()
        if config.mean is None or config.std is None:
            raise ValueError("config.mean and config.std are not settled")
        self.config, self.image_size = config, image_size
        self.normalise = Normalise(config.mean, config.std, backbone.in_channels)
        self.model = Classifier(HiViT(backbone), classifier)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.average else None

    @property
    def evaluated(self) -> Classifier:
        """The classifier to evaluate and to keep: the average where there is one."""
        return self.model if self.average is None else self.average

    @property
    def draw(self) -> MixDraw:
        """What the loader draws for each sample."""
        backbone = self.model.backbone
        num_drops = backbone.num_drops if backbone.config.drop_path else 0
        return MixDraw(self.config.mix, self.image_size, num_drops)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """From ``images: uint8 [B, c, H, W]``, ``labels: long [B]`` and what `draw` drew.

        Returns:
            ``loss``, soft cross-entropy, and ``accuracy``, the share of images whose likeliest class is the
            one that most of the image shows.
        """
        images = erase(self.normalise(batch["images"]), batch["erase"], batch["noise_seed"])
        smoothing = self.config.mix.smoothing
        targets = smoothed_targets(batch["labels"], self.model.config.num_classes, smoothing)
        if self.config.mix.mixes:
            images, targets = mix(images, targets, batch["lam"], batch["box"])
        logits = self.model(images, batch.get("drop"))
        right = logits.argmax(1) == targets.argmax(1)
        return {
            "loss": soft_cross_entropy(logits, targets).mean(),
            "accuracy": right.float().mean().detach(),
        }

    def begin_step(self, step: int, num_steps: int) -> None: ...

    @torch.no_grad()
    def end_step(self, step: int, num_steps: int) -> None:
        """Moves the average towards the weights."""
        if self.average is not None:
            decay = min(self.config.average, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def restart_average(self) -> None:
        """The average begins at the weights, once they are loaded."""
        if self.average is not None:
            self.average.load_state_dict(self.model.state_dict())

    def compile_blocks(self) -> list[nn.Module]:
        """The modules that are worth compiling one by one."""
        average = self.average.backbone.blocks() if self.average else []
        return [*self.model.backbone.blocks(), *average]

    def flops_per_image(self) -> float:
        """Floating-point operations of a training step on one image: matrix products, backward as twice
        forward."""
        return 3 * forward_flops(self.model, self.image_size)


def forward_flops(model: Classifier, image_size: tuple[int, int]) -> float:
    """Floating-point operations of a classifier's matrix products on one image."""
    with torch.device("meta"):
        twin = Classifier(HiViT(model.backbone.config), model.config)
        images = torch.empty(1, model.backbone.config.in_channels, *image_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin(images)
    return float(counter.get_total_flops())
