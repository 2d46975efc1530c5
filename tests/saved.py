"""Modules written as files of ours."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from itpn.nn.pyramid import ModelConfig
from itpn.weights import files


def save(path: Path, module: nn.Module, model: ModelConfig, **config: Any) -> Path:
    """With the model's config, and beside it those of what else the module holds, by name."""
    parts = {name: asdict(part) for name, part in {"model": model, **config}.items()}
    files.save(path, files.portable(module), parts)
    return path
