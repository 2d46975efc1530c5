"""A training step in the loop's order, timed by its parts beside the products of the device's ceiling.

What is trained is a `Subject`; `itpn bench pretrain | finetune | detect | segment` each make theirs.
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from itpn.bench.ceiling import Ceiling
from itpn.bench.figures import Figures, show
from itpn.bench.parts import Parts
from itpn.bench.profile import profiled
from itpn.engine.clock import Clock
from itpn.engine.distributed import DeviceName, choose_device
from itpn.engine.numerics import Precision, choose_precision, set_numerics
from itpn.engine.optim import adamw
from itpn.engine.step import micro_step
from itpn.errors import UserError
from itpn.nn.depth import lr_scales
from itpn.outputs import claim, writing
from itpn.recipes.classify import Classify
from itpn.recipes.detect import Detect
from itpn.recipes.lookup import find, load_as
from itpn.recipes.pretrain import Pretrain
from itpn.recipes.segment import Segment

WARM_UP = 2
"""Steps that are not counted; a compiler and an allocator settle in them."""
BATCH = {"cpu": 16, "mps": 64, "cuda": 256}
R = TypeVar("R", Pretrain, Classify, Detect, Segment)


@dataclass(frozen=True)
class Options:
    name: Annotated[str, tyro.conf.Positional]
    """Config file or name, as for `itpn train`."""
    device_batch: int | None = None
    """Images per step. Default: 16 on a CPU, 256 on CUDA."""
    steps: int = 10
    """Number of timed steps, after two warm-up steps. Medians are shown."""
    precision: Precision = "auto"
    """Precision of the forward pass. auto: bf16 on CUDA (fp16 on older GPUs), fp32 elsewhere."""
    device: DeviceName = "auto"
    """Device to run on."""
    compile: bool = False
    """Compile each block with torch.compile."""
    json: Path | None = None
    """JSON file to write the results to."""

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.device_batch is not None and self.device_batch < 1):
            raise UserError("--steps and --device-batch must be at least 1")
        claim(("--json", self.json))


@dataclass(frozen=True)
class StepOptions(Options):
    checkpointing: bool = False
    """Use activation checkpointing: store only the inputs of the backbone's blocks and recompute the rest."""
    profile: bool = False
    """Profile one more step and show its time by kind of operation."""


def ignored(_parts: Parts) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Model to time."""

    model: nn.Module
    """In training mode on its device; called with the batch."""
    objective: Any
    """Objective whose `begin_step` and `end_step` belong to a step: `model`, except for a baseline."""
    optimizer: torch.optim.Optimizer
    batch: dict[str, Tensor]
    image_size: tuple[int, int]
    flops_per_image: Callable[[], float]
    """Floating-point operations of a step; asked once all steps are taken."""
    clocked: Callable[[Parts], None] = ignored
    """Names parts of the step."""
    rest: str = "forward"
    """Name of the rest of the forward pass …"""
    backward: str = "backward"
    """… that of the backward pass, …"""
    ending: str = "optimiser"
    """… and `end_step`."""
    notes: Callable[[], list[str]] = list
    """Function that lists further remarks, once the step has been taken."""
    baseline: Callable[[], "Subject"] | None = None
    """Baseline that takes its steps in turn …"""
    differs: str = "written plainly"
    """… and how it differs."""


@dataclass
class Runner:
    """One model that takes steps in the loop's order, its parts on the clock."""

    subject: Subject
    precision: torch.dtype
    num_steps: int
    clock: Clock = field(init=False)
    losses: list[float] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        subject, clock = self.subject, Clock(self.subject.batch["images"].device)
        self.clock = clock
        subject.clocked(Parts(clock, subject.rest))
        subject.model.register_forward_hook(lambda *_: clock.mark(subject.rest))

    def step(self) -> None:
        subject, step, mark = self.subject, len(self.losses), self.clock.mark
        mark("begun")
        subject.objective.begin_step(step, self.num_steps)
        outputs = micro_step(subject.model, subject.batch, self.precision)
        mark(subject.backward)
        gradients = [p.grad for p in subject.model.parameters() if p.grad is not None]
        nn.utils.get_total_norm(gradients)
        subject.optimizer.step()
        subject.optimizer.zero_grad(set_to_none=True)
        del gradients
        mark("optimiser")
        subject.objective.end_step(step, self.num_steps)
        mark(subject.ending)
        self.seconds.append(self.clock.read())
        self.losses.append(outputs["loss"].item())

    @property
    def parts(self) -> dict[str, float]:
        """Median seconds of each part, and of the whole step."""
        timed = self.seconds[WARM_UP:]
        medians = {name: statistics.median(step[name] for step in timed) for name in timed[0]}
        return medians | {"step": statistics.median(self.steps)}

    @property
    def steps(self) -> list[float]:
        """Seconds of each step after the warm-up."""
        return [sum(step.values()) for step in self.seconds[WARM_UP:]]


