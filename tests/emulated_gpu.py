"""A GPU emulated on the CPU: what would fail on a real one, or wait for it, does so here.

Within `emulate()` a tensor "on cuda:0" is one of the CPU whose storage is marked. As on a card,

- an operation on tensors of both devices is refused;
- a captured graph holds the kernels that were called, which have not run, and replays them on the
  same memory; what Python knew at the capture, such as a slice's end, stays;
- while it is captured, nothing may ask the device for a value, nor copy one to it.

`Gpu.waits` counts the places where the CPU did either, and so waited. Speed, memory and what a
card's kernels round otherwise are not emulated, nor which kernels autocast rounds on a card only.
"""

import contextlib
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import utils

autocast = torch.autocast
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
ROOT = Path(__file__).resolve().parents[1]
COPIES = ("aten._to_copy", "aten.copy_")  # take what is on another device
INDEXED = ("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_")
ASK = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal")
ASK += ("aten._unique2", "aten.is_nonzero")
MADE = (torch.tensor, torch.as_tensor)  # of numbers that the CPU has


def tensors_in(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


def on_gpu(x: Tensor) -> bool:
    return getattr(x.untyped_storage(), "on_gpu", False)


def mark(x: Tensor, on: bool) -> None:
    x.untyped_storage().on_gpu = on


class Gpu(TorchDispatchMode):
    """What a kernel may be given, and where its results are."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.goes_to: torch.device | None = None  # where the call at hand puts its result
        self.capturing: Graph | None = None
        self.graphs: list[weakref.ref[Graph]] = []  # that were captured
        self.pools: set[Any] = set()  # that no graph has yet
        self.underway: list[Any] = []  # pools of captures that the allocator has not seen end

    def asked(self, what: str) -> None:
        """The CPU waits for a value."""
        if self.capturing is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
        last = frames[-1] if frames else None
        self.waits[f"{last.name}: {last.line}" if last else "-"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name().split(".")[0].replace("::", ".")
        given = tensors_in((args, kwargs))
        places = [on_gpu(x) for x in given]
        here = any(places)
        if name in INDEXED:  # by numbers on either device
            here = places[0]
            if any(places) and not here:
                raise RuntimeError(f"{name}: indices are on the GPU, what they index is not")
            if here and any(x.dtype == torch.bool for x in given[1:]):
                self.asked(name)
            if here and not all(places):
                self.asked(f"{name} by what is on the CPU")
        elif name in COPIES:
            here = places[0] if self.goes_to is None else self.goes_to == GPU
            if any(places) and not here:
                self.asked(name)
            if here and not places[-1]:
                self.asked(f"{name} of what is on the CPU")
        elif not given:
            here = self.goes_to == GPU
        elif here and not all(on or x.dim() == 0 for on, x in zip(places, given, strict=True)):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if here and name in ASK:
            self.asked(name)
        if self.capturing is not None and here:
            return self.capturing.note(func, args, kwargs)
        result = func(*args, **kwargs)
        for x in tensors_in(result):
            if not any(x is y for y in given):
                mark(x, here)
        return result


class Calls(TorchFunctionMode):
    """What is said of devices, in words that a CPU understands."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, gpu, tensor = kwargs or {}, self.gpu, torch.Tensor
        if func == tensor.device.__get__:
            return GPU if on_gpu(args[0]) else CPU
        if func in (tensor.is_cuda.__get__, tensor.is_cpu.__get__):
            return on_gpu(args[0]) == (func == tensor.is_cuda.__get__)
        if func in (torch._C._nn._parse_to, torch.device):
            return func(*args, **kwargs)
        if func is tensor.numpy and on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is tensor.tolist and on_gpu(args[0]):
            gpu.asked("tolist")
        goes_to, moves = None, func in (tensor.to, tensor.cpu, tensor.cuda)
        if func is tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            goes_to = GPU if on_gpu(args[1]) else CPU
        elif moves and func is not tensor.to:
            func, goes_to = tensor.cpu, GPU if func is tensor.cuda else CPU

        def on_cpu(x: Any) -> Any:
            nonlocal goes_to
            words = isinstance(x, str) and x.split(":")[0] in ("cpu", "cuda")
            if words or isinstance(x, torch.device):
                goes_to = GPU if torch.device(x).type == "cuda" else CPU
                return CPU
            return x

        args, kwargs = tree_map(on_cpu, (args, kwargs))
        before, gpu.goes_to = gpu.goes_to, goes_to
        try:
            if goes_to == GPU and func in MADE and not any(map(on_gpu, tensors_in(args))):
                gpu.asked(f"to {goes_to}")
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and goes_to is not None:
                if moves and on_gpu(result) != (goes_to == GPU):
                    gpu.asked(f"to {goes_to}")
                    result = result.clone()
                mark(result, goes_to == GPU)
            return result
        finally:
            gpu.goes_to = before


class Graph:
    """Kernels, and the memory that they were given."""

    def __init__(self) -> None:
        self.kernels: list[tuple[Callable, Any, Any, list[Tensor]]] = []

    def note(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A kernel does not run; what it makes gets memory, of which nobody knows the content."""
        given = {x.untyped_storage()._cdata for x in tensors_in((args, kwargs))}
        named = [(a, args[i] if i < len(args) else kwargs.get(a.name))
                 for i, a in enumerate(func._schema.arguments)]  # fmt: skip
        written = [x for a, x in named if a.alias_info and a.alias_info.is_write]
        if written:
            self.kernels.append((func, args, kwargs, []))
            return written[0] if len(func._schema.returns) == 1 else tuple(written)
        result = func(*args, **kwargs)
        made = tensors_in(result)
        for x in made:
            mark(x, True)
        if any(x.untyped_storage()._cdata not in given for x in made):  # no view
            self.kernels.append((func, args, kwargs, made))
            for x in made:
                x.fill_(torch.nan if x.is_floating_point() else 0)
        return result

    def replay(self) -> None:
        with _disable_current_modes(), _pop_mode_temporarily(), autocast("cpu", enabled=False):
            for func, args, kwargs, memory in self.kernels:
                result = func(*args, **kwargs)
                if memory:
                    for x, y in zip(memory, tensors_in(result), strict=True):
                        x.copy_(y)

    def pool(self) -> Any:
        return self.of


class Generator(torch.Generator):
    """A generator that says it is the device's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls, "cpu")
        made.of = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.of


@contextlib.contextmanager
def emulate(free: int = 2**33) -> Iterator[Gpu]:
    """A GPU with so many free bytes, until the end of the block."""
    gpu = Gpu()

    @contextlib.contextmanager
    def capture(graph: Graph, pool: Any = None, capture_error_mode: str = "") -> Iterator[None]:
        alive = [other() for other in gpu.graphs if other()]
        if not (pool is None or pool in gpu.pools or pool in [other.pool() for other in alive]):
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED: the pool's graph is gone")
        gpu.capturing, graph.of = graph, pool or new_pool()
        gpu.pools.discard(graph.of)
        gpu.underway.append(graph.of)
        try:
            yield
        except RuntimeError:  # torch ends the capture, which fails too
            what = "operation failed due to a previous error during capture"
            raise RuntimeError(what)  # noqa: B904
        finally:
            gpu.capturing = None
        gpu.underway.remove(graph.of)
        gpu.graphs.append(weakref.ref(graph))

    def new_pool() -> Any:
        gpu.pools.add(pool := (0, object()))
        return pool

    def outside(function: Callable) -> Callable:
        def called(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes(), _pop_mode_temporarily():
                return function(*args, **kwargs)

        return called

    is_autocast_enabled, autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    class Autocast(autocast):
        def __init__(self, device_type: str, dtype: Any = None, enabled: bool = True) -> None:
            if device_type == "cpu":  # says nothing of the GPU's
                enabled = is_autocast_enabled("cpu")
            super().__init__("cpu", dtype, enabled)

    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: None,
        "set_stream": lambda stream: None,
        "is_current_stream_capturing": lambda: gpu.capturing is not None,
        "is_bf16_supported": lambda: True,
        "get_device_capability": lambda device=None: (9, 0),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (free, free),
        "CUDAGraph": Graph,
        "graph_pool_handle": new_pool,
        "graph": capture,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        # a build of torch for CUDA would look for a driver, as optimizers do
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        ends = {"endAllocateToPool": gpu.underway.remove, "releasePool": lambda pool: None}
        for name, end in ends.items():
            patch.setattr(torch._C, f"_cuda_{name}", lambda device, pool, end=end: end(pool))
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "autocast", Autocast)
        patch.setattr(torch, "is_autocast_enabled", lambda kind: is_autocast_enabled("cpu"))
        patch.setattr(torch, "get_autocast_dtype", lambda kind: autocast_dtype("cpu"))
        # on the CPU, by way of the meta device
        patch.setattr(utils, "from_pretrained", outside(utils.from_pretrained))
        with gpu, Calls(gpu):
            yield gpu
