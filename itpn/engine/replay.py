"""A step whose numbers went wrong: kept in RUN/replay, and taken again to look at it."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from itpn.engine import checkpoint
from itpn.engine.device_batch import Batch
from itpn.engine.numerics import seed_of
from itpn.engine.step import micro_step
from itpn.errors import UserError

MODEL, STEP = "model.safetensors", "step.json"


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """A step (counted from 0) whose loss or gradient is not finite, and all that it takes to repeat it."""

    step: int
    num_steps: int
    seed: int
    precision: str
    micro_batch: int
    losses: list[list[float]]
    """By rank and micro-step."""
    grad_norm: float
    samples: list[list[list[list[int]]]]
    """(epoch, index) by rank, micro-step and sample; empty where a batch does not tell."""

    def __str__(self) -> str:
        for rank, losses in enumerate(self.losses):
            if not all(map(math.isfinite, losses)):
                worst = next(loss for loss in losses if not math.isfinite(loss))
                return f"the loss is {worst} at step {self.step + 1} on rank {rank}"
        return f"the norm of the gradient is {self.grad_norm} at step {self.step + 1} on every rank"


def write(directory: Path, bad: BadStep, model: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Replaces what an earlier bad step left; the weights are those before the step."""
    beside = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        checkpoint.write_tensors(beside / MODEL, model, {"config": json.dumps(config)})
        (beside / STEP).write_text(json.dumps(asdict(bad)))  # nan and inf as Python spells them
        shutil.rmtree(directory, ignore_errors=True)
        beside.rename(directory)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def read(directory: Path) -> BadStep:
    """UserError if there is none."""
    try:
        return BadStep(**json.loads((directory / STEP).read_text()))
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} holds no step to replay: a run leaves one where its loss or gradient is not finite"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {directory / STEP}: {error}") from error


def again(
    objective: nn.Module, directory: Path, batches: Callable[[int], Iterator[Batch]], device: torch.device
) -> BadStep:
    """The same step from the same weights, all its ranks one after the other; what comes out now.

    Args:
        batches: rank -> its micro-batches from that step on.
    """
    before = read(directory)
    objective.to(device).train()
    checkpoint.load_model(directory, objective)
    cast(Any, objective).begin_step(before.step, before.num_steps)
    num_ranks, accumulation = len(before.losses), len(before.losses[0])
    losses, samples = [], []
    for rank in range(num_ranks):
        stream = batches(rank)
        losses.append([0.0] * accumulation)
        samples.append([[[0, 0]]] * accumulation)
        for i in range(accumulation):
            batch = next(stream)
            samples[rank][i] = ids_of(batch)
            torch.manual_seed(seed_of(before.seed, before.step, rank, i))
            outputs = micro_step(
                objective,
                {name: tensor.to(device) for name, tensor in batch.items()},
                getattr(torch, before.precision),
                share=1 / (num_ranks * accumulation),
            )
            losses[rank][i] = outputs["loss"].item()
    gradients = [parameter.grad for parameter in objective.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients).item()
    return BadStep(**{**asdict(before), "losses": losses, "samples": samples, "grad_norm": norm})


def ids_of(batch: Batch) -> list[list[int]]:
    """(epoch, index) of each sample, where the batch tells them."""
    if "index" not in batch or "epoch" not in batch:
        return []
    return torch.stack([batch["epoch"], batch["index"]], dim=1).tolist()
