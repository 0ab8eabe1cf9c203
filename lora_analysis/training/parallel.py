"""Several processes that train one model, each with a part of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of one training: this one's number among how many.

    What is trained is held whole by each of them, and its gradients are summed in one go: those
    of an adapter are a hundredth of the model's, so there is nothing to overlap.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def total(self, number: int) -> int:
        """Return the sum of a number over the processes."""
        return int(self.summed(torch.tensor(float(number)))) if self.count > 1 else number

    def summed(self, value: Tensor) -> Tensor:
        """Return a tensor summed over the processes."""
        if self.count > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def gathered(self, value: Tensor) -> list[Tensor]:
        """Return a tensor of every process, in their order, on the CPU."""
        if self.count == 1:
            return [value.cpu()]
        nccl = torch.distributed.get_backend() == "nccl"  # which sends what lies on a GPU
        sent = value.to("cuda" if nccl else "cpu")
        found = [torch.empty_like(sent) for _ in range(self.count)]
        torch.distributed.all_gather(found, sent)
        return [one.cpu() for one in found]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over the processes, in place; what has none counts as zero."""
        if self.count == 1:
            return
        for parameter in (held := list(parameters)):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in held if p.grad is not None])
        torch.distributed.all_reduce(flat)
        parts = torch.split(flat, [parameter.numel() for parameter in held])
        for parameter, part in zip(held, parts, strict=True):
            parameter.grad = part.view_as(parameter)


ALONE = Processes()


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started; without it, this process is alone.

    Over NCCL where the device is a GPU, else over gloo.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "MASTER_ADDR" not in os.environ:
        yield ALONE
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://"))
    # The store outlives a restart, and with it the addresses of processes that are gone.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=count,
    )
    try:
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()


def shard_frozen(model: nn.Module, device: torch.device) -> None:
    """Spread a model's frozen weights over the processes, block by block, in place (FSDP2).

    Each block is gathered when it computes and let go after, so that a base larger than one GPU
    can be adapted. What is trained stays whole in every process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
