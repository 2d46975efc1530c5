"""`itpn bench pretrain`: a config's real training step on synthetic data, beside what the device can do."""

import json
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from itpn.bench.figures import Figures, show
from itpn.bench.plain import Plain, plain_adamw
from itpn.bench.profile import profiled
from itpn.commands.arguments import parse
from itpn.engine.clock import Clock
from itpn.engine.distributed import DeviceName, choose_device
from itpn.engine.numerics import (
    Precision,
    ceiling_matrix,
    choose_precision,
    product_flops,
    product_seconds,
    set_numerics,
)
from itpn.engine.optim import adamw
from itpn.engine.step import micro_step
from itpn.errors import UserError
from itpn.heads.finetune import ClassifyObjective
from itpn.objectives.distill import DistillConfig, DistillObjective
from itpn.objectives.pixel import PixelConfig, PixelObjective
from itpn.objectives.teacher import outline
from itpn.recipes.classify import Classify
from itpn.recipes.lookup import find, load_as
from itpn.recipes.pretrain import Pretrain

WARM_UP = 2
"""Steps that are not counted; a compiler and an allocator settle in them."""
BATCH = {"cpu": 16, "mps": 64, "cuda": 256}
PRODUCTS = {"cpu": 1, "mps": 10, "cuda": 10}
"""Products of the ceiling beside each step."""
Objective = PixelObjective | DistillObjective | ClassifyObjective


@dataclass(frozen=True)
class Options:
    name: Annotated[str, tyro.conf.Positional]
    """A config, as `itpn train` takes it."""
    device_batch: int | None = None
    """Images at a time. Default: 16 on a CPU, 256 on CUDA."""
    steps: int = 10
    """Steps to time, after two to warm up; medians are shown."""
    precision: Precision = "auto"
    """Of the forward pass; auto is bf16 (fp16 on older GPUs) on CUDA, fp32 elsewhere."""
    device: DeviceName = "auto"
    """Where to run."""
    compile: bool = False
    """Compile each block with torch.compile."""
    json: Path | None = None
    """Where to write the figures."""

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.device_batch is not None and self.device_batch < 1):
            raise UserError("--steps and --device-batch must be at least 1")


@dataclass(frozen=True)
class Bench(Options):
    """Time the training step of a config on random images: its parts, FLOP/s, and share of the ceiling.

    A frozen teacher has random weights; nothing is downloaded.
    """

    checkpointing: bool = False
    """Keep only the inputs of the backbone's blocks, and compute the rest again in the backward pass."""
    baseline: bool = False
    """Take turns with the same model written plainly (itpn/bench/plain.py): on pixels, without a frozen
    teacher."""
    profile: bool = False
    """Show the time of one more step by kind of work."""


def run(arguments: list[str]) -> None:
    time_steps("itpn bench pretrain", arguments, Pretrain)


def time_steps(program: str, arguments: list[str], kind: type[Pretrain | Classify]) -> None:
    """What `run` does, of a config of the given kind."""
    options = parse(Bench, arguments, program)
    recipe = load_as(kind, find(options.name))
    if options.checkpointing:
        backbone = replace(recipe.model.backbone, checkpointing=True)
        recipe = replace(recipe, model=replace(recipe.model, backbone=backbone))
    console = Console(highlight=False, soft_wrap=True)
    figures = measure(recipe, options, console)
    show(figures, console)
    if options.json:
        options.json.write_text(json.dumps(figures.as_dict(), indent=2) + "\n")


@dataclass
class Runner:
    """One model that takes steps in the loop's order, its parts on the clock."""

    model: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    batch: dict[str, Tensor]
    precision: torch.dtype
    num_steps: int
    clock: Clock = field(init=False)
    losses: list[float] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        mark = self.clock = Clock(self.batch["images"].device)
        self.model.register_forward_hook(lambda *_: mark.mark("forward"))
        for teacher in () if isinstance(self.objective, ClassifyObjective) else self.objective.teachers:
            teacher.register_forward_pre_hook(lambda *_: mark.mark("forward"))
            teacher.register_forward_hook(lambda *_: mark.mark("teacher"))

    def step(self) -> None:
        step, mark = len(self.losses), self.clock.mark
        mark("begun")
        self.objective.begin_step(step, self.num_steps)
        outputs = micro_step(self.model, self.batch, self.precision)
        mark("backward")
        nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mark("optimiser")
        self.objective.end_step(step, self.num_steps)
        moving = isinstance(self.objective, PixelObjective) and self.objective.features
        mark("teacher's average" if moving else "optimiser")
        self.seconds.append(self.clock.read())
        self.losses.append(outputs["loss"].item())

    @property
    def parts(self) -> dict[str, float]:
        """Median seconds of each part, and of the whole step."""
        timed = self.seconds[WARM_UP:]
        medians = {name: statistics.median(step[name] for step in timed) for name in timed[0]}
        return medians | {"step": statistics.median(sum(step.values()) for step in timed)}


