"""The training loop, in the order things happen. It trains any module: batch in, {"loss": …} out."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol, cast

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from itpn.engine import checkpoint, device_batch, replay
from itpn.engine.bad_files import BadFiles
from itpn.engine.device_batch import Batch, Batches
from itpn.engine.distributed import DeviceName, Strategy, exchange_gradients, whole, whole_tensor
from itpn.engine.interruption import Interrupted, Interruption
from itpn.engine.log import Log
from itpn.engine.numerics import Precision, choose_precision, matmul_ceiling, seed_of, set_numerics
from itpn.engine.optim import AdamWConfig, adamw
from itpn.engine.run import Run
from itpn.engine.saver import Saver
from itpn.engine.schedule import ScheduleConfig, lr_at
from itpn.engine.step import micro_step, out_of_memory
from itpn.engine.watch import Watch
from itpn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    epochs: int | None = None
    """Passes over the training images. The learning-rate schedule spans them."""
    iterations: int | None = None
    """Optimiser steps, instead of epochs. Intervals in epochs then count steps."""
    batch_size: int
    """Images per optimiser step, over all ranks and gradient accumulation. Results do not depend on the
    hardware."""
    device_batch: int | None = None
    """Images per device and forward pass. Default: 16 on a CPU. On CUDA, 512 halved until the first step
    fits."""
    device: DeviceName = "auto"
    """Device to train on."""
    strategy: Strategy = "ddp"
    """Distribution over ranks. ddp: each rank holds the whole model. fsdp: parameters, gradients and
    optimiser state are sharded, for models that exceed one device."""
    precision: Precision = "auto"
    """Precision of the forward pass. auto: bf16 on CUDA (fp16 on older GPUs), fp32 elsewhere."""
    compile: bool = False
    """Compile each block with torch.compile."""
    deterministic: bool = False
    """Make resumed runs bit-identical on CUDA too, at some cost in speed. On a CPU they always are."""
    clip_grad: float | None = None
    """Largest norm of the gradient, over all parameters. None: no clipping."""
    skip_bad_steps: int = 0
    """Number of consecutive steps with a non-finite loss or gradient to skip before training stops."""
    seed: int = 0
    """Random seed."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int | None = None
    """Epochs between checkpoints. None: checkpoint_minutes decides alone."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, also within an epoch."""
    keep_last: int = 3
    """Number of latest checkpoints to keep."""
    keep_every: int | None = None
    """Keep a checkpoint permanently every this many epochs."""
    picture_every: int = 10
    """Epochs between pictures. 0: none."""
    run_dir: Path | None = None
    """Directory that the run writes to and resumes from. Default: runs/NAME."""
    force: bool = False
    """Resume even if the config or images changed."""
    max_steps: int | None = None
    """Stop after this step with a checkpoint, as if interrupted."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.iterations is None):
            raise UserError("a run has either --epochs or --iterations: give one, and None for the other")
        counts = ("epochs", "iterations", "batch_size", "device_batch", "log_every", "checkpoint_every")
        for name in (*counts, "keep_last", "keep_every", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if min(self.picture_every, self.checkpoint_minutes, self.skip_bad_steps) < 0:
            raise UserError("--picture-every, --checkpoint-minutes and --skip-bad-steps must be at least 0")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise UserError(
                f"--clip-grad must be greater than 0, not {self.clip_grad}; leave it out not to clip"
            )

    def period(self, steps_per_epoch: int) -> int:
        """Steps of what the run is counted in: an epoch's, or one."""
        return steps_per_epoch if self.iterations is None else 1

    def num_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole run."""
        return (self.iterations or self.epochs or 0) * self.period(steps_per_epoch)


class Objective(Protocol):
    """What the loop asks of an objective besides `forward(batch) -> {"loss": …, parts}`.

    These are scalars under the same names at every step. Buffers must end a step equal on all ranks, as
    parameters do: rank 0's are saved.
    """

    def begin_step(self, step: int, num_steps: int) -> None: ...
    def end_step(self, step: int, num_steps: int) -> None: ...
    def compile_blocks(self) -> Iterable[nn.Module]:
        """What to compile and to shard one by one, where that is asked for."""
        ...

    def flops_per_image(self) -> float:
        """Work of a whole training step for one image. Optional: without it there is no MFU."""
        ...


@dataclass(frozen=True)
class Interlude:
    """Called on every rank before the first step, after every `every`-th epoch (or step, where the run has
    iterations) and after the last step; 0: never."""

    every: int
    call: Callable[[float, int], Mapping[str, float | Image]]
    """(epochs, steps) that are done to named numbers and pictures, which are logged. Each rank has the whole
    model and may call it as often as it likes."""
    keep: Callable[[float, int], None] = lambda epoch, step: None
    """Called afterwards, when a sharded model is in shards again: the ranks may gather it together."""


def train(
    objective: nn.Module,
    batches: Batches,
    *,
    steps_per_epoch: int,
    loop: LoopConfig,
    optim: AdamWConfig,
    schedule: ScheduleConfig,
    run: Run,
    bad: BadFiles | None = None,
    interludes: Sequence[Interlude] = (),
    lr_scales: Mapping[str, float] | None = None,
) -> bool:
    """Trains `objective`, or goes on with it, up to the last step.

    Args:
        batches: (start_step, device_batch) -> this rank's endless micro-batches from that step, on the CPU.
        bad: what the loaders tell of files that they cannot read.
        lr_scales: for every trained parameter by name, what the schedule's learning rate is multiplied by.

    Returns:
        True once the last step is reached; False if `max_steps` came first.

    Raises:
        UserError: settings that do not go together; a checkpoint of another model; a loss that is not finite.
        SystemExit: after SIGINT (130) or SIGTERM (143), with a checkpoint.
    """
    training = Training(
        objective, steps_per_epoch, loop, optim, schedule, run, bad or BadFiles(run), lr_scales
    )
    return training.run(batches, interludes)


class Training:
    """What the steps of one run share. `run` tells the story."""

    def __init__(
        self,
        objective: nn.Module,
        steps_per_epoch: int,
        loop: LoopConfig,
        optim: AdamWConfig,
        schedule: ScheduleConfig,
        run: Run,
        bad: BadFiles,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        world, device = run.world, run.world.device
        self.num_steps, self.period = loop.num_steps(steps_per_epoch), loop.period(steps_per_epoch)
        self.epochs = self.num_steps / steps_per_epoch
        schedule.warmup(self.epochs, steps_per_epoch)
        device_batch.check_division(loop.batch_size, world.size, loop.device_batch)
        self.objective, self.hooks = objective, cast(Objective, objective)
        self.loop, self.schedule, self.place, self.world = loop, schedule, run, world
        self.steps_per_epoch = steps_per_epoch
        self.last_step = min(self.num_steps, loop.max_steps or self.num_steps)
        self.peak_lr = optim.peak_lr(loop.batch_size)

        self.precision = choose_precision(loop.precision, device)
        set_numerics(device, self.precision, deterministic=loop.deterministic)
        if loop.compile:
            for block in self.hooks.compile_blocks():
                block.compile()
        if loop.strategy == "fsdp":
            world.shard(objective, self.hooks.compile_blocks())
        objective.to(device).train()
        self.optimizer = adamw(objective, optim, lr_scales)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.log = Log(run, self.num_steps, steps_per_epoch, self.period, loop.batch_size, loop.log_every)
        self.bad, self.watch = bad, Watch()
        self.saver = Saver(
            objective,
            self.optimizer,
            {"scaler": self.scaler, "log": self.log, "bad_files": bad, "watch": self.watch},
            run,
            every=loop.checkpoint_every and loop.checkpoint_every * self.period,
            minutes=loop.checkpoint_minutes,
            keep_last=loop.keep_last,
            keep_every=loop.keep_every and loop.keep_every * self.period,
        )

    def run(self, batches: Batches, interludes: Sequence[Interlude]) -> bool:
        step = self.saver.resume()
        if self.last_step <= step < self.num_steps:
            self.place.say(f"{self.place.directory} is at step {step} already; no step is left")
            return False
        self.place.begin()
        self._settle(batches, step)
        self.bad.begin()
        self.log.begin(step)
        with (
            self.log,
            Interruption("saving, then stopping ..." if self.world.is_main else "") as interruption,
        ):
            try:
                self._evaluate(step, interludes, interruption)
                stream = batches(step, self.micro_batch)
                while step < self.last_step:
                    self._step(step, stream, interruption)
                    step += 1
                    self._between_steps(step)
                    self._evaluate(step, interludes, interruption)
            except Interrupted:
                self._stop(step, interruption.signal)
        if step < self.num_steps:
            self.place.say(f"stopped at step {step} of {self.num_steps}, as --max-steps says")
        return step == self.num_steps

    def _settle(self, batches: Batches, start_step: int) -> None:
        """How the batch is cut up, said in one line; from here on the model is ready."""
        loop, world = self.loop, self.world
        share = loop.batch_size // world.size
        self.micro_batch = device_batch.settle(
            self.objective,
            lambda size: next(batches(start_step, size)),
            self.place,
            share=share,
            given=loop.device_batch,
            precision=self.precision,
        )
        self.accumulation = share // self.micro_batch
        self.model = world.wrap(self.objective)
        self.place.say(
            f"{self.place.directory}: step {start_step} of {self.num_steps} ({self.epochs:g} epochs) "
            f"on {world.device.type} in {str(self.precision).removeprefix('torch.')}; "
            f"batch {loop.batch_size} = {world.size} ranks x {self.micro_batch} images "
            f"x {self.accumulation} micro-steps"
        )
        if world.device.type == "cuda" and hasattr(self.hooks, "flops_per_image"):
            ceiling = world.size * matmul_ceiling(world.device, self.precision)
            self.log.mfu_per_rate = self.hooks.flops_per_image() / ceiling

    def _step(self, step: int, stream: Iterator[Batch], interruption: Interruption) -> None:
        """Forward and backward of every micro-batch, then the optimiser, then what the objective does."""
        self.hooks.begin_step(step, self.num_steps)
        lr = lr_at(
            step,
            self.schedule,
            peak=self.peak_lr,
            epochs=self.epochs,
            steps_per_epoch=self.steps_per_epoch,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

        waited, parts, samples = 0.0, [], []
        for i in range(self.accumulation):
            (signal,) = self.world.largest(interruption.signal)
            if signal:
                interruption.signal = int(signal)  # perhaps only another rank heard it
                self._save(step)  # what this step has summed up so far will be summed up again
                raise Interrupted
            asked = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - asked
            samples.append(replay.ids_of(batch))
            torch.manual_seed(seed_of(self.loop.seed, step, self.world.rank, i))
            with exchange_gradients(self.model, now=i == self.accumulation - 1):
                outputs = self._micro_step(batch)
            parts.append(torch.stack(list(outputs.values())))

        self.scaler.unscale_(self.optimizer)
        norm = whole_tensor(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        by_rank = self.world.gather(torch.stack(parts))  # [ranks, micro-steps, names]
        values = dict(zip(outputs, by_rank.mean(dim=(0, 1)).tolist(), strict=True))
        values |= {"lr": lr, "grad_norm": norm.item()}
        # An fp16 scaler leaves out a step whose gradient overflows by itself, and scales less; it has then
        # done what it can if it already scales up no more.
        overflow_only = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if math.isfinite(values["loss"]) and (overflow_only or bool(norm.isfinite())):
            if self.loop.clip_grad is not None:
                nn.utils.clip_grads_with_norm_(self.parameters, self.loop.clip_grad, norm)
            self.scaler.step(self.optimizer)
            self.hooks.end_step(step, self.num_steps)
            self.world.average_statistics(self.objective)
            self.watch.num_skipped = 0
            self.log.step(step + 1, values, waited=waited)
            if outlier := self.watch.outlier(values["loss"]):
                self.log.write(step + 1, outlier)
                self.place.say(
                    f"step {step + 1}: the loss {outlier['loss_outlier']:.4g} is far above "
                    f"{outlier['loss_median']:.4g}, the median of the steps before"
                )
        else:
            losses = by_rank[..., list(outputs).index("loss")].tolist()
            self._leave_out(step, losses, values, samples)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _micro_step(self, batch: Batch) -> dict[str, Tensor]:
        batch = {name: tensor.to(self.world.device, non_blocking=True) for name, tensor in batch.items()}
        try:
            share = 1 / self.accumulation
            return micro_step(self.model, batch, self.precision, share=share, scaler=self.scaler)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.micro_batch) from error

    def _leave_out(
        self, step: int, losses: list[list[float]], values: dict[str, float], samples: list[list[list[int]]]
    ) -> None:
        """Keeps a step that went wrong for `itpn replay`; an error if too many in a row did."""
        bad = replay.BadStep(
            step=step,
            num_steps=self.num_steps,
            seed=self.loop.seed,
            precision=str(self.precision).removeprefix("torch."),
            micro_batch=self.micro_batch,
            losses=losses,
            grad_norm=values["grad_norm"],
            samples=self.world.gather_json(samples),
        )
        model = checkpoint.model_tensors(self.objective, keep=self.world.is_main)
        kept = self.place.directory / "replay"
        if self.world.is_main:
            try:
                replay.write(kept, bad, model, self.place.config)
            except (OSError, SafetensorError) as error:
                self.place.say(f"could not keep the step in {kept} ({error})")
        self.watch.num_skipped += 1
        if self.watch.num_skipped > self.loop.skip_bad_steps:
            raise UserError(
                f"{bad}; `itpn replay {kept}` repeats the step. The same command resumes from step "
                f"{self.saver.last_step}: add --skip-bad-steps {self.watch.num_skipped}, or add --force "
                "and a lower learning rate, --clip-grad 1, or --precision bf16 or fp32"
            )
        self.log.stopwatch = time.perf_counter()
        self.place.say(f"{bad}: left out, kept in {kept}")
        self.log.write(step + 1, {**values, "skipped": self.watch.num_skipped})

    def _between_steps(self, step: int) -> None:
        """What could not be read, and checkpoints."""
        with self.log.paused():
            overdue, num_fresh = self.world.largest(self.saver.overdue(), len(self.bad.fresh))
            if num_fresh:
                self.bad.share(step, step * self.loop.batch_size)
            if overdue or step == self.last_step or self.saver.due(step):
                self._save(step)

    def _evaluate(self, step: int, tasks: Sequence[Interlude], interruption: Interruption) -> None:
        """After a checkpoint: an evaluation that is cut short is made again."""
        last = step == self.num_steps
        due = [task for task in tasks if task.every and (last or step % (task.every * self.period) == 0)]
        if not due:
            return
        with self.log.paused():
            if step:
                self._save(step)
            # Not compiled: other precisions and sizes would use up what a block may be compiled for.
            eager = torch.compiler.set_stance("force_eager")
            with whole(self.objective), interruption.at_once(), eager:
                for task in due:
                    self.log.write(step, task.call(step / self.steps_per_epoch, step))
            for task in due:
                task.keep(step / self.steps_per_epoch, step)
            self.objective.train()
            if self.world.largest(len(self.bad.fresh))[0]:
                self.bad.share(step, step * self.loop.batch_size)

    def _save(self, step: int) -> None:
        self.log.sync(self.bad.journal)
        self.saver.save(step)

    def _stop(self, step: int, signal: int) -> NoReturn:
        self.place.say(
            f"stopped at step {step} of {self.num_steps}; "
            f"the same command resumes from step {self.saver.last_step}"
        )
        raise SystemExit(128 + signal)
