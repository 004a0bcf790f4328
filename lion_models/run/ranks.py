"""Data-parallel training: the processes of torchrun, each with its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lion_models.base.errors import UserError

__all__ = ["ALONE", "Ranks", "joined_ranks"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model together.

    All draw the same batches; each computes its part of a batch and the sums go to all. Gradients
    are added up by hand, not by DistributedDataParallel: a batch is then divided as it is, without
    padding, and its mean is exactly that of one process.

    Args:
        rank: of this process; 0 alone writes files.
        world: number of processes.
        device: where tensors must lie to be exchanged.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's part of `count` rows; empty where there are fewer rows than processes."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def share(self, value: T) -> T:
        """What the first process has: any object that can be pickled."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every process's object, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def add(self, sums: dict[str, float]) -> dict[str, float]:
        """Add up figures by name; a name that some lack counts as 0 there."""
        total: dict[str, float] = {}
        for own in self.gather(sums):
            for name, value in own.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def align(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the first one's values, bit for bit."""
        if self.world > 1:
            for parameter in parameters:
                dist.broadcast(parameter.data, src=0)

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by the sum over the processes.

        A parameter that no process has a gradient for keeps none, so that the optimizer leaves it
        alone as it would with one process.
        """
        if self.world == 1 or not parameters:
            return
        device = parameters[0].device
        present = torch.tensor([p.grad is not None for p in parameters], device=device)
        flat = torch.cat(
            [_flat_gradient(parameter) for parameter in parameters] + [present.float()]
        )
        dist.all_reduce(flat)
        sizes = [parameter.numel() for parameter in parameters]
        *sums, counts = flat.split([*sizes, len(parameters)])
        for parameter, total, count in zip(parameters, sums, counts.tolist(), strict=True):
            if count:
                parameter.grad = total.view_as(parameter).to(parameter.dtype)


ALONE = Ranks()


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    return (torch.zeros_like(parameter) if gradient is None else gradient).flatten().float()


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the other processes if torchrun started this one; else there is this one alone.

    Args:
        device: `cpu` (gloo) or `cuda` (NCCL, one GPU for each process of a machine).

    Raises:
        UserError: the device is one GPU by its number.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "MASTER_ADDR" not in os.environ:
        yield ALONE
        return
    if ":" in device:
        raise UserError(
            f"`device` {device}: torchrun gives each process a GPU of its own; use `device` cuda"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, device)
    finally:
        dist.destroy_process_group()
