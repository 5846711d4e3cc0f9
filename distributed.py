"""The device, the processes of torchrun, and sums over them.

One process without torchrun is rank 0 of 1: sums over processes are then what they are given.
`D9` in comments points to docs/details.md.
"""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Process(NamedTuple):
    """This process among those of torchrun; rank 0 of 1 without."""

    rank: int
    world: int
    device: torch.device
    is_main: bool


def choose_device(device: str) -> torch.device:
    """This process's device: cpu, cuda or auto, which is cuda where there is one.

    Raises ValueError where it cannot be used.
    """
    name = "cuda" if device == "auto" and torch.cuda.is_available() else device
    name = {"auto": "cpu", "cuda": f"cuda:{os.environ.get('LOCAL_RANK', 0)}"}.get(name, name)
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name} cannot be used ({str(error).splitlines()[0]})") from None
    return torch.device(name)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 natively; elsewhere it is emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    info = Path("/proc/cpuinfo")
    words = info.read_text().split() if device.type == "cpu" and info.exists() else []
    return "avx512_bf16" in words or "amx_bf16" in words


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a GPU; none: not known, as of a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def join(device: torch.device) -> Process:
    """Join the processes of torchrun, if any."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # a slow reward function or disk of one is waited for; one that fails ends all
        backend, patience = "nccl" if device.type == "cuda" else "gloo", timedelta(days=7)
        dist.init_process_group(backend, timeout=patience)
    return Process(rank, world, device, is_main=rank == 0)


def leave() -> None:
    """Wait for all processes and part from them."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def sum_all(x: Tensor) -> Tensor:
    """The sum of `x` over all processes; a new tensor, or `x` itself where there is one."""
    return reduce_all(x, "SUM")


def max_all(x: Tensor) -> Tensor:
    """The largest `x` of all processes."""
    return reduce_all(x, "MAX")


def reduce_all(x: Tensor, operation: str) -> Tensor:
    """`x` of all processes reduced to one by an operation of torch.distributed."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x, getattr(dist.ReduceOp, operation))
    return x


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Add up gradients over processes: each loss is divided by the whole batch's count (D9)."""
    for p in parameters:
        if dist.is_initialized() and p.requires_grad:  # not of a policy that stands still (D32)
            if p.grad is None:  # a process whose share of the last batch is empty takes part too
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)


def gather(rows: list[Any]) -> list[Any]:
    """The lists of all processes, interleaved as they were dealt out by `rows[rank::world]`."""
    if not dist.is_initialized():
        return rows
    parts = [rows] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def from_main(x: Any) -> Any:
    """What the main process calls this with, in all of them."""
    box = [x]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]
