"""Models as folders and on the Hugging Face Hub: one file of ours, its config as JSON, and a card.

Everything but a model's id on the Hub works without a network.
"""

import json
import os
import re
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from torch import nn

from itpn.errors import UserError
from itpn.nn.hivit import HiViTConfig
from itpn.objectives.pixel import PixelConfig
from itpn.weights import files
from itpn.weights.files import Weights

FILE = "model.safetensors"
HEADS = {
    "classifier": ("image-classification", "An image classifier"),
    "detector": ("object-detection", "An object detector"),
    "segmenter": ("image-segmentation", "A semantic segmenter"),
}
"""The Hub's tag and our words for what a file of ours does, by the part of its config."""
NO_HEAD = ("image-feature-extraction", "An image backbone")
PAPER = "https://arxiv.org/abs/2211.12735"


def read(path: str | Path, **download: Any) -> Weights:
    """Weights from a file of ours, a run directory, a folder of `save_pretrained`, or a Hub id ``user/name``.

    Args:
        download: what `huggingface_hub.hf_hub_download` takes besides id and file name.

    Raises:
        UserError: there is nothing of that name, it is none of ours, or its tensors are not those of the
            model in its config.
    """
    local = Path(path).expanduser()
    if not local.exists() and isinstance(path, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        local = _downloaded(path, **download)
    weights = files.averaged(files.read(local))
    files.check(weights)
    return weights


def _downloaded(model_id: str, **download: Any) -> Path:
    try:
        return Path(hf_hub_download(model_id, FILE, **download))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{model_id} is no file or folder here, and {FILE} could not be downloaded from the Hub "
            f"({reason})"
        ) from error


class HubModel(PyTorchModelHubMixin, ABC):
    """What a module needs to be saved to a folder, loaded from it, and pushed to the Hub."""

    mean: tuple[float, ...] = PixelConfig.mean
    std: tuple[float, ...] = PixelConfig.std
    """Mean and standard deviation per channel, in 0..1, of the weights' images; ImageNet's if unknown."""
    input_size: tuple[int, int] | None = None
    """Height and width in pixels that the model was trained for; None: its backbone's."""
    source: dict[str, Any] | None = None
    """What the weights were converted from; see `Weights`."""

    def remember(self, weights: Weights) -> None:
        """Keep what the file says of its images and its origin, for whoever saves the model again."""
        self.mean, self.std = weights.statistics(self.mean, self.std)
        self.input_size = weights.input_size()
        self.source = weights.source

    def input_config(self) -> dict[str, Any]:
        """What its file says of its images."""
        size = {} if self.input_size is None else {"image_size": self.input_size}
        return {"mean": self.mean, "std": self.std, **size}

    @abstractmethod
    def file_config(self) -> dict[str, Any]:
        """The config that its file carries."""

    @classmethod
    @abstractmethod
    def from_weights(cls, weights: Weights) -> Self:
        """The model that the file holds."""

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write model.safetensors, config.json and a card, of which older ones of ours are replaced; for the
        options see `huggingface_hub.PyTorchModelHubMixin`.

        Raises:
            UserError: the folder holds another model.
        """
        folder = Path(save_directory)
        if theirs := _not_ours(folder):
            raise UserError(
                f"{theirs} is not replaced, because itpn did not write it as it is now: move it away, or "
                "name another folder to save to"
            )
        saved: str | None = super().save_pretrained(save_directory, **options)
        return saved

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        config = self.file_config() | {"input": self.input_config()}
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        files.save(save_directory / FILE, tensors, config, self.source)
        (save_directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(  # type: ignore[override]  # without a sink for unknown arguments
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """The model of a folder, a file of ours or a Hub id, in evaluation mode; see `itpn.load`."""
        weights = read(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        return cls.from_weights(weights)

    def generate_model_card(self, *, license: str = "unknown") -> ModelCard:
        """The folder's README, unless it has one; ``save_pretrained(folder, model_card_kwargs={"license":
        "mit"})`` names the licence."""
        assert isinstance(self, nn.Module)
        config = self.file_config()
        parameters = sum(parameter.numel() for parameter in self.parameters())
        config["input"] = self.input_config()
        return ModelCard(card(config, parameters, license, self.source))


def _not_ours(folder: Path) -> Path | None:
    """A file in the place of one of a model that `save_pretrained` did not write, or not as it is now."""
    weights, config = folder / FILE, folder / "config.json"
    ours = files.read_if_ours(weights)
    if os.path.lexists(weights) and ours is None:
        return weights
    if not os.path.lexists(config):
        return None
    with suppress(OSError, ValueError):
        if ours and json.loads(config.read_text()) == ours.config:
            return None
    return config


def card(config: dict[str, Any], parameters: int, license: str, source: dict[str, Any] | None = None) -> str:
    """The model card as Markdown with its metadata in front, from a file's config."""
    model, head = config["model"], next((config[name] for name in HEADS if name in config), None)
    tag, what = next((told for name, told in HEADS.items() if name in config), NO_HEAD)
    backbone = HiViTConfig(**model["backbone"])
    shape, pyramid = backbone.shape, model["pyramid"]
    data = ModelCardData(
        license=license,
        library_name="itpn",
        pipeline_tag=tag,
        tags=[
            "arxiv:2211.12735",
            "itpn",
            "hivit",
            "image-backbone",
            *(["feature-pyramid"] if pyramid else []),
        ],
    )
    size, patch = backbone.image_size, backbone.patch_size
    rows = {
        "backbone": f"`{backbone.label}`",
        "blocks": f"{' + '.join(map(str, shape.depths))}, {shape.num_heads} heads",
        "channels": f"{shape.width // 4}, {shape.width // 2}, {shape.width}"
        f" at strides {patch // 4}, {patch // 2}, {patch}",
        "pyramid": f"{pyramid['width']} channels at the same strides" if pyramid else "none",
        "classes": str(head["num_classes"]) if head else "none",
        "image size": f"{size} x {size}; any multiple of {patch} pixels per side",
        "input": f"{backbone.in_channels} channels in 0..1, normalised by mean {_numbers(config, 'mean')} "
        f"and deviation {_numbers(config, 'std')}",
        "parameters": f"{parameters / 1e6:.2f} M",
    }
    if source:
        rows["converted from"] = f"{source['file']} ({source['family']}), sha256 {source['sha256']}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    # The text of a model card: it tells whoever downloads the folder that loading it runs no code.
    return f"""---
{data.to_yaml()}
---

# {backbone.label}

{what} of the iTPN family: a hierarchical vision transformer (HiViT) that is pre-trained together with its
feature pyramid ([Integrally Pre-Trained Transformer Pyramid Networks]({PAPER})).

| | |
|---|---|
{table}

```python
import itpn

model = itpn.load("FOLDER_OR_HUB_ID")
```

The weights are one safetensors file, `{FILE}`, whose metadata carries the config; there is no pickle.
Licence of the weights: {license}.
"""


def _numbers(config: dict[str, Any], name: str) -> str:
    return ", ".join(f"{number:g}" for number in config["input"][name])


def as_json(config: Any) -> dict[str, Any]:
    """A config dataclass as it reads back from JSON, where a tuple is a list."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values
