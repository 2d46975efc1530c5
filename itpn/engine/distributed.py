"""Ranks and devices. One process is a world of one; `torchrun` makes larger ones."""

import json
import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from itpn.errors import UserError

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Strategy = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class World:
    """This process among all that train together."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """What the ranks decide by, on their CPUs: a GPU need not wait for it. None: the only group there is."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The same-shaped `values` [...] of every rank, as float64 on the CPU: [size, ...]."""
        if self.size == 1:
            return values.cpu().double()[None]
        rows = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(rows, values)
        return torch.stack(rows).cpu().double()

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's JSON-able value, in the order of ranks."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        (longest,) = self.largest(len(text))
        padded = torch.full((int(longest),), ord(" "), dtype=torch.uint8)
        padded[: len(text)] = text
        rows = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(rows, padded, group=self.control)
        return [json.loads(row.numpy().tobytes()) for row in rows]

    def largest(self, *numbers: float) -> list[float]:
        """Each number's maximum over the ranks, so that all decide alike."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.control)
        return [float(value) for value in values.tolist()]

    def wait(self) -> None:
        """Until every rank is here."""
        self.largest(0)

    def shard(self, module: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """FSDP2: each rank keeps a share of every parameter, of its gradient and of the optimiser's state.

        A block is whole while it runs, the rest of `module` throughout a step. The parameters become other
        objects, so the optimiser is built afterwards. One process keeps everything.
        """
        self._synchronise_norms(module)
        if self.size > 1:
            mesh = init_device_mesh(self.device.type, (self.size,))
            for block in blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module that averages its gradients over the ranks, which a sharded one does by itself.

        On GPUs its batch norms see the samples of all ranks from here on.
        """
        self._synchronise_norms(module)
        if self.size == 1 or isinstance(module, FSDPModule):
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():  # broadcast_buffers has a new name that older versions do not know
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                module,
                ids,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                # Otherwise the buckets are laid out anew after the first step, also after a resume, and from
                # three ranks on the layout decides in which order they add. Two numbers have one sum.
                find_unused_parameters=self.size > 2 and torch.are_deterministic_algorithms_enabled(),
            )

    def _synchronise_norms(self, module: nn.Module) -> None:
        if self.size > 1 and self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def average_statistics(self, module: nn.Module) -> None:
        """On CPUs, where each rank's batch norms see its own samples alone: their running statistics become
        the mean of all ranks', so that a step ends with the same ones everywhere."""
        if self.size == 1 or self.device.type == "cuda":
            return
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                for statistics in (layer.running_mean, layer.running_var):
                    if statistics is not None:
                        dist.all_reduce(statistics)
                        statistics /= self.size


def exchange_gradients(model: nn.Module, *, now: bool) -> AbstractContextManager[None]:
    """Under accumulation the ranks exchange gradients once, with the last micro-step.

    Shards do it with every one: keeping them back would keep whole gradients.
    """
    if isinstance(model, DistributedDataParallel) and not now:
        return cast(AbstractContextManager[None], model.no_sync())
    return nullcontext()


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, a sharded module is a plain one with all its parameters on every rank.

    Any part of it may be called, on each rank as often as it likes. Its state dict must not be asked for.
    """
    shards = [part for part in module.modules() if isinstance(part, FSDPModule)]
    hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in shards]
    for part in shards:
        part.unshard()
        # FSDP's own: they would take the first block that is called for the root, and free what has run.
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, (before, after) in zip(shards, hooks, strict=True):
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.reshard()


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that is shared out over the ranks, each of which must ask; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Each whole and on the CPU, one after the other; every rank must ask.

    Args:
        keep: False on a rank that only helps the others: it gets none.
    """
    kept = {}
    for name, tensor in tensors.items():
        complete = whole_tensor(tensor.detach())
        if keep:
            kept[name] = complete.cpu().contiguous()
    return kept


@torch.no_grad()
def copy_share(target: Tensor, complete: Tensor) -> None:
    """Copies `complete`, which every rank has, or this rank's share of it."""
    if isinstance(target, DTensor):
        mesh, placements = target.device_mesh, target.placements
        complete = distribute_tensor(complete, mesh, placements, src_data_rank=None)
    target.copy_(complete)


def choose_device(name: DeviceName, local_rank: int = 0) -> torch.device:
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    if name == "cuda" and not has_cuda:
        raise UserError(
            "--device cuda: PyTorch finds no CUDA device here; use --device cpu, or install a driver"
        )
    if name == "mps" and not has_mps:
        raise UserError("--device mps: PyTorch finds no Apple GPU here; use --device cpu")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"this machine has {torch.cuda.device_count()} CUDA devices, but torchrun started a process "
            f"number {local_rank + 1}: lower --nproc-per-node"
        )
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


@contextmanager
def join_world(device_name: DeviceName) -> Iterator[World]:
    """The world that `torchrun` describes in the environment, or a world of one."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "mps" and size > 1:
        raise UserError("an Apple GPU trains in one process: start it without torchrun, or use --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        # Naming the device lets NCCL connect at once, not in the middle of the first step.
        bound = device if device.type == "cuda" else None
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=_store_of_attempt(), rank=rank, world_size=size, device_id=bound
        )
    on_gpus = size > 1 and device.type == "cuda"
    control = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if on_gpus else None
    try:
        yield World(rank, size, device, control)
        # Only here: after an error the other ranks may be inside an exchange, and this would wait for them.
        if size > 1:
            dist.destroy_process_group()
    finally:
        if size > 1 and device.type == "cpu":
            # Gloo's threads outlive the group, which DistributedDataParallel keeps, and let go of the last
            # tensors a moment after the exchange. Python must still be whole then, or the process aborts.
            time.sleep(0.2)


def _store_of_attempt() -> PrefixStore | None:
    """Where the ranks find each other; None: torch's own choice.

    torchrun lends its workers its own store, where those that it restarts after a failure would find the
    addresses of the dead. On several nodes the attempts are not numbered alike (see docs/running.md).
    """
    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or environment["GROUP_WORLD_SIZE"] != "1":
        return None
    store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
    return PrefixStore(f"attempt {environment['TORCHELASTIC_RESTART_COUNT']}", store)
