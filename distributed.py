"""The device, the processes of torchrun, sums over them, and models that they share.

One process without torchrun is rank 0 of 1: sums over processes are then what they are given, and
models stay as they are. Several have a copy of a model each (`replicate`) or a part (`shard`); by
torch's own DistributedDataParallel and FSDP2. `D9` in comments points to docs/details.md.
"""

import functools
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


class Process(NamedTuple):
    """This process among those of torchrun; rank 0 of 1 without."""

    rank: int
    world: int
    device: torch.device


def choose_device(device: str) -> torch.device:
    """This process's device: cpu, cuda or auto, which is cuda where there is one.

    Raises ValueError where it cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, dtype=torch.float64, device=device).item()  # which mps lacks
    except Exception as error:  # an ImportError of hpu, say
        raise ValueError(f"{device} cannot be used ({str(error).splitlines()[0]})") from None
    return torch.device(device)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 natively; elsewhere it is emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return has.get("avx512_bf16", False) or has.get("amx_bf16", False)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a GPU can still allocate; none: not known."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def join(device: torch.device) -> Process:
    """Join the processes of torchrun, if any."""
    rank, world = place()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch() and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        patience = timedelta(days=7)  # with a slow reward function or disk; a failure ends all
        # processes that were started again would else read where those before them listened
        shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if shared else ""
        store = dist.PrefixStore(start, next(dist.rendezvous("env://"))[0])
        dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=world)
    return Process(rank, world, device)


def place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launch() else (0, 1)


def is_main() -> bool:
    """Whether this process writes."""
    return place()[0] == 0


def lost_others(error: Exception) -> bool:
    """Whether it says that another process, or the way to it, is gone."""
    words = str(error).lower()
    kind = isinstance(error, dist.DistError) or "gloo" in words or "nccl" in words
    return kind and isinstance(error, RuntimeError) and dist.is_initialized()


def depart() -> None:
    """Wait for all processes and part from them."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def reduce_all(x: Tensor, operation: Any) -> Tensor:
    """`x` reduced over all processes; a new tensor, or `x` itself where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(x := x.clone(), operation)
    return x


def sum_all(x: Tensor) -> Tensor:
    """The sum of `x` over all processes."""
    return reduce_all(x, dist.ReduceOp.SUM)


def max_all(x: Tensor) -> Tensor:
    """The largest `x` of all processes."""
    return reduce_all(x, dist.ReduceOp.MAX)


def gather(rows: list[Any]) -> list[Any]:
    """The lists of all processes, interleaved as they were dealt out by `rows[rank::world]`."""
    if not dist.is_initialized():
        return rows
    parts = [rows] * place()[1]
    dist.all_gather_object(parts, rows)
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def from_main(x: Any) -> Any:
    """What the main process calls this with, in all of them."""
    box = [x]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def micro_batches(rows: list[Any], size: int, length: Callable[[Any], int]) -> list[list[Any]]:
    """This process's share of the rows, by length, in parts of at most `size`.

    Each process gets the same number of parts; a part may be empty.
    """
    rank, world = place()
    mine = sorted(rows[rank::world], key=length)  # little padding
    count = -(-len(rows) // (size * world))
    bounds = [len(mine) * i // count for i in range(count + 1)]
    return [mine[i:j] for i, j in zip(bounds, bounds[1:], strict=False)]


handlers: list[tuple[int, Any]] = []  # of signals, before an Interruption


def give_back_signals() -> None:
    """Let signals do what they did before the run: a notebook goes on after it."""
    while handlers:
        signal.signal(*handlers.pop())


class Interruption:
    """SIGTERM or Ctrl-C: noted at once, acted on where the loop asks; a second signal exits."""

    def __init__(self, device: torch.device):
        self.device, self.owner = device, os.getpid()
        self.signal, self.time = 0, 0.0  # the first one and when it came
        for number in (signal.SIGTERM, signal.SIGINT):
            handlers.append((number, signal.signal(number, self.note) or signal.SIG_DFL))

    def note(self, number: int, frame: Any) -> None:
        # Ctrl-C comes to all, but does not end forked workers; torchrun sends it again at once
        ends = number == signal.SIGTERM and os.getpid() != self.owner
        if ends or (self.signal and time.monotonic() - self.time > 1):
            os._exit(128 + number)
        self.signal, self.time = self.signal or number, self.time or time.monotonic()

    def came(self) -> int:
        """The signal that has come to any process, or 0; all ask at the same places."""
        return int(max_all(torch.tensor(self.signal, device=self.device)))


def launch() -> str | None:
    """What names this torchrun, also when it starts its processes again; None without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return f"{name} {file.split('/attempt_')[0]}" if name else None  # a folder of a random name


# ---- models of several processes