def recipe_of(kind: type[R], options: StepOptions) -> R:
    """The named config, of the given kind, with checkpointing if that is asked for."""
    recipe = load_as(kind, find(options.name))
    return with_backbone(recipe, checkpointing=True) if options.checkpointing else recipe


def with_backbone(recipe: R, **fields: Any) -> R:
    backbone = replace(recipe.model.backbone, **fields)
    return replace(recipe, model=replace(recipe.model, backbone=backbone))


def layered_adamw(objective: nn.Module, recipe: Classify | Detect | Segment) -> torch.optim.Optimizer:
    """The optimiser of a recipe that fine-tunes, in its groups of parameters."""
    trained = [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
    scales = lr_scales(trained, recipe.model.backbone.shape.depths, recipe.layer_decay)
    return adamw(objective, recipe.optim, scales)


def synthetic_images(
    objective: Any, size: int, channels: int, image_size: tuple[int, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Random pixels, and what the loader would draw for them; the same on every machine."""
    draws = [objective.draw(generator) for _ in range(size)]
    batch = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    shape = (size, channels, *image_size)
    return batch | {"images": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)}


def on_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def measure(
    name: str,
    make: Callable[[torch.device, int], Subject],
    options: StepOptions,
    console: Console,
    default_batch: dict[str, int] = BATCH,
) -> Figures:
    """Time the steps of what `make` makes for a device and a number of images at a time."""
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    size = options.device_batch or default_batch[device.type]
    set_numerics(device, precision)
    num_steps = WARM_UP + options.steps

    torch.manual_seed(0)
    subject = make(device, size)
    if options.compile:
        for block in subject.objective.compile_blocks():
            block.compile()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ours, baseline = Runner(subject, precision, num_steps), None
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("warming up", total=num_steps)
        for _ in range(WARM_UP):
            ours.step()
            progress.advance(task)
        peak = peak_memory(device)
        if subject.baseline:
            torch.manual_seed(0)
            baseline = Runner(subject.baseline(), precision, num_steps)
            for _ in range(WARM_UP):
                baseline.step()
        turn = [ours, baseline] if baseline else [ours]
        ceiling = Ceiling(device, precision)
        progress.update(task, description="timing")
        for _ in range(options.steps):
            ceiling.measure()
            for runner in turn:
                runner.step()
            turn.reverse()  # being first must be nobody's advantage
            progress.advance(task)
        ceiling.measure()
    flops_per_image = subject.flops_per_image()
    # All this before a profiled step joins the others.
    ratio = ceiling.share(size * flops_per_image, ours.steps)
    speedup = speedup_of(ours.steps, baseline.steps) if baseline else None
    parts = ours.parts
    return Figures(
        **setting(options, device, precision),
        config=name,
        device_batch=size,
        image_size=subject.image_size,
        flops_per_image=flops_per_image,
        ceiling=ceiling.median,
        ratio=ratio,
        parts=parts,
        losses=ours.losses[:num_steps],
        peak_memory=peak,
        baseline_parts=baseline.parts if baseline else None,
        baseline_losses=baseline.losses if baseline else None,
        speedup=speedup,
        baseline=subject.differs,
        kinds=profiled(ours.step, device) if options.profile else None,
        notes=subject.notes(),
    )


def speedup_of(ours: Sequence[float], baseline: Sequence[float]) -> float:
    """See `Figures.speedup`."""
    return statistics.median(theirs / own for own, theirs in zip(ours, baseline, strict=True))


def setting(options: Options, device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """What figures say of where and how they were taken."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": str(precision).removeprefix("torch."),
        "compiled": options.compile,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def report(figures: Sequence[Figures], options: Options, console: Console) -> None:
    """Shows them all; writes one as an object, several as a list."""
    for each in figures:
        show(each, console)
    if options.json:
        written = [each.as_dict() for each in figures]
        text = json.dumps(written if len(written) > 1 else written[0], indent=2)
        with writing(options.json, "--json") as file:
            file.write_text(text + "\n")


def peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        import resource  # there is none on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return None