def measure(recipe: Pretrain | Classify, options: Bench, console: Console) -> Figures:
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    size = options.device_batch or BATCH[device.type]
    set_numerics(device, precision)
    num_steps = WARM_UP + options.steps

    objective = build(recipe, device)
    if options.baseline:
        if isinstance(objective, ClassifyObjective):
            raise UserError("--baseline knows pre-training on pixels alone; leave it out")
        Plain(objective)  # says at once if it cannot
    flops = objective.flops_per_image()
    batch = synthetic_batch(recipe, objective, size, device)
    if options.compile:
        for block in objective.compile_blocks():
            block.compile()
    ours = Runner(objective, objective, adamw(objective, recipe.optim), batch, precision, num_steps)
    runners = [ours]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("warming up", total=num_steps)
        for _ in range(WARM_UP):
            ours.step()
            progress.advance(task)
        peak = peak_memory(device)
        if options.baseline:
            twin = build(recipe, device)
            assert not isinstance(twin, ClassifyObjective)
            plain = Plain(twin)
            optimizer = plain_adamw(plain, recipe.optim)
            runners.append(Runner(plain, plain.objective, optimizer, batch, precision, num_steps))
            for _ in range(WARM_UP):
                runners[1].step()
        matrix = ceiling_matrix(device, precision)
        product_seconds(matrix)
        products: list[float] = []
        progress.update(task, description="timing")
        for _ in range(options.steps):
            products += [product_seconds(matrix) for _ in range(PRODUCTS[device.type])]
            for runner in runners:
                runner.step()
            progress.advance(task)
    parts, *baseline_parts = [runner.parts for runner in runners]  # before a profiled step joins them
    return Figures(
        config=recipe.name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        precision=str(precision).removeprefix("torch."),
        device_batch=size,
        compiled=options.compile,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        flops_per_image=flops,
        ceiling=product_flops(matrix) / statistics.median(products),
        parts=parts,
        losses=ours.losses[:num_steps],
        peak_memory=peak,
        baseline_parts=baseline_parts[0] if options.baseline else None,
        baseline_losses=runners[1].losses if options.baseline else None,
        kinds=profiled(ours.step, device) if options.profile else None,
    )


def build(recipe: Pretrain | Classify, device: torch.device) -> Objective:
    """The same weights every time, of a frozen teacher too.

    Raises:
        UserError: there is no such teacher, or it does not fit.
    """
    torch.manual_seed(0)
    if isinstance(recipe, Classify):
        finetune = replace(recipe.finetune, mean=PixelConfig.mean, std=PixelConfig.std)
        backbone, size = recipe.model.backbone, recipe.image_size
        return ClassifyObjective(backbone, recipe.classifier, finetune, size).to(device).train()
    objective: PixelObjective | DistillObjective
    match recipe.objective:
        case PixelConfig() as config:
            objective = PixelObjective(recipe.model, config)
        case DistillConfig() as config:
            objective = DistillObjective(recipe.model, config)
    if objective.teacher_config is not None:
        teacher = outline(objective.teacher_config, recipe.model.backbone.grid, "cpu")
        if teacher is None:
            raise UserError(f"itpn bench pretrain {recipe.name}: its objective must name a teacher")
        objective.attach(teacher.to(device))
    return objective.to(device).train()


def synthetic_batch(
    recipe: Pretrain | Classify, objective: Objective, size: int, device: torch.device
) -> dict[str, Tensor]:
    """Random pixels and draws, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    shape = (size, recipe.model.backbone.in_channels, *recipe.image_size)
    draws = [objective.draw(generator) for _ in range(size)]
    batch = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    batch["images"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if isinstance(recipe, Classify):
        batch["labels"] = torch.randint(recipe.classifier.num_classes, (size,), generator=generator)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        import resource  # there is none on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return None