class Pass(nn.Module):
    """A model whose forward pass is a function of it: for torch, head and body are one."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, function: Callable) -> Any:
        return function(self.model)


def forward_pass(function: Callable) -> Callable:
    """Decorates f(model, ...): in it, a sharded model has its weights.

    Gradients of a replicated one will be summed. All processes call it equally often.
    """

    @functools.wraps(function)
    def through_torch(model: Any, *inputs: Any, **options: Any) -> Any:
        across = vars(model).get("across")
        if across is None or (replicated(model) and not torch.is_grad_enabled()):
            return function(model, *inputs, **options)
        # torch would search its inputs
        return across(lambda model: function(model, *inputs, **options))

    return through_torch


def gathers_once(function: Callable) -> Callable:
    """As `forward_pass`, for a function of many steps: weights stay whole until it ends."""

    @functools.wraps(function)
    def whole(model: Any, *inputs: Any, **options: Any) -> Any:
        shards = [m for m in vars(model).get("across", nn.Module()).modules() if is_shard(m)]

        def gathered(model: Any, *inputs: Any, **options: Any) -> Any:
            for shard in shards:
                shard.unshard()  # now, so that the memory that is free is what is left
            return function(model, *inputs, **options)

        for shard in shards:
            shard.set_reshard_after_forward(False, recurse=False)
        try:
            return forward_pass(gathered)(model, *inputs, **options)
        finally:
            for shard in shards:
                shard.set_reshard_after_forward(True, recurse=False)
                shard.reshard()

    return whole


def load_device(args: Any, device: torch.device) -> torch.device:
    """Where a model is loaded: with --fsdp, a GPU has room for shards only."""
    return torch.device("cpu") if args.fsdp else device


def replicated(model: Any) -> bool:
    """Whether each process has the whole model, and gradients are summed."""
    return isinstance(vars(model).get("across"), DistributedDataParallel)


def is_shard(module: nn.Module) -> bool:
    """Whether FSDP gathers this module by itself."""
    return isinstance(module, FSDPModule)


def is_sharded(model: Any) -> bool:
    """Whether each process has a part of the model."""
    return is_shard(vars(model).get("across"))


def replicate(model: Any) -> None:
    """Sum a model's gradients over processes while the backward pass still goes on (D9).

    The gradients are views of the buffers that are sent, no second copy.
    """
    if dist.is_initialized() and place()[1] > 1:
        torch._dynamo.config.optimize_ddp = False  # it would cut compiled layers into pieces
        how = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
        # an expert that no token went to has no gradient, nor has a tower for images
        names = " ".join(name for name, _ in model.named_modules())
        how["find_unused_parameters"] = any(x in names for x in ("expert", "vision", "audio"))
        with warnings.catch_warnings(action="ignore"):  # broadcast_buffers has another name in 2.13
            across = DistributedDataParallel(Pass(model), **how)
        across.register_comm_hook(None, sum_bucket)  # torch's own would be the mean
        # after its first sum torch lays the buffers out anew, which changes the order of additions:
        # now, or the first step after --resume would round otherwise
        across(lambda model: sum(p.sum() for p in model.parameters() if p.requires_grad)).backward()
        across.zero_grad()
        across.require_backward_grad_sync = False
        vars(model)["across"] = across  # no submodule: it holds the model


def sum_bucket(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Start the sum of some gradients over processes."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def shard(model: Any, device: torch.device, dtype: str, offload: bool = False) -> None:
    """Leave each process a part of each weight, gradient and moment; layers are gathered in turn.

    With `offload` the part is in the CPU's memory. In bfloat16 a GPU gathers a layer's weights as
    that; embeddings, the last norm and the head stay in float32, and gradients are summed in it.
    """
    _, world = place()
    mesh = init_device_mesh(device.type, (world,))
    how: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    if offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    # a CPU's layer norm takes no bfloat16 weights beside float32 inputs
    half = torch.bfloat16 if dtype == "bfloat16" and device.type != "cpu" else None
    precision = {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, **how, mp_policy=MixedPrecisionPolicy(half, **precision))
    across = fully_shard(Pass(model), **how, mp_policy=MixedPrecisionPolicy(**precision))
    for module in filter(is_shard, across.modules()):
        module.set_gradient_divide_factor(1.0)  # a sum, not the mean (D9)
        module.set_force_sum_reduction_for_comms(True)
    vars(model)["across"] = across


def sums_in_last(parts: list[Any], models: Any) -> Iterator[Any]:
    """The micro-batches of an optimizer step; the last one's backward pass sums the gradients.

    Those of sharded models are summed in each: whole they would fill the memory that is saved.
    """
    # not of a policy that stands still (D32)
    models = [m for m in models if replicated(m) and any(p.requires_grad for p in m.parameters())]
    for i, part in enumerate(parts, 1):
        for model in models:
            model.across.require_backward_grad_sync = i == len(parts)
        yield part
    for model in models:
        model.across.require_backward_grad_sync = False


def full(x: Tensor) -> Tensor:
    """A tensor of which processes have parts, put together; any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_weights(sharded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sharded weights in the main process's CPU memory, one gathered after the other."""
    gathered = ((name, full(weight)) for name, weight in sharded.items())
    return {name: weight.cpu() for name, weight in gathered if is_main()}


def save_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write what each process has of the tensors, as safetensors; called by all."""
    writer = dcp.HuggingFaceStorageWriter(folder, save_distributed=True)
    with warnings.catch_warnings(action="ignore"):
        try:
            dcp.save(tensors, storage_writer=writer)
        except dcp.CheckpointException as error:  # a BaseException; a full disk raises it
            why = str(error).strip().splitlines()[-1]
            raise OSError(why.removeprefix("OSError: ")) from error


def load_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill the tensors, or this process's parts of them, from what any number of them wrote."""
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(folder))


def names_in_shards(folder: Path) -> list[str]:
    """Names of the tensors in a folder of shards."""
    return [*dcp.HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata]
