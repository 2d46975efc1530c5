"""The training loop, in the order things happen. It trains any module: batch in, {"loss": …} out."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from PIL.Image import Image
from torch import nn

from itpn.engine import device_batch
from itpn.engine.device_batch import Batches
from itpn.engine.distributed import DeviceName, exchange_gradients
from itpn.engine.interruption import Interruption
from itpn.engine.log import Log
from itpn.engine.numerics import Precision, choose_precision, matmul_ceiling, seed_of, set_numerics
from itpn.engine.optim import AdamWConfig, adamw
from itpn.engine.run import Run
from itpn.engine.saver import Saver
from itpn.engine.schedule import CosineConfig, lr_at
from itpn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    epochs: int
    """Passes over the images; the schedule spans them."""
    batch_size: int
    """Images per optimiser step, over all ranks and accumulation: results do not depend on the hardware."""
    device_batch: int | None = None
    """Images a device takes at once. Default: 16 on a CPU, on CUDA 512 halved until the first step fits."""
    device: DeviceName = "auto"
    """Where to train."""
    precision: Precision = "auto"
    """Of the forward pass; auto is bf16 (fp16 on older GPUs) on CUDA, fp32 elsewhere."""
    compile: bool = False
    """Compile each block with torch.compile."""
    clip_grad: float | None = None
    """Largest norm of the whole gradient."""
    seed: int = 0
    """Of everything random."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int | None = None
    """Epochs between checkpoints; without it checkpoint_minutes decides."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, also in the middle of an epoch."""
    keep_last: int = 3
    """Checkpoints to keep."""
    keep_every: int | None = None
    """Keep for good the checkpoints of every so many epochs."""
    picture_every: int = 10
    """Epochs between pictures; 0: none."""
    run_dir: Path | None = None
    """Where the run is written, and resumed from. Default: runs/NAME."""
    max_steps: int | None = None
    """Stop after this step, with a checkpoint, as if interrupted."""

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "device_batch", "log_every", "checkpoint_every", "keep_last")
        for name in (*counts, "keep_every", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.picture_every < 0 or self.checkpoint_minutes < 0:
            raise UserError("--picture-every and --checkpoint-minutes must be at least 0")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise UserError(
                f"--clip-grad must be greater than 0, not {self.clip_grad}; leave it out not to clip"
            )


class Objective(Protocol):
    """What the loop asks of an objective besides `forward(batch) -> {"loss": …, parts}`.

    These are scalars under the same names at every step. Buffers must end a step equal on all ranks, as
    parameters do: rank 0's are saved.
    """

    def begin_step(self, step: int, num_steps: int) -> None: ...
    def end_step(self, step: int, num_steps: int) -> None: ...
    def compile_blocks(self) -> Iterable[nn.Module]:
        """What to compile one by one, where that is asked for."""
        ...

    def flops_per_image(self) -> float:
        """Work of a whole training step for one image. Optional: without it there is no MFU."""
        ...


@dataclass(frozen=True)
class EpochEnd:
    """Called on every rank before the first step, after every `every`-th epoch and the last (0: never)."""

    every: int
    call: Callable[[int, int], Mapping[str, float | Image]]
    """(epoch, step) that are done to named numbers and pictures, which are logged."""


def train(
    objective: nn.Module,
    batches: Batches,
    *,
    steps_per_epoch: int,
    loop: LoopConfig,
    optim: AdamWConfig,
    schedule: CosineConfig,
    run: Run,
    at_epoch_end: Sequence[EpochEnd] = (),
) -> bool:
    """Trains `objective`, or goes on with it, up to the last step.

    Args:
        batches: (start_step, device_batch) -> this rank's endless micro-batches from that step, on the CPU.

    Returns:
        True once the last step is reached; False if `max_steps` came first.

    Raises:
        UserError: settings that do not go together; a checkpoint of another model; a loss that is not finite.
        SystemExit: after SIGINT (130) or SIGTERM (143), with a checkpoint.
    """
    world, device = run.world, run.world.device
    hooks = cast(Objective, objective)
    num_steps = loop.epochs * steps_per_epoch
    last_step = min(num_steps, loop.max_steps or num_steps)
    peak_lr = optim.peak_lr(loop.batch_size)
    schedule.warmup(loop.epochs)
    device_batch.check_division(loop.batch_size, world.size, loop.device_batch)

    precision = choose_precision(loop.precision, device)
    set_numerics(device, precision)
    objective.to(device).train()
    optimizer = adamw(objective, optim)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    saver = Saver(
        objective,
        optimizer,
        scaler,
        run,
        every=loop.checkpoint_every and loop.checkpoint_every * steps_per_epoch,
        minutes=loop.checkpoint_minutes,
        keep_last=loop.keep_last,
        keep_every=loop.keep_every and loop.keep_every * steps_per_epoch,
    )

    start_step = saver.resume()
    if start_step >= last_step:
        run.say(f"{run.directory} is at step {start_step} of {num_steps}: nothing left to train")
        return start_step >= num_steps
    run.begin()
    share = loop.batch_size // world.size
    micro_batch = device_batch.settle(
        objective,
        lambda size: next(batches(start_step, size)),
        run,
        share=share,
        given=loop.device_batch,
        precision=precision,
    )
    accumulation = share // micro_batch
    if loop.compile:
        for block in hooks.compile_blocks():
            block.compile()
    model = world.wrap(objective)
    run.say(
        f"{run.directory}: step {start_step} of {num_steps} ({loop.epochs} epochs) "
        f"on {device.type} in {str(precision).removeprefix('torch.')}; batch {loop.batch_size} = "
        f"{world.size} ranks x {micro_batch} images x {accumulation} micro-steps"
    )
    log = Log(run, start_step, num_steps, steps_per_epoch, loop.batch_size, loop.log_every)
    if device.type == "cuda" and hasattr(hooks, "flops_per_image"):
        log.mfu_per_rate = hooks.flops_per_image() / (world.size * matmul_ceiling(device, precision))

    with log, Interruption() as interruption:
        stream = batches(start_step, micro_batch)
        if start_step == 0:
            with log.paused():
                evaluate(at_epoch_end, 0, 0, loop.epochs, log)
                objective.train()
        for step in range(start_step, last_step):
            hooks.begin_step(step, num_steps)
            lr = lr_at(step, schedule, peak=peak_lr, epochs=loop.epochs, steps_per_epoch=steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr

            waited, parts = 0.0, []
            for micro_step in range(accumulation):
                asked = time.perf_counter()
                batch = {key: value.to(device, non_blocking=True) for key, value in next(stream).items()}
                waited += time.perf_counter() - asked
                torch.manual_seed(seed_of(loop.seed, step, world.rank, micro_step))
                with exchange_gradients(model, now=micro_step == accumulation - 1):
                    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                        outputs = model(batch)
                    scaler.scale(outputs["loss"] / accumulation).backward()
                parts.append(torch.stack([value.detach().float() for value in outputs.values()]))

            scaler.unscale_(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            values = mean_parts(list(outputs), world.gather(torch.stack(parts)), step + 1)
            values |= {"lr": lr, "grad_norm": norm.item()}
            if not norm.isfinite() and not scaler.is_enabled():  # an enabled scaler skips such a step itself
                raise not_finite("the norm of the gradient", norm.item(), step + 1, "every rank")
            if loop.clip_grad is not None:
                nn.utils.clip_grads_with_norm_(parameters, loop.clip_grad, norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            hooks.end_step(step, num_steps)

            done = step + 1
            log.step(done, values, waited=waited)
            with log.paused():
                epoch, rest = divmod(done, steps_per_epoch)
                if rest == 0:
                    evaluate(at_epoch_end, epoch, done, loop.epochs, log)
                    objective.train()
                overdue, stop = world.largest(saver.overdue(), interruption.signal)
                if overdue or stop or done == last_step or saver.due(done):
                    log.sync()
                    saver.save(done)
            if stop:
                run.say(f"stopped at step {done} of {num_steps}; the same command goes on from there")
                raise SystemExit(128 + int(stop))
    return last_step == num_steps


def evaluate(tasks: Sequence[EpochEnd], epoch: int, step: int, epochs: int, log: Log) -> None:
    # Not compiled: other precisions and sizes would use up what a block may be compiled for.
    with torch.compiler.set_stance("force_eager"):
        for task in tasks:
            if task.every and (epoch % task.every == 0 or epoch == epochs):
                log.write(step, task.call(epoch, step))


def mean_parts(names: list[str], parts: torch.Tensor, step: int) -> dict[str, float]:
    """Means of `parts` [ranks, micro-steps, names]; UserError where a rank's loss is not finite."""
    for rank, losses in enumerate(parts[..., names.index("loss")]):
        if not losses.isfinite().all():
            raise not_finite("the loss", losses.sum().item(), step, f"rank {rank}")
    return dict(zip(names, parts.mean(dim=(0, 1)).tolist(), strict=True))


def not_finite(what: str, value: float, step: int, where: str) -> UserError:
    return UserError(
        f"{what} is {value} at step {step} on {where}; the last checkpoint is from before. "
        "Go on from there with a lower learning rate, --clip-grad 1, or --precision bf16 or fp32"
    )
