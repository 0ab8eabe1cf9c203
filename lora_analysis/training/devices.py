"""Where a run computes: device, CPU threads, and the processes that train one model together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_analysis.errors import InputError


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device with a name, if this machine has it.

    Parameters
    ----------
    name
        ``"auto"`` takes the first of cuda, mps and cpu that this machine has; otherwise a torch
        device name (``"cpu"``, ``"cuda:1"``).

    Raises
    ------
    InputError
        The name is not a device, or this machine does not have it.
    """
    available = available_devices()
    if name in ("auto", "cuda") and available[0] == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # each process of torchrun has its own
    if name == "auto":
        return torch.device(available[0])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        message = f"There is no device '{name}'. Use auto, {', '.join(available)}."
        raise InputError(message) from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in available or (device.index or 0) >= count:
        message = f"The device '{name}' is not on this machine. Use auto, {', '.join(available)}."
        raise InputError(message)
    return device


def available_devices() -> list[str]:
    """Return the types of device of this machine, fastest first."""
    accelerators = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    return [*(name for name, is_available in accelerators.items() if is_available), "cpu"]


def gpu_memory() -> int:
    """Return this process's peak GPU memory in bytes; 0 if it uses no GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Set the number of CPU threads of torch inside the block; None does not change it.

    The order of a sum depends on the number of threads: with one, a run gives the same bits
    even if it shares the machine with other runs. Small models gain little from two.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of one training: rank of this one, and their number.

    Each holds all trained parameters, and their gradients are summed in one operation: an
    adapter's are a hundredth of the model's, so there is nothing to overlap with computation.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes have come to this point."""
        if self.count > 1:
            torch.distributed.barrier()

    def total(self, number: int) -> int:
        """Return the sum of a number over the processes."""
        return int(self.sum_tensor(torch.tensor(float(number)))) if self.count > 1 else number

    def sum_tensor(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        if self.count > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def gather_tensor(self, value: Tensor) -> list[Tensor]:
        """Return a tensor's values in all processes, in the order of ranks, on the CPU."""
        if self.count == 1:
            return [value.cpu()]
        nccl = torch.distributed.get_backend() == "nccl"  # which needs tensors on a GPU
        local = value.to("cuda" if nccl else "cpu")
        values = [torch.empty_like(local) for _ in range(self.count)]
        torch.distributed.all_gather(values, local)
        return [tensor.cpu() for tensor in values]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over the processes, in place; a missing gradient counts as zero."""
        if self.count == 1:
            return
        for parameter in (trained := list(parameters)):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
        torch.distributed.all_reduce(flat)
        parts = torch.split(flat, [parameter.numel() for parameter in trained])
        for parameter, part in zip(trained, parts, strict=True):
            parameter.grad = part.view_as(parameter)


ALONE = Processes()


@contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes started by ``torchrun``; without it, this process is alone.

    With NCCL if the device is a GPU, otherwise with gloo.
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
    """Shard a model's frozen weights over the processes, block by block, in place (FSDP2).

    Each block is gathered for its computation and released afterwards, so that a base larger than
    one GPU can be adapted. Trained parameters stay whole in every process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh, ignored_params=trained)
    fully_shard(model, mesh=mesh, ignored_params=trained)
